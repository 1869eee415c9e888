"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) in the two forms that distillation papers use.

MobileNetV2: half width, a 3x3 stem of stride 2, ReLU, no biases; the CIFAR-100 student. MobileNetV2_64x64: full width,
a 1x1 stem with padding 1 (so 64x64 becomes 66x66), ReLU6, biases, a 1x1 convolution as the classifier; the
Tiny-ImageNet student.

features: the stem after its activation, and bottlenecks' outputs: of stages 2, 3, 5, 7, or at 64x64 of stages 2, 3, 4
and then the last convolution after its activation. A bottleneck ends linearly (no activation follows), so that features
and preactivations are the same map there; at the stem and the last convolution they are its two sides.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.losses import promote
from rkd_jax.models import Cuts, Outputs, layers
from rkd_jax.models.layers import Cut, conv_bn, head


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1; plus the input where the shapes agree."""

    features: int
    expansion: int
    stride: int
    prefix: str  # of the six layers, in PyTorch's keys
    activation: Callable[[jax.Array], jax.Array]
    convolve: Callable[..., jax.Array]  # a convolution and its batch normalisation

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, K] -> [B, H / stride, W / stride, features]."""
        wide = x.shape[-1] * self.expansion
        names = [(f"{self.prefix}_{i}", f"{self.prefix}_{i + 1}") for i in (0, 3, 6)]
        convolve, act = functools.partial(self.convolve, train=train), self.activation
        y = act(convolve(x, features=wide, names=names[0], kernel=1))
        y = act(convolve(y, features=wide, names=names[1], stride=self.stride, groups=wide))
        y = convolve(y, features=self.features, names=names[2], kernel=1)
        return x + y if x.shape == y.shape and self.stride == 1 else y


class MobileNetV2(nn.Module):
    """The half-width form: 32x32 images, but any size will do."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        stem = Cut(0)(conv_bn(images.astype(self.dtype), train, 16, ("conv1_0", "conv1_1"), stride=2))
        x = nn.relu(stem)
        features, preactivations = [x], [stem]
        stages = (
            (1, 8, 1, 1),
            (6, 12, 2, 1),
            (6, 16, 3, 2),
            (6, 32, 4, 2),
            (6, 48, 3, 1),
            (6, 80, 3, 2),
            (6, 160, 1, 1),
        )
        for stage, (expansion, channels, blocks, stride) in enumerate(stages):
            for i in range(blocks):
                block = InvertedResidual(
                    channels, expansion, stride if i == 0 else 1, "conv", nn.relu, conv_bn, name=f"blocks_{stage}_{i}"
                )
                x = block(x, train)
            if stage in (1, 2, 4, 6):
                if stage < 6:
                    x = Cut(len(features))(x)
                features.append(x)
                preactivations.append(x)
        last = Cut(4)(conv_bn(x, train, 1280, ("conv2_0", "conv2_1"), kernel=1))
        cuts = Cuts([*preactivations[:-1], last], activated=False)
        logits, embedding, class_maps, x = head(nn.relu(last), self.num_classes, "classifier_0", std=0.01)
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


def _biased_conv_bn(x: jax.Array, train: bool, features: int, names: tuple[str, str], **options) -> jax.Array:
    """A convolution with PyTorch's default weights and bias, and its batch normalisation."""
    kernel, groups = options.get("kernel", 3), options.get("groups", 1)
    bias_init = layers.torch_default_bias(kernel * kernel * x.shape[-1] // groups)
    return conv_bn(x, train, features, names, init=layers.torch_default, bias_init=bias_init, **options)


class MobileNetV2At64(nn.Module):
    """The full-width form of Tiny-ImageNet."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        stem = Cut(0)(_biased_conv_bn(images.astype(self.dtype), train, 32, ("pre_0", "pre_1"), kernel=1, padding=1))
        x = nn.relu6(stem)
        features, preactivations = [x], [stem]
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 1),
            (6, 320, 1, 1),
        )
        for stage, (expansion, channels, blocks, stride) in enumerate(stages, start=1):
            for i in range(blocks):
                name = f"stage{stage}_{i}" if blocks > 1 else f"stage{stage}"
                block = InvertedResidual(
                    channels, expansion, stride if i == 0 else 1, "residual", nn.relu6, _biased_conv_bn, name=name
                )
                x = block(x, train)
            if stage in (2, 3, 4):
                x = Cut(stage - 1)(x)
                features.append(x)
                preactivations.append(x)
        last = Cut(4)(_biased_conv_bn(x, train, 1280, ("conv1_0", "conv1_1"), kernel=1))
        x = Cut(layers.LAST)(promote(nn.relu6(last)))
        embedding = x.mean((1, 2))
        bias_init = layers.torch_default_bias(1280)
        with jax.default_matmul_precision("highest"):  # as in layers.head
            logits = layers.conv(
                embedding[:, None, None],
                self.num_classes,
                "conv2",
                kernel=1,
                init=layers.torch_default,
                bias_init=bias_init,
            )
            classifier = self.variables["params"]["conv2"]
            class_maps = x @ classifier["kernel"][0, 0] + classifier["bias"]
        preactivations.append(last)
        cuts = Cuts(preactivations, activated=False)
        return Outputs.of(logits[:, 0, 0], [*features, x], embedding, preactivations, class_maps, x, cuts)


NETWORKS = {"MobileNetV2": MobileNetV2, "MobileNetV2_64x64": MobileNetV2At64}
