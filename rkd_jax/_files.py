"""JSON files of runs and results, which are whole or not there; and where the user's cache is. Imports no JAX."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any


def read_json(
    path: Path, mend: str = "remove it, and the same command makes it again", needed: Set[str] = frozenset()
) -> dict[str, Any]:
    """A file of a run; ValueError, with the mend, where it is damaged, or has not all names that are `needed`."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {mend}") from error
    if missing := needed - set(found if isinstance(found, dict) else ()):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; {mend}")
    return found


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file under another name and moves it into place, so that no reader, nor a kill, sees half of it."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: None in place of numbers that are not finite, which other readers refuse."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields a new folder that takes the place of `folder` in the end, so that nobody ever sees half of it."""
    put_back(folder)
    fresh, stale = folder.with_name(f".{folder.name}.new"), _stale(folder)
    for each in (fresh, stale):
        shutil.rmtree(each, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:  # a full disk, say, which this is not to fill
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Mends what a kill between the two renames of `replacing` left: the old folder, under another name."""
    if _stale(folder).exists() and not folder.exists():
        _stale(folder).rename(folder)


def _stale(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields another name, of the same suffix, whose file takes the place of `path` in the end, or goes."""
    fresh = path.with_name(f"new-{path.name}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError as a run writes its files names the place, and says what to do."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise OSError(f"{path} cannot be written: {why}; make room, and start again: a run goes on") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file, [] where there is none; a last one that was cut short is left out."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is damaged ({error}); remove that line") from error
    return found


def cache() -> Path:
    """The folder of this package under the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rkd_jax"
