"""Any image classification set of TFDS: prepared once, read without TensorFlow, kept decoded as uint8 arrays.

A prepared set lies in DATA_DIR/NAME/VERSION/ (with a config: NAME/CONFIG/VERSION/). Its decoded cache lies beside it in
VERSION.uint8/ (VERSION-SIZE.uint8/ where an image size is asked for), or in $XDG_CACHE_HOME/rkd_jax/ (default
~/.cache/rkd_jax/) where that folder cannot be written. A cache is five files, memory-mapped at every later start; a
folder that holds nothing else is enough to train from.
"""

import contextlib
import difflib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from rkd_jax import _files
from rkd_jax.data import _cache
from rkd_jax.data.base import Split, Splits, hold_out, moments

SIZE = 64  # pixels: the side to which images of unequal size are resized


def load(name: str, data_dir: str = "", image_size: int | None = None) -> Splits:
    """A set of TFDS ("mnist", "name/config", "name:version") or of ours ("tiny_imagenet"), from the nearest of: its
    decoded cache, its prepared files, a download.

    The test split is "test", else "validation" (TFDS's sets whose test labels are public, and the rest), else every
    tenth image of "train". Mean and std are those of the training split. FileNotFoundError if there is nothing to
    load, ModuleNotFoundError if decoding or preparing lacks a package, ValueError if the set is none of images with
    one class each.
    """
    name, _, version = name.partition(":")
    root = folder(data_dir)
    source = _newest(root / name, version)
    if source is None and (there := sorted({path.parts[-3] for path in root.glob(f"{name}/*/*/dataset_info.json")})):
        raise ValueError(_choose(name, there))
    caches = _caches(root, name, source, version, image_size)
    for cache in caches:
        splits = _cache.read(cache, name, source and _fingerprint(source), image_size)
        if splits is not None:
            names = splits.class_names or (_class_names(source, splits.num_classes) if source else ())
            return splits._replace(class_names=names)
    if source is None:
        if image_size and any(_cache.read(cache, name) for cache in _caches(root, name, None, version, None)):
            raise ValueError(
                f"config.image_size={image_size}: config.data_dir={str(root)!r} holds {name} decoded and at its own "
                "size alone; to resize it takes the prepared set. Unset config.image_size, or name a folder that has it"
            )
        source = prepare(name, root, version)
        caches = _caches(root, name, source, version, image_size)
    return _cache.keep(caches, name, source.name, _fingerprint(source), _decode(name, source, image_size))


# Where things lie.


