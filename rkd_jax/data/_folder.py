"""A user's own images: one sub-folder a class.

PATH/train/CLASS/... and PATH/test/CLASS/... (or val/, valid/, validation/), or PATH/CLASS/... alone, from which every
tenth image of each class, in the order of the file names, is held out for testing. PATH/test/CLASS/... alone is a set
to test on, without training images. Classes are numbered in the order of their names.

Photos are turned as their EXIF orientation says (JPEG's alone); an alpha channel is left out. Hidden files are passed
over, and so, with a warning, are those of other suffixes.

The decoded images are kept beside the folder NAME in .NAME.SIZE.uint8/ (SIZE: "own" where no image size is asked for),
or in $XDG_CACHE_HOME/rkd_jax/ (default ~/.cache/rkd_jax/) where that cannot be written, for their owner alone, and
decoded anew once a file is added, removed or renamed, or has another size or time of change.
"""

import functools
import hashlib
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from absl import logging
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rkd_jax import _files
from rkd_jax.data import _cache, _prepared
from rkd_jax.data.base import Split, Splits, hold_out, moments

HELD_OUT = ("test", "val", "valid", "validation")
SPLITS = ("train", "training", *HELD_OUT, "testing", "dev", "eval")  # what others call the parts of a set
DEEP = ("I", "F")  # PIL's modes, or how they begin, of more than 8 bits: its conversion to RGB clips them at 255
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load(path: str, image_size: int | None = None) -> Splits:
    """The images as RGB, or grey where all of them are; of unequal size, they are resized to 64 (or `image_size`)."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise FileNotFoundError(f"config.dataset='folder:{path}' is no folder; it should hold one sub-folder a class")
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    if held_out and (root / "train").is_dir():
        parts = [root / "train", held_out]
    elif held_out and _classes(root) == [held_out.name] and _classes(held_out):  # and nothing beside it
        parts = [held_out]
    else:
        parts = [root]
    if not held_out and (root / "train").is_dir() and _classes(root / "train"):
        others = ", ".join(f"{name}/" for name in HELD_OUT[1:])
        raise ValueError(
            f"config.dataset='folder:{path}': {root / 'train'} holds folders, and there is no test/ beside it (nor "
            f"{others}); add it, or name folder:{root / 'train'}, of which every tenth image is then held out"
        )
    classes = _classes(parts[0])
    alike = [name for name in classes if name.lower() in SPLITS and _classes(parts[0] / name)]
    if parts == [root] and len(alike) > 1:
        raise ValueError(
            f"config.dataset='folder:{path}': {' and '.join(alike)} look like parts of a set, not like classes; "
            "name them train/ and test/"
        )
    if parts == [root]:
        why = f"{alike[0]}/ is a class, with no train/ beside it" if alike else "has no test/"
        _warn_of_held_out(root, why)
    files = [_listed(part, classes, path) for part in parts]
    there = {label for _, label in files[0]}
    if parts != [held_out] and (empty := [name for label, name in enumerate(classes) if label not in there]):
        raise ValueError(
            f"{parts[0]} has no image of {', '.join(empty)} to train on; add some, or remove the sub-folder"
        )
    caches, fingerprint = _caches(root.resolve(), image_size), _fingerprint(root, image_size, classes, files)
    for cache in caches:
        if kept := _cache.read(cache, "folder", fingerprint):
            return kept
    shape = _shape([file for part in files for file, _ in part], image_size)
    read = iter(_each(functools.partial(_read, shape=shape), [file for part in files for file, _ in part]))
    splits = [
        Split(np.stack([*itertools.islice(read, len(part))]), np.array([label for _, label in part], np.int32))
        for part in files
    ]
    if parts == [held_out]:
        train, test = Split(splits[0].images[:0], splits[0].labels[:0]), splits[0]
    else:
        train, test = splits if len(splits) == 2 else hold_out(splits[0], f"config.dataset='folder:{path}'")
    images = train.images if len(train.images) else test.images
    splits = Splits(train, test, len(classes), *moments(images), tuple(classes))
    return _cache.keep(caches, "folder", "", fingerprint, splits, mode=0o700)  # not all may see a user's images


@functools.cache
def _warn_of_held_out(root: Path, why: str) -> None:
    """Once, however often the set is read."""
    mend = f" (to test on all of them: folder:{root.parent})" if root.name in HELD_OUT else ""
    logging.warning("%s %s: every tenth image of each class is held out to test on%s", root, why, mend)


def _caches(root: Path, image_size: int | None) -> list[Path]:
    """The folders where the decoded images may lie, the preferred first."""
    name = f"{root.name[:50]}.{image_size or 'own'}.uint8"
    return [root.parent / f".{name}", _files.cache() / f"folder-{_digest(str(root))[:16]}-{name}"]


def _fingerprint(root: Path, image_size: int | None, classes: list[str], files: list[list[tuple[Path, int]]]) -> str:
    """Changes with the files' names, classes, sizes and times of change, and with PIL's version."""
    found = []
    for file, label in itertools.chain(*files):
        try:
            there = file.stat()
            facts = there.st_size, there.st_mtime_ns
        except OSError:  # a link to nowhere, say: reading it says so
            facts = ()
        found.append((str(file.relative_to(root)), label, *facts))
    return _digest([PIL.__version__, image_size, classes, found])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _listed(folder: Path, classes: list[str], path: str) -> list[tuple[Path, int]]:
    """The image files of a folder and their classes, in the order of class and name."""
    there = _classes(folder)
    if unknown := sorted(set(there) - set(classes)):
        raise ValueError(f"{folder} has the classes {', '.join(unknown)}, which are not among those of training")
    if missing := sorted(set(classes) - set(there)):
        raise ValueError(
            f"{folder} lacks the classes {', '.join(missing)} of training; a class without images here is "
            "an empty sub-folder"
        )
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if not file.is_dir() and not file.name.startswith(".")
    ]
    found = [(file, label) for file, label in files if file.suffix.lower() in SUFFIXES]
    others = Counter(file.suffix.lower() or file.name for file, _ in files if file.suffix.lower() not in SUFFIXES)
    if others:
        what = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logging.warning("%s: files of other suffixes than %s are passed over: %s", folder, ", ".join(SUFFIXES), what)
    if len(classes) < 2 or not found:
        raise ValueError(
            f"config.dataset='folder:{path}': {folder} holds {len(found)} images in {len(classes)} sub-folders; "
            f"it takes two classes or more, one sub-folder each, of {', '.join(SUFFIXES)}; "
            "or both train/ and test/ that hold such sub-folders"
        )
    return found


def _shape(files: list[Path], image_size: int | None) -> tuple[int, int, int]:
    """Height, width and channels that all images get, from their headers."""
    headers = _each(_header, files)
    sizes, modes = ({each[i] for each in headers} for i in range(2))
    width, height = sizes.pop() if len(sizes) == 1 else (_prepared.SIZE, _prepared.SIZE)
    return image_size or height, image_size or width, 1 if modes <= {"1", "L", "LA"} else 3


def _header(file: Path) -> tuple[tuple[int, int], str]:
    """Width and height once it is upright, and PIL's mode."""
    with _open(file) as image:
        if image.mode.startswith(DEEP):
            raise ValueError(f"{file} has more than 8 bits a pixel (PIL's mode {image.mode}); convert it to 8")
        return image.size[::-1] if _orientation(image) >= 5 else image.size, image.mode


def _each(function: Callable[[Path], Any], files: list[Path]) -> list[Any]:
    """What a function makes of each file; a ValueError has those of all files, or of the first 20."""
    found, wrong = [], []
    for file in files:
        try:
            found.append(function(file))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        more = [f"and {len(wrong) - 20} other files"] if len(wrong) > 20 else []
        raise ValueError("\n".join(wrong[:20] + more))
    return found


def _read(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    with _open(file) as image:
        try:
            upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
            pixels = np.asarray(upright.convert("L" if shape[-1] == 1 else "RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return _prepared.resize(pixels.reshape(*pixels.shape[:2], shape[-1]), shape)


def _orientation(image: Image.Image) -> int:
    """EXIF's: 1 is upright, and from 5 on width and height change places. A PNG's would take decoding to know."""
    turn = image.getexif().get(ExifTags.Base.Orientation) if image.format in ("JPEG", "MPO") else 1
    return turn if isinstance(turn, int) else 1


def _open(file: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():  # of what is damaged in ways that matter little
            warnings.simplefilter("ignore", UserWarning)
            return Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no image that PIL reads; remove it or replace it") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it or replace it") from error
