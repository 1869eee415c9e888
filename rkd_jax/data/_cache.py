"""Decoded sets: four .npy files and meta.json, in a folder that appears all at once, memory-mapped at every start."""

import contextlib
import glob
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from rkd_jax.data.base import Split, Splits

_FORMAT = 1  # another number is decoded anew
_ABANDONED = 24 * 3600  # seconds: older ones that are not in place were left by a process that was killed


def read(folder: Path, name: str, fingerprint: str | None = None, image_size: int | None = None) -> Splits | None:
    """A decoded set, memory-mapped; None if it is not there, another (None: any is taken) or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != _FORMAT or meta["name"] != name:
            return None
        if fingerprint is not None and meta["fingerprint"] != fingerprint:
            return None
        splits = [
            Split(np.load(folder / f"{split}_images.npy", mmap_mode="r"), np.load(folder / f"{split}_labels.npy"))
            for split in ("train", "test")
        ]
        if image_size and splits[0].images.shape[1:3] != (image_size, image_size):
            return None
        names = tuple(meta.get("class_names", ()))
        return Splits(*splits, meta["num_classes"], tuple(meta["mean"]), tuple(meta["std"]), names)
    except (FileNotFoundError, PermissionError):  # another user's, whose images are not for all
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logging.warning("The cache %s is damaged (%s) and is not used", folder, error)
        return None


def write(folder: Path, name: str, version: str, fingerprint: str, splits: Splits, mode: int = 0o755) -> None:
    """Writes a set under another name and moves it into place, so that no reader ever sees half of it.

    mode: the folder's permissions.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.parent.stat().st_mode & 0o222:  # what its owner made read-only stays so, for root too
        raise PermissionError(f"{folder.parent} is read-only")
    prefix = f".{folder.name}."
    for left in folder.parent.glob(glob.escape(prefix) + 8 * "[a-z0-9_]"):  # as mkdtemp names them
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        for split, (images, labels) in (("train", splits.train), ("test", splits.test)):
            np.save(partial / f"{split}_images.npy", images)
            np.save(partial / f"{split}_labels.npy", labels)
        meta = {
            "format": _FORMAT,
            "name": name,
            "version": version,
            "fingerprint": fingerprint,
            "num_classes": splits.num_classes,
            "mean": splits.mean,
            "std": splits.std,
            "class_names": splits.class_names,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        partial.chmod(mode)
        if fingerprint and read(folder, name, fingerprint):  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)  # stale or damaged
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep(
    folders: Sequence[Path], name: str, version: str, fingerprint: str, splits: Splits, mode: int = 0o755
) -> Splits:
    """Writes a set to the first of these folders that takes it; as it lies there, memory-mapped."""
    reasons = []
    for folder in folders:
        try:
            write(folder, name, version, fingerprint, splits, mode)
        except OSError as error:
            reasons.append(f"{folder}: {error}")
        kept = read(folder, name, fingerprint)  # ours, or that of a process that was faster
        if kept is not None:
            return kept
    logging.warning("No decoded copy can be kept, and the next start decodes again (%s)", "; ".join(reasons))
    return splits
