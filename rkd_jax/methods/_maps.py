"""What the methods that compare feature maps share: pairs of maps, their sizes, and the layers they train."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import losses
from rkd_jax.models import Outputs
from rkd_jax.models.layers import EPSILON

TINY = 1e-12  # a norm below it is taken for 0


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
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        axes = tuple(range(x.ndim - 1))
        centred = x - x.mean(axes)
        return centred * (scale * jax.lax.rsqrt(jnp.square(centred).mean(axes) + EPSILON)) + bias


def init(module: nn.Module, rng: jax.Array, *inputs: Any) -> Any:
    """The parameters of a module for inputs of these shapes (jax.ShapeDtypeStructs), of which nothing is computed."""
    return module.lazy_init(rng, *inputs)["params"]


def apply(module: nn.Module, params: Any, *inputs: jax.Array) -> Any:
    """What a module makes of its inputs."""
    return module.apply({"params": params}, *map(losses.promote, inputs))
