"""Networks of a block or two, for tests of what any network would show: most of their time is its compilation."""

from rkd_jax.models.resnet import ResNet


def create(num_classes):
    return ResNet(num_classes, blocks=(1,), widths=(8, 8))


def two_stages(num_classes):
    return ResNet(num_classes, blocks=(1, 1), widths=(8, 8, 8))