def folder(data_dir: str) -> Path:
    """TFDS's folder: `data_dir`, or its default."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def _newest(parent: Path, version: str) -> Path | None:
    """The newest (or the named) version of a prepared set in `parent`."""
    return max((path.parent for path in parent.glob(f"{version or '*'}/dataset_info.json")), key=_version, default=None)


def _version(path: Path) -> list[int]:
    """What versions are sorted by: 10.0.0 is newer than 9.0.0."""
    return [int(part) for part in path.name.partition("-")[0].split(".") if part.isdigit()]


def _caches(root: Path, name: str, source: Path | None, version: str, image_size: int | None) -> list[Path]:
    """The folders where the decoded cache may lie, the preferred first."""
    suffix = f"-{image_size}.uint8" if image_size else ".uint8"
    if source is None:  # only a cache, or nothing: DATA_DIR/NAME/VERSION.uint8, or DATA_DIR is the cache itself
        found = [each for each in (root / name).glob(f"{version or '*'}{suffix}") if image_size or "-" not in each.name]
        return [*sorted(found, key=_version, reverse=True), root]
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]  # two sets of one name never meet
    return [
        source.with_name(source.name + suffix),
        _files.cache() / f"{name.replace('/', '-')}-{source.name}-{key}{suffix}",
    ]


def _fingerprint(source: Path) -> str:
    """Changes when a set is prepared anew, under the same version too."""
    return hashlib.sha256((source / "dataset_info.json").read_bytes()).hexdigest()


# Reading with TFDS.


class _Blocked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook that finds TensorFlow, for those who only ask whether it is there, and refuses to load it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == "tensorflow" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        raise ModuleNotFoundError("TensorFlow is not needed to read a prepared set", name=spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextlib.contextmanager
def _tensorflow_free(why: str) -> Iterator[ModuleType]:
    """TFDS, with TensorFlow kept out: reading array records needs none, and importing it takes seconds and memory.

    TFDS asks whether "tensorflow" is in sys.modules; the entry None with which a user blocks it would mislead it.
    """
    none = "tensorflow" in sys.modules and sys.modules["tensorflow"] is None
    if none:
        del sys.modules["tensorflow"]
    hook = _Blocked()
    sys.meta_path.insert(0, hook)
    try:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ModuleNotFoundError(_lacking(why, error), name=error.name) from error
        yield tfds
    finally:
        sys.meta_path.remove(hook)
        if none:
            sys.modules["tensorflow"] = None  # type: ignore[assignment]


def _decode(name: str, source: Path, image_size: int | None) -> Splits:
    """The prepared files in `source` as arrays."""
    with _tensorflow_free(f"decoding {source}") as tfds:
        builder = tfds.builder_from_directory(source)
        if builder.info.file_format.value != "array_record":
            raise ValueError(
                f"{source} is prepared as {builder.info.file_format.value}, which only TensorFlow reads; set "
                f"config.data_dir to another folder and prepare it there: python -m rkd_jax.data {name} --data_dir ..."
            )
        image, label, num_classes, shape = _features(name, builder.info.features, image_size)
        if "train" not in builder.info.splits:
            raise ValueError(
                f"config.dataset='tfds:{name}' has no split 'train', only {', '.join(builder.info.splits)}"
            )

        def read(split: str) -> Split:
            examples = builder.as_data_source(split=split)
            logging.info("Decoding %d images of %s, %s", len(examples), name, split)
            images, labels = np.empty((len(examples), *shape), np.uint8), np.empty(len(examples), np.int32)
            for start in range(0, len(examples), 256):  # one by one, reading takes as long again as decoding
                places = range(start, min(start + 256, len(examples)))
                for i, example in zip(places, examples.__getitems__(list(places)), strict=True):
                    images[i], labels[i] = resize(example[image], shape), example[label]
            return Split(images, labels)

        train = read("train")
        for split in ("test", "validation"):
            if split in builder.info.splits:
                test = read(split)
                if (test.labels >= 0).all():  # a test split whose labels are secret says -1
                    return Splits(train, test, num_classes, *moments(train.images), _class_names(source, num_classes))
    train, test = hold_out(train, f"config.dataset='tfds:{name}'")
    return Splits(train, test, num_classes, *moments(train.images), _class_names(source, num_classes))


def _class_names(source: Path, num_classes: int) -> tuple[str, ...]:
    """The names of a prepared set's classes, where it has them."""
    found = sorted(source.glob("*.labels.txt"))
    chosen = [path for path in found if path.name == "label.labels.txt"] or found
    names = tuple(chosen[0].read_text().removesuffix("\n").split("\n")) if len(chosen) == 1 else ()
    return names if len(names) == num_classes else ()


def _features(name: str, features: Any, image_size: int | None) -> tuple[str, str, int, tuple[int, int, int]]:
    """The names of the image and the label, the number of classes, and the shape that all images get."""
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    if image is None or label is None:
        raise ValueError(
            f"config.dataset='tfds:{name}' is not one image and one class an example: its features are {kinds}"
        )
    height, width, channels = features[image].shape
    if features[image].np_dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"config.dataset='tfds:{name}' holds {features[image]}; only uint8 grey or RGB images are read"
        )
    if image_size or height is None or width is None:
        height = width = image_size or SIZE
    return image, label, features[label].num_classes, (height, width, channels)


def resize(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """An image [H, W, C] in another shape, by PIL's bilinear filter with antialiasing; as it is where they agree."""
    if image.shape == shape:
        return image
    pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(pixels.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)).reshape(shape)


# Preparing.


def builder_module(name: str) -> str:
    """The module of a builder of ours; "" for a set of TFDS's own."""
    module = f"rkd_jax.data._{name}_builder"
    return module if name.isidentifier() and importlib.util.find_spec(module) else ""


