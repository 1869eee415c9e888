"""Residual networks (He et al. 2016, arXiv:1512.03385) with a CIFAR stem: one 3x3 convolution, no pooling.

resnet8 ... resnet110 are the paper's CIFAR networks of depth 6n + 2; resnet8x4 and resnet32x4 have four times the
channels behind a 32-channel stem. ResNet18 ... ResNet101 are the paper's ImageNet networks on that stem.

features: the stem, then every stage, after the ReLU that ends it; preactivations: the same sums before that ReLU.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models import Cuts, Outputs
from rkd_jax.models.layers import Cut, conv_bn, head


class BasicBlock(nn.Module):
    """relu(x + two 3x3 convolutions of x); returns it and its preactivation."""

    features: int  # of the output
    stride: int
    shortcut: str  # the shortcut's name in PyTorch's keys

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, K] -> twice [B, H / stride, W / stride, features]."""
        y = nn.relu(conv_bn(x, train, self.features, ("conv1", "bn1"), stride=self.stride))
        y = conv_bn(y, train, self.features, ("conv2", "bn2"))
        return _join(x, y, train, self.stride, self.shortcut)


class Bottleneck(nn.Module):
    """relu(x + 1x1, 3x3 and 1x1 convolutions of x, through a quarter of the channels); stride on the 3x3."""

    features: int  # of the output
    stride: int
    shortcut: str  # the shortcut's name in PyTorch's keys

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, K] -> twice [B, H / stride, W / stride, features]."""
        y = nn.relu(conv_bn(x, train, self.features // 4, ("conv1", "bn1"), kernel=1))
        y = nn.relu(conv_bn(y, train, self.features // 4, ("conv2", "bn2"), stride=self.stride))
        y = conv_bn(y, train, self.features, ("conv3", "bn3"), kernel=1)
        return _join(x, y, train, self.stride, self.shortcut)


def _join(x: jax.Array, y: jax.Array, train: bool, stride: int, name: str) -> tuple[jax.Array, jax.Array]:
    if stride != 1 or x.shape[-1] != y.shape[-1]:
        x = conv_bn(x, train, y.shape[-1], (f"{name}_0", f"{name}_1"), kernel=1, stride=stride)
    return nn.relu(x + y), x + y


class ResNet(nn.Module):
    """A stem and stages of residual blocks; every stage but the first halves the side."""

    num_classes: int
    blocks: tuple[int, ...]  # per stage
    widths: tuple[int, ...]  # channels of the stem, then of every stage's output
    block: type[nn.Module] = BasicBlock
    shortcut: str = "downsample"
    head: str = "fc"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        stem = conv_bn(images.astype(self.dtype), train, self.widths[0], ("conv1", "bn1"))
        features, preactivations = [Cut(0)(nn.relu(stem))], [stem]
        for stage, (blocks, width) in enumerate(zip(self.blocks, self.widths[1:], strict=True), start=1):
            x = features[-1]
            for i in range(blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                x, preactivation = self.block(width, stride, self.shortcut, name=f"layer{stage}_{i}")(x, train)
            features.append(Cut(stage)(x))
            preactivations.append(preactivation)
        logits, embedding, class_maps, x = head(features[-1], self.num_classes, self.head)
        cuts = Cuts(features, activated=True)
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


def _cifar(depth: int, widths: tuple[int, ...]):
    return functools.partial(ResNet, blocks=((depth - 2) // 6,) * 3, widths=widths)


def _imagenet(block: type[nn.Module], blocks: tuple[int, ...], expansion: int):
    widths = (64, *(width * expansion for width in (64, 128, 256, 512)))
    return functools.partial(ResNet, blocks=blocks, widths=widths, block=block, shortcut="shortcut", head="linear")


NETWORKS = {
    **{f"resnet{depth}": _cifar(depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _cifar(depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "ResNet18": _imagenet(BasicBlock, (2, 2, 2, 2), 1),
    "ResNet34": _imagenet(BasicBlock, (3, 4, 6, 3), 1),
    "ResNet50": _imagenet(Bottleneck, (3, 4, 6, 3), 4),
    "ResNet101": _imagenet(Bottleneck, (3, 4, 23, 3), 4),
}
