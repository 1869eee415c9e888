"""A network of one block, for tests of what does not depend on the network: most of their time is its compilation."""

from rkd_jax.models.resnet import ResNet


def create(num_classes):
    return ResNet(num_classes, blocks=(1,), widths=(8, 8))
