"""scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998): 1,797 grey images of 8x8, 10 classes, no download.

Levels 0..16 are scaled to 0..255. Every fifth image of each class, in the set's order, is a test image: 1,442 for
training, 355 for testing.
"""

import numpy as np

from rkd_jax.data.base import Split, Splits, hold_out, moments


def load(data_dir: str = "") -> Splits:
    """The digits; `data_dir` is not needed, they come with scikit-learn."""
    del data_dir
    from sklearn.datasets import load_digits  # here: half a second that the other sets need not pay

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(Split(images, labels.astype(np.int32)), "config.dataset='digits'", every=5)
    return Splits(train, test, 10, *moments(train.images), tuple("0123456789"))
