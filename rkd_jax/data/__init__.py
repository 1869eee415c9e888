"""Data sets as uint8 arrays, one file each; the file's name is the data set's.

>>> splits = load("digits", num_train=100)
>>> splits.train.images.shape, splits.num_classes
((100, 8, 8, 1), 10)

A data set's file has `load(data_dir) -> Splits`. Besides, "tfds:NAME" is any image classification set of TFDS and
"folder:PATH" a folder of class sub-folders. `python -m rkd_jax.data NAME` prepares a set ahead of the first run.
"""

import difflib
import functools
import importlib
import os
import pkgutil

import numpy as np

from rkd_jax.data import _folder, _prepared
from rkd_jax.data.base import Split, Splits, moments

__all__ = ["Split", "Splits", "load", "names", "random", "subset"]


@functools.cache
def names() -> tuple[str, ...]:
    """The data sets of this package, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if name not in ("augment", "base") and not name.startswith("_")))


def load(
    name: str,
    data_dir: str = "",
    num_train: int | None = None,
    num_test: int | None = None,
    image_size: int | None = None,
) -> Splits:
    """A data set by name, whole or `num_train` and `num_test` images of it (see `subset`).

    `data_dir` is TFDS's: it holds <name>/<version>/; "" means $TFDS_DATA_DIR or ~/tensorflow_datasets. `image_size` is
    read by "tfds:" and "folder:" alone: the side in pixels to which every image is resized (None: images of unequal
    size are resized to 64, others stay as they are). ValueError for a wrong name or number, FileNotFoundError, at
    once, for data that is neither here nor to be had.
    """
    kind, colon, argument = name.partition(":")
    if colon and kind in ("tfds", "folder"):
        if name == "tfds:":
            raise ValueError("config.dataset='tfds:' names no set; write tfds:NAME")
        if kind == "tfds":
            splits = _prepared.load(argument, data_dir, image_size)
        else:
            splits = _folder.load(argument, image_size)
    elif name in names():
        _check_size(name, image_size)
        splits = importlib.import_module(f"{__name__}.{name}").load(data_dir)
    else:
        if os.path.isdir(name):
            raise ValueError(f"config.dataset={name!r} is no data set, but a folder; write 'folder:{name}'")
        near = difflib.get_close_matches(name.lower().replace("-", ""), names(), n=1)
        raise ValueError(
            f"config.dataset={name!r} is no data set"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are {', '.join(names())}, tfds:NAME for a set of TFDS"
            + (f" (tfds:{name}, if that is one)" if name and not colon else "")
            + " and folder:PATH for images of your own."
        )
    return splits._replace(
        train=subset(splits.train, num_train, f"config.num_train={num_train}", f"training images of {name}"),
        test=subset(splits.test, num_test, f"config.num_test={num_test}", f"test images of {name}"),
    )


def _check_size(name: str, image_size: int | None) -> None:
    if image_size is not None:
        raise ValueError(f"config.image_size={image_size} is read by tfds: and folder: alone, not by {name!r}")


def subset(split: Split, count: int | None, field: str = "count", what: str = "images") -> Split:
    """`count` images of a split, the same ones every time and in the split's order; None: all of them.

    The first image of every class comes first, then every class's second and so on, so that class counts differ by
    at most one as long as no class runs out. A split without images stays as it is. `field` and `what` word the
    ValueError for a count that does not fit.
    """
    if count is None or not len(split.labels):
        return split
    if count < 1:
        raise ValueError(f"{field} is not positive; raise it, or leave it None for all {len(split.labels)} {what}")
    if count > len(split.labels):
        raise ValueError(f"{field} exceeds the {len(split.labels)} {what}; lower it, or leave it None for all of them")
    order = np.argsort(split.labels, kind="stable")
    in_order = split.labels[order]
    rank = np.empty(len(order), np.int64)  # of an image among those of its class
    rank[order] = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    chosen = np.sort(np.lexsort((split.labels, rank))[:count])
    return Split(np.asarray(split.images[chosen]), split.labels[chosen])


def form(name: str) -> tuple[tuple[int, int, int], int] | None:
    """The image shape and the number of classes that a data set's file states as its FORM; None where none does."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), "FORM", None) if name in names() else None


def random(name: str, num_train: int, num_test: int, image_size: int | None = None, data_dir: str = "") -> Splits:
    """Noise in the form of a data set, for smoke runs: the same every time, and nothing need be prepared.

    A data set without a `form` is loaded, and has no more images than there are.
    """
    if (known := form(name)) is None:
        whole = load(name, data_dir, image_size=image_size)
        train, test = (
            subset(split, min(count, len(split.labels)))
            for split, count in ((whole.train, num_train), (whole.test, num_test))
        )
        return whole._replace(train=train, test=test)
    _check_size(name, image_size)
    shape, num_classes = known
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = generator.integers(0, 256, (count, *shape), np.uint8)
        return Split(images, np.arange(count, dtype=np.int32) % num_classes)

    train, test = split(num_train), split(num_test)
    return Splits(train, test, num_classes, *moments(train.images))
