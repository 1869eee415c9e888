"""What the methods that compare feature maps share: pairs of maps, their sizes, and the layers they train."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from rkd_jax import losses
from rkd_jax.models import Outputs
from rkd_jax.models.layers import EPSILON, torch_default

TINY = 1e-12  # a norm below it is taken for 0
transposed_default = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # PyTorch's: it swaps in and out


def both(name: str, student: Outputs, teacher: Outputs, ours: str, theirs: str = "", least: int = 1) -> tuple[Any, Any]:
    """A field of each network's outputs; ValueError where it is None, or has fewer maps than `least`."""
    found = []
    for side, outputs, field in (("student", student, ours), ("teacher", teacher, theirs or ours)):
        value = getattr(outputs, field)
        if value is None or (isinstance(value, tuple) and len(value) < least):
            count = f"{len(value)} of at least {least}" if value else "none"
            raise ValueError(
                f"config.method={name!r} reads the {side}'s {field}, and config.{side} returns {count}; return "
                f"{field} in rkd_jax.models.Outputs, or take a network of rkd_jax.models"
            )
        found.append(value)
    return found[0], found[1]


def pairs(name: str, student: Outputs, teacher: Outputs, theirs: str = "features") -> list[tuple[Any, Any]]:
    """The maps of the student's stages, each with the teacher's; without the stem's, as every released code has it.

    Where one network has more stages, the last ones are paired: they are as far from the logits. `theirs` is the
    teacher's field: "features" or "preactivations". ValueError where a network returns no maps.
    """
    s, t = both(name, student, teacher, "features", theirs, least=2)
    count = min(len(s), len(t)) - 1
    return list(zip(s[-count:], t[-count:], strict=True))


def same_size(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both maps in the smaller's size, [B, H, W, K], [B, H', W', K'], along each axis the larger's averages."""
    size = tuple(map(min, s.shape[1:3], t.shape[1:3]))
    return pool(s, size), pool(t, size)


def pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """PyTorch's adaptive average pooling, [B, H, W, K] -> [B, *size, K], in float32 at least."""

    def averages(old: int, new: int) -> np.ndarray:
        rows = [(i * old // new, math.ceil((i + 1) * old / new)) for i in range(new)]
        return np.array([[(start <= j < end) / (end - start) for j in range(old)] for start, end in rows])

    return _resample(x, size, averages)


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """PyTorch's interpolation by the nearest, [B, H, W, K] -> [B, *size, K], in float32 at least."""
    return _resample(x, size, lambda old, new: np.eye(old)[np.arange(new) * old // new])


def _resample(x: jax.Array, size: tuple[int, int], matrix: Callable[[int, int], np.ndarray]) -> jax.Array:
    """x by a matrix along each side: its gradient is two products too, and no scatter."""
    x = losses.promote(x)
    if x.shape[1:3] == size:
        return x
    rows, columns = (jnp.asarray(matrix(old, new), x.dtype) for old, new in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwk,ih,jw->bijk", x, rows, columns, precision="highest")


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; 0, with a gradient of 0, where |x| is below 1e-12."""
    x = losses.promote(x)
    norm = losses.norm(x)[..., None]
    return jnp.where(norm > TINY, x / jnp.maximum(norm, TINY), 0.0)


class BatchNorm(nn.Module):
    """Batch normalisation by the batch at hand alone: what a method trains is never used but in training."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., K] -> [..., K]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        axes = tuple(range(x.ndim - 1))
        centred = x - x.mean(axes)
        return centred * (scale * jax.lax.rsqrt(jnp.square(centred).mean(axes) + EPSILON)) + bias


class Connector(nn.Module):
    """From a map to one of another's size: a convolution, batch normalisation and perhaps an activation."""

    features: int  # channels of the other map
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    inits: tuple[Initializer, Initializer] = (torch_default, transposed_default)  # of a convolution, of a transposed
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu

    @classmethod
    def between(cls, s: Any, t: Any, what: str, mend: str, padded: bool = False, **options: Any) -> "Connector":
        """The connector from a map [B, H, W, K] of the student, to one of the teacher; or the other way.

        A 3x3 convolution of stride 2 where the first has twice the side, a transposed 4x4 one where it has half.
        Otherwise a 3x3 one for the same side where padded, or one without padding, as large as the difference asks.
        ValueError, in the words `what`, both sizes and `mend`, where none of them leads there.
        """
        (height, width), (to_height, to_width), features = s.shape[1:3], t.shape[1:3], t.shape[-1]
        if (height, width) == (2 * to_height, 2 * to_width):
            return cls(features, (3, 3), stride=2, padding=1, **options)
        if (2 * height, 2 * width) == (to_height, to_width):
            return cls(features, (4, 4), stride=2, padding=2, transposed=True, **options)
        if padded and (height, width) == (to_height, to_width):
            return cls(features, (3, 3), padding=1, **options)
        if padded or height < to_height or width < to_width:
            raise ValueError(
                f"{what} of {height} x {width} in config.student and of {to_height} x {to_width} in config.teacher; "
                f"{mend}"
            )
        return cls(features, (1 + height - to_height, 1 + width - to_width), **options)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, K] -> [B, H', W', features]."""
        layer = nn.ConvTranspose if self.transposed else nn.Conv
        strides, padding = (self.stride,) * 2, ((self.padding,) * 2,) * 2
        init = self.inits[self.transposed]
        x = layer(self.features, self.kernel, strides, padding, use_bias=False, kernel_init=init)(x)
        x = BatchNorm()(x)
        return self.activation(x) if self.activation else x


def init(module: nn.Module, rng: jax.Array, *inputs: Any) -> Any:
    """The parameters of a module for inputs of these shapes (jax.ShapeDtypeStructs), of which nothing is computed."""
    return module.lazy_init(rng, *inputs)["params"]


def apply(module: nn.Module, params: Any, *inputs: jax.Array) -> Any:
    """What a module makes of its inputs."""
    return module.apply({"params": params}, *map(losses.promote, inputs))
