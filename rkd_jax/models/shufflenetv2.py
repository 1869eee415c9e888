"""ShuffleNetV2 (Ma et al. 2018, arXiv:1807.11164) for small images: width 1, a 1x1 stem that keeps the side.

features: the stem, then the three stages' shuffled outputs, every channel after a ReLU; preactivations: the same, the
channels that the last block computed before theirs (the others passed through it).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models import Cuts, Outputs, layers
from rkd_jax.models.layers import Cut, head, shuffle

conv_bn = functools.partial(layers.conv_bn, init=layers.torch_default)


class BasicBlock(nn.Module):
    """Passes half of the channels through, transforms the other half, shuffles."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, K] -> twice [B, H, W, K]: after the ReLU, and before."""
        passed, y = jnp.split(x, 2, axis=-1)
        half = y.shape[-1]
        y = nn.relu(conv_bn(y, train, half, ("conv1", "bn1"), kernel=1))
        y = conv_bn(y, train, half, ("conv2", "bn2"), groups=half)
        y = conv_bn(y, train, half, ("conv3", "bn3"), kernel=1)
        preactivation = shuffle(jnp.concatenate([passed, y], axis=-1), 2)
        return nn.relu(preactivation), preactivation  # what passed is not negative: the ReLU leaves it alone


class DownBlock(nn.Module):
    """Halves the side and sets the channels: two branches of the whole input, side by side, shuffled."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, K] -> [B, H / 2, W / 2, features]."""
        channels, half = x.shape[-1], self.features // 2
        left = conv_bn(x, train, channels, ("conv1", "bn1"), stride=2, groups=channels)
        left = nn.relu(conv_bn(left, train, half, ("conv2", "bn2"), kernel=1))
        right = nn.relu(conv_bn(x, train, half, ("conv3", "bn3"), kernel=1))
        right = conv_bn(right, train, half, ("conv4", "bn4"), stride=2, groups=half)
        right = nn.relu(conv_bn(right, train, half, ("conv5", "bn5"), kernel=1))
        return shuffle(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """A 24-channel stem, three stages, each of which halves the side, and a 1x1 convolution to 1024 channels."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    widths: tuple[int, ...] = (116, 232, 464)
    blocks: tuple[int, ...] = (3, 7, 3)  # after the stage's DownBlock

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        stem = conv_bn(images.astype(self.dtype), train, 24, ("conv1", "bn1"), kernel=1)
        features, preactivations = [Cut(0)(nn.relu(stem))], [stem]
        for stage, (blocks, width) in enumerate(zip(self.blocks, self.widths, strict=True), start=1):
            x = DownBlock(width, name=f"layer{stage}_0")(features[-1], train)
            for i in range(blocks):
                x, preactivation = BasicBlock(name=f"layer{stage}_{i + 1}")(x, train)
            if stage < 3:
                x = Cut(stage)(x)
            features.append(x)
            preactivations.append(preactivation)
        x = Cut(3)(nn.relu(conv_bn(x, train, 1024, ("conv2", "bn2"), kernel=1)))
        cuts = Cuts([*features[:-1], x], activated=True)
        logits, embedding, class_maps, x = head(x, self.num_classes, "linear")
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


NETWORKS = {"ShuffleV2": ShuffleNetV2}
