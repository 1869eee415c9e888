"""Networks of a block or two, for tests of what any network would show: most of their time is its compilation."""

import flax.linen as nn
import jax.numpy as jnp

from rkd_jax.models.resnet import ResNet


def create(num_classes, dtype=jnp.float32):
    return ResNet(num_classes, dtype=dtype, blocks=(1,), widths=(8, 8))


def two_stages(num_classes):
    return ResNet(num_classes, blocks=(1, 1), widths=(8, 8, 8))


class Plain(nn.Module):
    """Without batch normalisation, and so with parameters alone."""

    num_classes: int
    outputs: int = 0  # of the last layer; 0: as many as classes

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(images)).mean((1, 2))
        return nn.Dense(self.outputs or self.num_classes, name="head")(x)[:, : self.num_classes]


def of_16_outputs(num_classes):
    return Plain(num_classes, outputs=16)
