"""What every data set returns."""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # uint8 [N, H, W, C]; may be memory-mapped, read-only
    labels: np.ndarray  # int32 [N]


class Splits(NamedTuple):
    """A data set: what is trained on, what is reported, and the normalisation."""

    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # per channel, of 0..1
    std: tuple[float, ...]  # per channel, of 0..1
    class_names: tuple[str, ...] = ()  # in the order of the labels; (): not known


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of 0..1, from exact counts; uint8 [N, H, W, C]."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 4096):  # bounded memory, for memory-mapped sets
        block = images[start : start + 4096].reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(block[:, channel], minlength=256)
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return tuple(mean.tolist()), tuple(np.maximum(np.sqrt(variance), 1 / 255).tolist())


def hold_out(split: Split, field: str, every: int = 10) -> tuple[Split, Split]:
    """Training and test images of a set without a test split, which gets one of `every` images of each class."""
    held_out = np.zeros(len(split.labels), bool)
    for label in np.unique(split.labels):
        held_out[np.flatnonzero(split.labels == label)[every - 1 :: every]] = True
    if not held_out.any():
        raise ValueError(
            f"{field}: no class has {every} images, so that none can be held out for testing; add test images"
        )
    train, test = (Split(split.images[chosen], split.labels[chosen]) for chosen in (~held_out, held_out))
    return train, test
