"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv:1605.07146): wrn_DEPTH_WIDTH, pre-activation blocks.

A pre-activation network ends no stage with an activation. features are the stages' sums, the stem's output first, as
PyTorch zoos tap them; preactivations are these after the batch normalisation that opens what comes next.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models import Cuts, Outputs
from rkd_jax.models.layers import BatchNorm, Cut, conv, conv_bn, head


class Block(nn.Module):
    """x + two 3x3 convolutions of relu(bn1(x)); a shortcut that changes channels reads relu(bn1(x)) too."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, K] -> the sum [B, H / stride, W / stride, features], and bn1(x)."""
        preactivation = BatchNorm(name="bn1")(x, train)
        activated = nn.relu(preactivation)
        y = nn.relu(conv_bn(activated, train, self.features, ("conv1", "bn2"), stride=self.stride))
        y = conv(y, self.features, "conv2")
        if x.shape[-1] != self.features:
            x = conv(activated, self.features, "convShortcut", kernel=1, stride=self.stride)
        return x + y, preactivation


class WideResNet(nn.Module):
    """A 16-channel stem and three stages of `blocks` blocks, of 16, 32 and 64 times `width` channels."""

    num_classes: int
    blocks: int  # per stage
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K], normalised; train: use and update the batch statistics."""
        x = Cut(0)(conv(images.astype(self.dtype), 16, "conv1"))
        features, preactivations = [x], []
        for stage, channels in enumerate((16, 32, 64), start=1):
            for i in range(self.blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                x, before = Block(channels * self.width, stride, name=f"block{stage}_layer_{i}")(x, train)
                if i == 0:
                    preactivations.append(before)
            if stage < 3:
                x = Cut(stage)(x)
            features.append(x)
        preactivations.append(Cut(3)(BatchNorm(name="bn1")(x, train)))
        logits, embedding, class_maps, x = head(nn.relu(preactivations[-1]), self.num_classes, "fc", zero_bias=True)
        cuts = Cuts([*features[:-1], preactivations[-1]], activated=False)
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


NETWORKS = {
    f"wrn_{depth}_{width}": functools.partial(WideResNet, blocks=(depth - 4) // 6, width=width)
    for depth in (16, 40)
    for width in (1, 2)
}
