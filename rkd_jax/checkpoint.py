"""Networks and training states on disk, by Orbax.

A network is a folder that holds `variables/` (Orbax) and `metadata.json`: what `rkd_jax.convert` writes, a run leaves
in `best/` and `last/`, and `config.teacher_checkpoint` names. A training state lives under `checkpoints/` of
its workdir, by step, beside a checksum.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging as std_logging
import os
import shutil
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from rkd_jax import _devices, _files, _trees

REQUIRED = {"network", "num_classes", "mean", "std"}  # of a network's metadata


def fingerprint(variables: Any) -> str:
    """SHA-256 of the names, types, shapes and values of a tree of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def save_network(path: str | os.PathLike, variables: Any, metadata: Mapping[str, Any]) -> None:
    """Writes a network folder, in place of one that is there.

    Args:
      path: the folder.
      variables: {"params": ..., "batch_stats": ...}.
      metadata: JSON-serialisable; "network", "num_classes", "mean" and "std" are required, for the reader needs them.
    """
    if missing := REQUIRED - set(metadata):
        raise ValueError(f"metadata of a network lacks {', '.join(sorted(missing))}")
    path = Path(path).expanduser().absolute()
    variables = jax.tree.map(np.asarray, variables)
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone("network"))
    text = json.dumps(dict(metadata) | {"fingerprint": fingerprint(variables)}, indent=2)
    with _files.replacing(path) as fresh:
        with saver, _writing(path):
            saver.save(fresh / "variables", args=ocp.args.PyTreeSave(variables))
        (fresh / "metadata.json").write_text(text + "\n")


def _alone(what: str) -> ocp.options.MultiprocessingOptions:
    """Of several processes, none waits for another to read or write: see `rkd_jax.processes`."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"{what}_{index}"
    )


def read_metadata(path: str | os.PathLike, field: str = "path") -> dict[str, Any]:
    """The metadata of a network folder; FileNotFoundError, naming the config's `field`, where there is none."""
    given, path = str(path), Path(path).expanduser()
    if not given or not (path / "metadata.json").is_file():
        if given and (path / "best" / "metadata.json").is_file():
            best = str(path / "best")
            raise FileNotFoundError(f"{field}={given!r} is a run's folder; name the network in it, {best!r}")
        if given and (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{field}={given!r} is the folder of a run that has no network yet: it has not saved one since "
                "its first evaluation, or diverged before that"
            )
        beside = "; config.compare=True trains one, too" if field == "config.teacher_checkpoint" else ""
        what = " is not set" if not given else f"={given!r} holds no network (no metadata.json)"
        raise FileNotFoundError(
            f"{field}{what}. Convert a PyTorch checkpoint with `python -m rkd_jax.convert --model NAME --checkpoint "
            "FILE --output DIR` (docs/teachers.md has addresses), or train one with a config of configs/teachers/ and "
            f"name its WORKDIR/best{beside}."
        )
    try:
        return _files.read_json(path / "metadata.json", "convert or train it again", REQUIRED)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def load_network(
    path: str | os.PathLike,
    name: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    field: str = "path",
) -> tuple[Any, dict[str, Any]]:
    """Reads a network folder: (variables, metadata), as NumPy arrays; floating point as float32.

    A run may save another network there meanwhile.

    Args:
      path: the folder.
      name, num_classes, class_names: what the caller expects; ValueError where the folder says otherwise.
      field: the config field that named the folder, for the errors.
    """
    while True:
        before = _saved_at(path)
        try:
            return _load_network(path, name, num_classes, class_names, field)
        except (ValueError, FileNotFoundError):
            time.sleep(0.01)  # as one folder takes another's place, there is none for a moment
            if _saved_at(path) == before:
                raise


def _saved_at(path: str | os.PathLike) -> tuple[int, int] | None:
    """What tells one save of a network folder from another; None where there is none."""
    try:
        found = (Path(path).expanduser() / "metadata.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load_network(
    path: str | os.PathLike, name: str | None, num_classes: int | None, class_names: Sequence[str], field: str
) -> tuple[Any, dict[str, Any]]:
    metadata = read_metadata(path, field)
    path = Path(path).expanduser().absolute()
    if name is not None and metadata["network"].lower() != name.lower():
        raise ValueError(f"{field}={str(path)!r} holds a {metadata['network']}, not a {name}; name the right one")
    if num_classes is not None and (difference := other_classes(metadata, num_classes, class_names)):
        raise ValueError(f"{field}={str(path)!r} was trained on {difference}")
    _devices.start()
    try:
        variables = _restore_numpy(path / "variables")
    except Exception as error:  # Orbax and TensorStore raise many kinds for a file cut short
        _check_readable(error, f"{field}={str(path)!r}")
        raise ValueError(
            f"{field}={str(path)!r} is damaged or cut short: {_first_line(error)}; make it again"
        ) from error
    if metadata.get("fingerprint", found := fingerprint(variables)) != found:  # a folder made elsewhere may lack it
        raise ValueError(f"{field}={str(path)!r} is damaged: its arrays are not those that were saved; make it again")
    variables = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, variables)
    return variables, metadata | {"fingerprint": found}


