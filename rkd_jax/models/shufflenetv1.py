"""ShuffleNet (Zhang et al. 2018, arXiv:1707.01083) for small images: 3 groups, a 1x1 stem that keeps the side.

features: the stem, then the three stages, after the ReLU that ends them; preactivations: the same before it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models import Cuts, Outputs, layers
from rkd_jax.models.layers import Cut, head, shuffle

conv_bn = functools.partial(layers.conv_bn, init=layers.torch_default)


class Bottleneck(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; joined to the input by a sum or, at stride 2, side by side.

    The ReLU that follows is left to what calls it.
    """

    features: int  # of the output
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, K] -> [B, H / stride, W / stride, features]."""
        features = self.features - x.shape[-1] if self.stride == 2 else self.features
        middle = features // 4
        groups = 1 if x.shape[-1] == 24 else self.groups  # the stem's 24 channels are too few to group
        y = nn.relu(conv_bn(x, train, middle, ("conv1", "bn1"), kernel=1, groups=groups))
        y = shuffle(y, groups)
        y = nn.relu(conv_bn(y, train, middle, ("conv2", "bn2"), stride=self.stride, groups=middle))
        y = conv_bn(y, train, features, ("conv3", "bn3"), kernel=1, groups=self.groups)
        if self.stride == 2:  # PyTorch's average counts the padding
            shortcut = nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)), count_include_pad=True)
            return jnp.concatenate([y, shortcut], axis=-1)
        return y + x


class ShuffleNetV1(nn.Module):
    """A 24-channel stem and three stages, each of which halves the side."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    widths: tuple[int, ...] = (240, 480, 960)
    blocks: tuple[int, ...] = (4, 8, 4)
    groups: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        stem = Cut(0)(conv_bn(images.astype(self.dtype), train, 24, ("conv1", "bn1"), kernel=1))
        features, preactivations = [nn.relu(stem)], [stem]
        for stage, (blocks, width) in enumerate(zip(self.blocks, self.widths, strict=True), start=1):
            x = features[-1]
            for i in range(blocks):
                stride = 2 if i == 0 else 1
                preactivation = Bottleneck(width, stride, self.groups, name=f"layer{stage}_{i}")(x, train)
                if i == blocks - 1:
                    preactivation = Cut(stage)(preactivation)
                x = nn.relu(preactivation)
            features.append(x)
            preactivations.append(preactivation)
        logits, embedding, class_maps, x = head(x, self.num_classes, "linear")
        cuts = Cuts(preactivations, activated=False)
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


NETWORKS = {"ShuffleV1": ShuffleNetV1}