def prepare(name: str, root: Path, version: str = "", archive: str = "") -> Path:
    """Downloads a set, or takes its files from `root`/downloads/manual (ours: or `archive`), and prepares it in `root`.

    A builder of ours for NAME is the class of that name in _NAME_builder.py. Returns the prepared set's folder.
    FileNotFoundError, within seconds, that says which file to put where if there is neither a file nor a network;
    ModuleNotFoundError if a package is lacking; ValueError if a file is damaged or the name unknown.
    """
    if ours := builder_module(name):
        with _tensorflow_free(f"preparing {name}"):  # ours store files as they are, which takes no TensorFlow
            builder_class = getattr(importlib.import_module(ours), name.title().replace("_", ""))
            builder = builder_class(data_dir=root, file_format="array_record")
            builder.archive = archive or _by_hand(root, builder.ARCHIVES)
            if not builder.archive:
                _reach(name, root, {builder.URL: builder.ARCHIVES[0]})
            return _run(name, root, builder)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(_lacking(f"preparing {name}", error), name=error.name) from error
    tfds.core.utils.gcs_utils._is_gcs_disabled = True  # it would ask Google's storage first, for minutes when offline
    try:
        builder = tfds.builder(
            f"{name}:{version}" if version else name, data_dir=root, file_format="array_record", try_gcs=False
        )
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        raise ValueError(
            f"config.dataset='tfds:{name}' is no set of TFDS"
            + (f"; did you mean 'tfds:{near[0]}'?" if near else "; tensorflow.org/datasets/catalog lists them")
        ) from error
    except (AssertionError, ValueError) as error:  # its ways to say that there is no such version, and no such config
        base, slash, config = name.partition("/")
        known = list(tfds.builder_cls(base).builder_configs)
        if slash and config not in known:
            raise ValueError(_choose(base, known)) from error
        known = tfds.builder(name, data_dir=root).versions
        raise ValueError(
            f"config.dataset='tfds:{name}:{version}': this TFDS prepares {', '.join(map(str, known))}; take one of them"
        ) from error
    if builder.builder_config and "/" not in name:
        raise ValueError(_choose(name, list(builder.builder_configs)))
    files = {url: info.filename for url, info in builder.url_infos.items()}
    _reach(name, root, {url: file for url, file in files.items() if not _by_hand(root, [file])})
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            f"preparing {name} needs TensorFlow, once; training does not: pip install tensorflow", name="tensorflow"
        )
    return _run(name, root, builder)


def _choose(name: str, configs: Sequence[str]) -> str:
    """What to say of a set that comes in forms of these names, of which none is named."""
    if not configs:
        return f"config.dataset: 'tfds:{name}' comes in one form; name no other"
    return f"config.dataset: 'tfds:{name}' comes as {', '.join(configs)}; name one, as in 'tfds:{name}/{configs[0]}'"


def _run(name: str, root: Path, builder: Any) -> Path:
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        builder.download_and_prepare(download_dir=root / "downloads")
    except NonMatchingChecksumError as error:
        raise ValueError(f"a file of {name} is damaged or incomplete; fetch it again: {error}") from error
    except OSError as error:
        raise type(error)(f"config.data_dir={str(root)!r}: {name} cannot be prepared there: {error}") from error
    return Path(builder.data_dir)


def _by_hand(root: Path, patterns: Sequence[str]) -> str:
    """The first file of these names that a user has put in place; "" if there is none."""
    folder = root / "downloads" / "manual"
    return next((str(path) for pattern in patterns for path in sorted(folder.glob(pattern))), "")


def copy_cache(name: str, data_dir: str, target: Path) -> Path:
    """Copies a set's decoded cache to `target`/NAME/VERSION.uint8, which is all that training needs; its folder.

    `target` is then a config.data_dir of its own. FileExistsError where there is something already.
    """
    splits = load(name, data_dir)
    root, (name, _, version) = folder(data_dir), name.partition(":")
    source = _newest(root / name, version)
    if source is None:
        caches = _caches(root, name, source, version, None)
        (meta, *_) = (json.loads((each / "meta.json").read_text()) for each in caches if _cache.read(each, name))
    else:
        meta = {"version": source.name, "fingerprint": _fingerprint(source)}
    copy = target / name / f"{meta['version']}.uint8"
    if copy.exists():
        raise FileExistsError(f"--cache={str(target)!r} holds {copy.relative_to(target)} already; remove it first")
    _cache.write(copy, name, meta["version"], meta["fingerprint"], splits)
    return copy


def write_cache(name: str, target: Path, splits: Splits) -> None:
    """Writes arrays as the decoded cache of a set: `target` is then a config.data_dir."""
    _cache.write(target / name / "0.0.0.uint8", name, "0.0.0", "", splits)


def _reach(name: str, root: Path, files: dict[str, str]) -> None:
    """FileNotFoundError, with what to do, if any of these {URL: file name} cannot be downloaded."""
    for url in files:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
                continue
        except (OSError, ValueError) as error:  # URLError, HTTPError and time-outs are OSErrors
            wanted = " and ".join(f"{file} (from {url})" for url, file in files.items())
            raise FileNotFoundError(
                f"config.data_dir={str(root)!r} holds no {name}, and it cannot be downloaded ({error}). "
                f"Put {wanted} into {root / 'downloads' / 'manual'} and start again, or set config.data_dir to a "
                f"folder with {name}/<version>/ as TFDS prepared it or its decoded cache, {name}/<version>.uint8/."
            ) from error


def _lacking(why: str, error: ImportError) -> str:
    return f"{why} needs TFDS ({error}): pip install tensorflow-datasets array_record importlib_resources"