def other_classes(metadata: Mapping[str, Any], num_classes: int, class_names: Sequence[str]) -> str:
    """How a network's classes are not those of a data set, to follow "was trained on"; "" where they are."""
    if metadata["num_classes"] != num_classes:
        return (
            f"{metadata['num_classes']} classes"
            + (f" ({metadata['dataset']})" if metadata.get("dataset") else "")
            + f", config.dataset has {num_classes}; name its data set, or a network of this one"
        )
    both = zip(metadata.get("class_names", ()), class_names, strict=False)  # none, where one side does not know them
    for label, (there, here) in enumerate(both):
        if there != here:
            return (
                f"other classes than config.dataset has: {label} is {there!r} there and {here!r} here; name its data "
                "set, or a network of this one, or, where they mean the same, remove class_names from its metadata.json"
            )
    return ""


@functools.cache
def _hush() -> None:
    """Keeps the traces of what fails beside a first failure off the console, for good.

    Where one of a checkpoint's arrays cannot be read or written, Orbax gives up and closes its event loop; the others
    then fail to report to it, or are reported by asyncio, by a trace each, on top of the error that matters. Orbax logs
    that one as well, once for each of its threads and layers, before it raises it.
    """
    hook = sys.unraisablehook

    def hushed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = hushed
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    orbax = str(Path(ocp.__file__).parent)
    logging.get_absl_logger().addFilter(
        lambda record: record.levelno < std_logging.ERROR or not record.pathname.startswith(orbax)
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """`_files.writing`, and OSError in place of what TensorStore says of a full disk."""
    _hush()
    with _files.writing(path):
        try:
            yield
        except ValueError as error:
            full = "RESOURCE_EXHAUSTED" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, _first_line(error)) from error


def _check_readable(error: Exception, what: str) -> None:
    """OSError or MemoryError where what failed says nothing about the files themselves."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise MemoryError(f"{what} cannot be read: the machine's memory does not suffice; make room") from error
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
        raise OSError(f"{what} cannot be read: {_first_line(error)}; change its permissions") from error


def _restore_numpy(path: Path) -> Any:
    _hush()
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone("network"))
    with reader as checkpointer:
        if not path.is_dir():
            raise FileNotFoundError("it has no variables/")
        if (found := checkpointer.metadata(path).item_metadata) is None:
            raise ValueError("its variables/ lacks Orbax's metadata")
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _checksum(tree: Any) -> int:
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf), value)
    return value


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left of saves, in a folder of training states that no process writes to."""
    for path in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints:
    """The training states of one run: the newest two, so that a damaged one costs little.

    States are written as host arrays, in the background, whole or not at all; they restore on any number of devices.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder).absolute()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        alone = _alone("checkpoints")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=True, create=False, multiprocessing_options=alone
        )
        # Uncompressed: twice as fast to save, and what packs states can do better (see `rkd_jax.report.pack`).
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Saves `state`, a tree of arrays, and `progress`, plain JSON, as of `step`; returns before it is on disk."""
        # A copy, for the CPU backend would hand out its own memory, which the next step donates.
        state = jax.tree.map(lambda x: np.array(x, copy=True), state)
        record = {"progress": dict(progress), "checksum": _checksum(state)}
        with _writing(self._folder):  # this one, or the one before it, which was written meanwhile
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
            )

    def steps(self) -> set[int]:
        """The steps of which there is a state."""
        return set(self._manager.all_steps())

    def restore(self, template: Any, step: int) -> tuple[Any, dict[str, Any]] | None:
        """The state of a step, as host arrays, and its progress.

        None where it is damaged; it is then named in the log, and set aside as damaged-STEP. ValueError where it is
        whole, but of other arrays than `template`.
        """
        _hush()
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        self._check_form(template, step)
        arguments = ocp.checkpoint_utils.construct_restore_args(template)
        parts = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(template, restore_args=arguments), record=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=parts)
            if _checksum(found.state) != found.record["checksum"]:
                raise ValueError("its checksum does not match")
            return found.state, found.record["progress"]
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            _check_readable(error, str(self._folder / str(step)))
            logging.warning(
                "checkpoint %s is damaged and set aside (%s); trying the one before it",
                self._folder / str(step),
                _first_line(error),
            )
            self._set_aside(step)
            return None

    def _check_form(self, template: Any, step: int) -> None:
        def form(leaf: Any) -> str:
            return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

        def by_name(tree: Any) -> Mapping[str, Any]:  # in the tree's order; Orbax tells of dicts alone
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            names = (_trees.name(path) for path, _ in leaves)
            return OrderedDict(zip(names, (leaf for _, leaf in leaves), strict=True))

        try:
            found = by_name(self._manager.item_metadata(step)["state"].tree)
            different = _trees.difference(found, by_name(template), form)
        except Exception:  # it is damaged, as reading it will tell
            return
        if different:
            name, was, now = different
            raise ValueError(
                f"{self._folder / str(step)} has {name} as {was}, where it is {now} now: the code of the method, "
                "the student or the optimizer is not what it was. Undo that, or name another --workdir"
            )

    def drop_after(self, step: int) -> None:
        """Deletes the states of later steps: the run goes on from this one."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        aside = self._folder.with_name(f"damaged-{step}")
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
        self._manager = self._open()

    def close(self) -> None:
        """Waits until everything is on disk."""
        with _writing(self._folder):
            self._manager.close()
