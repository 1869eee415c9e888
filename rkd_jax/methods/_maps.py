"""What the methods that compare feature maps share: pairs of maps, their sizes, and the layers they train."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import losses
from rkd_jax.models import Outputs
from rkd_jax.models.layers import EPSILON

TINY = 1e-12  # the least norm that `unit` divides by


def pairs(name: str, student: Outputs, teacher: Outputs, kind: str = "features") -> list[tuple[Any, Any]]:
    """The maps of the student's stages, each with the teacher's; without the stem's, as every released code has it.

    Where one network has more stages, the last ones are paired: they are as far from the logits. `kind` is the
    teacher's: "features" or "preactivations". ValueError where a network returns no maps.
    """
    ours, theirs = student.features[1:], getattr(teacher, kind)[1:]
    for field, maps in (("config.student", ours), ("config.teacher", theirs)):
        if not maps:
            raise ValueError(
                f"config.method={name!r} compares feature maps, and {field} returns none behind its stem; return them "
                "in rkd_jax.models.Outputs, or take a network of rkd_jax.models"
            )
    count = min(len(ours), len(theirs))
    return list(zip(ours[-count:], theirs[-count:], strict=True))


def same_side(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both maps with the sides of the smaller, the larger averaged; [B, H, W, K], [B, H', W', K'] -> the same ranks."""
    return pool(s, min(s.shape[1], t.shape[1])), pool(t, min(s.shape[1], t.shape[1]))


def pool(x: jax.Array, side: int) -> jax.Array:
    """PyTorch's adaptive average pooling, [B, H, W, K] -> [B, side, side, K], in float32 at least."""

    def averages(size: int) -> np.ndarray:
        rows = [(i * size // side, math.ceil((i + 1) * size / side)) for i in range(side)]
        return np.array([[(start <= j < end) / (end - start) for j in range(size)] for start, end in rows])

    return _resample(x, averages(x.shape[1]), averages(x.shape[2]))


def nearest(x: jax.Array, side: int) -> jax.Array:
    """PyTorch's interpolation by the nearest, [B, H, W, K] -> [B, side, side, K], in float32 at least."""

    def selection(size: int) -> np.ndarray:
        return np.eye(size)[np.arange(side) * size // side]

    return _resample(x, selection(x.shape[1]), selection(x.shape[2]))


def _resample(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x by a matrix along each side: its gradient is two products too, and no scatter."""
    x = losses.promote(x)
    if len(rows) == x.shape[1] and len(columns) == x.shape[2]:  # the same sides: nothing to do
        return x
    rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in (rows, columns))
    return jnp.einsum("bhwk,ih,jw->bijk", x, rows, columns, precision="highest")


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, whose gradient at 0 is 0."""
    x = losses.promote(x)
    return x / jnp.maximum(losses.norm(x), TINY)[..., None]


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
