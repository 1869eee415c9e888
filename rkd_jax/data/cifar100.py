"""CIFAR-100 (Krizhevsky, 2009), by TFDS's own `cifar100` builder: 50,000 + 10,000 RGB images of 32x32, 100 classes."""

from rkd_jax.data import _prepared
from rkd_jax.data.base import Splits

FORM = (32, 32, 3), 100  # of an image, and the number of classes
MEAN = (0.5071, 0.4867, 0.4408)  # as RepDistiller and mdistiller normalise
STD = (0.2675, 0.2565, 0.2761)


def load(data_dir: str = "") -> Splits:
    """CIFAR-100 from the prepared set, or its decoded cache, under `data_dir`."""
    return _prepared.load("cifar100", data_dir)._replace(mean=MEAN, std=STD)
