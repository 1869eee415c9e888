"""The layers that every family shares, with PyTorch's conventions, so that its checkpoints mean the same here.

Called inside a compact method. Names follow PyTorch's keys with "_" for ".": `layer1_0/conv1/kernel` is
`layer1.0.conv1.weight`, and that rule is all that conversion needs. The input's dtype is the compute dtype; parameters,
batch normalisation and the classifier stay float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from rkd_jax.losses import promote
from rkd_jax.models._conv import conv_general_dilated

EPSILON = 1e-5  # of batch normalisation
BN_MOMENTUM = 0.9  # of its running averages, at each update
LAST = -1  # the `Cut` before the global average
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015; N(0, 2 / (k * k * out))
torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's: U(-1/sqrt(in), 1/sqrt(in))


def torch_default_bias(fan_in: int) -> Initializer:
    """PyTorch's default for the bias of a layer with `fan_in` inputs an output: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, as PyTorch's BatchNorm2d: eps 1e-5, momentum 0.1 of the new.

    Normalises by the biased batch variance and averages the unbiased one, which Flax's own does not. Computed in
    float32, returned in the input's dtype. Without statistics it is the affine map that `rkd_jax.models.fold` leaves.
    """

    follows: str = ""  # the sibling convolution whose output goes here and nowhere else, so that it may be folded

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> [..., C]; train: normalise by the batch's statistics and update the running ones."""
        if self._is_folded():
            scale, bias = (self.get_variable("params", name) for name in ("scale", "bias"))
            if scale is not None:
                return (promote(x) * scale + bias).astype(x.dtype)
            return x if bias is None else x + bias.astype(x.dtype)  # which a GPU's convolution takes along
        shape = x.shape[-1:]
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if train:
            y, mean, var = _normalize(x, scale, bias, around=running_mean.value)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = BN_MOMENTUM * running_mean.value + (1 - BN_MOMENTUM) * mean
                running_var.value = BN_MOMENTUM * running_var.value + (1 - BN_MOMENTUM) * unbiased
        else:
            rate = jax.lax.rsqrt(running_var.value + EPSILON)
            y = ((promote(x) - running_mean.value) * (scale * rate) + bias).astype(x.dtype)
        return y

    def _is_folded(self) -> bool:
        return not self.is_initializing() and not self.has_variable("batch_stats", "mean")


@jax.custom_vjp
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, around: jax.Array) -> tuple[jax.Array, ...]:
    """(y, mean, biased variance) by the moments of each channel, of one pass: of x - around, so that nothing cancels.

    `around` [C] is a value near the mean, a constant. The gradient is in closed form: two sums over x's elements
    where differentiation line by line takes three, and x is all that it keeps.
    """
    return _normalize_forward(x, scale, bias, around)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, around: jax.Array) -> tuple[Any, Any]:
    axes = tuple(range(x.ndim - 1))
    centred = promote(x) - around
    mean = centred.mean(axes)
    var = jnp.maximum(jnp.square(centred).mean(axes) - jnp.square(mean), 0.0)
    rate = jax.lax.rsqrt(var + EPSILON)
    y = (centred - mean) * (scale * rate) + bias
    return (y.astype(x.dtype), mean + around, var), (x, scale, around, mean, rate)


def _normalize_backward(kept: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """dL/dx is linear in dy and x, channel by channel (Ioffe and Szegedy 2015, Section 3)."""
    (x, scale, around, mean, rate), (dy, dmean, dvar) = kept, cotangents
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    centred, dy = promote(x) - around, promote(dy)
    dbias = jax.lax.optimization_barrier(dy.sum(axes))  # else XLA sums dy a second time, over batches side by side too
    dscale = rate * ((dy * centred).sum(axes) - mean * dbias)
    slope = (2 * dvar - scale * jnp.square(rate) * dscale) / count
    constant = (dmean - scale * rate * dbias) / count
    dx = dy * (scale * rate) + (centred - mean) * slope + constant
    return dx.astype(x.dtype), dscale, dbias, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


class Cut(nn.Module):
    """Where a network hands a map on, as it is, and where `rkd_jax.models.resume` puts another in its place."""

    stage: int  # of the map, 0 for the stem's; LAST for the one that the global average reads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x."""
        return x


def in_turn(before: Any, after: Any) -> Any:
    """Running averages after several batches in turn, from those after each alone, [V, ...], and those before."""

    def one(before: jax.Array, after: jax.Array) -> jax.Array:
        total = before
        for each in after:
            total = each + BN_MOMENTUM * (total - before)
        return total

    return jax.tree.map(one, before, after)


def conv(
    x: jax.Array,
    features: int,
    name: str,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    padding: int | None = None,
    init: Initializer = kaiming_normal,
    bias_init: Initializer | None = None,
) -> jax.Array:
    """A square convolution, NHWC; padding of every side (default: kernel // 2), not Flax's SAME at stride 2."""
    padding = kernel // 2 if padding is None else padding
    layer = nn.Conv(
        features, (kernel, kernel), strides=stride, padding=padding, feature_group_count=groups, dtype=x.dtype,
        use_bias=bias_init is not None, kernel_init=init, bias_init=bias_init or nn.initializers.zeros, name=name,
        conv_general_dilated=conv_general_dilated,
    )  # fmt: skip
    return layer(x)


def conv_bn(x: jax.Array, train: bool, features: int, names: tuple[str, str], **options) -> jax.Array:
    """A convolution and its batch normalisation, `names` in this order; the options are `conv`'s."""
    return BatchNorm(follows=names[0], name=names[1])(conv(x, features, names[0], **options), train)


def head(
    x: jax.Array, num_classes: int, name: str, std: float | None = None, zero_bias: bool = False
) -> tuple[jax.Array, ...]:
    """The end of a network: [B, H, W, D] -> logits [B, C], embedding [B, D], class maps [B, H, W, C], all float32, and
    the map itself.

    The embedding is the global average, the logits are the classifier's. The class maps are the classifier at each
    position, so that their average is the logits (Zhou et al. 2016, arXiv:1512.04150). Weights N(0, std) and bias 0, or
    PyTorch's default (std None), of which zero_bias leaves the bias out.
    """
    kernel_init = torch_default if std is None else nn.initializers.normal(std)
    bias_init = nn.initializers.zeros if zero_bias or std is not None else torch_default_bias(x.shape[-1])
    classifier = nn.Dense(num_classes, kernel_init=kernel_init, bias_init=bias_init, name=name)
    x = Cut(LAST)(promote(x))
    embedding = x.mean((1, 2))
    with jax.default_matmul_precision("highest"):  # not TF32's on a GPU, nor bfloat16's on a TPU
        logits, weights = classifier(embedding), classifier.variables["params"]
        return logits, embedding, x @ weights["kernel"] + weights["bias"], x


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleaves the channels of `groups` groups (Zhang et al. 2018, ShuffleNet)."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)
