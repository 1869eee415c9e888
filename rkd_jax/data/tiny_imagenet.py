"""Tiny-ImageNet-200 (Stanford CS231n, 2015): 100,000 training and 10,000 validation images of 64x64, 200 classes.

`python -m rkd_jax.data tiny_imagenet --data_dir DIR --archive tiny-imagenet-200.zip` prepares it from an archive.
"""

from rkd_jax.data import _prepared
from rkd_jax.data.base import Splits

FORM = (64, 64, 3), 200  # of an image, and the number of classes
MEAN = (0.4802, 0.4481, 0.3975)  # as is common for this set
STD = (0.2302, 0.2265, 0.2262)


def load(data_dir: str = "") -> Splits:
    """Tiny-ImageNet; the validation images, whose labels are public, are the test split, as everybody reports them."""
    return _prepared.load("tiny_imagenet", data_dir)._replace(mean=MEAN, std=STD)
