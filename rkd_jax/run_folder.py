"""A run's folder: which config's it is, and who may write there."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rkd_jax import _files, checkpoint, experiment

# Fields that say where things lie, or how they are brought to the device, not what is computed.
NOT_COMPUTED = ("data_dir", "teacher_checkpoint", "student_checkpoint", "checkpoint_seconds", "stream")
# Fields that a run may go on with in another value.
MAY_CHANGE = ("log_every", "eval_batch_size", "steps_per_call")
# Fields that the records of earlier versions lack.
LATER = ("teacher_normalization",)
# Fields that say how long a run is.
LENGTH = {"num_epochs", "num_steps", "decay_epochs"}
# What a command leaves in its folder, and the files that tell it.
KINDS = {
    "one run": ("config.json",),
    "a sweep (config.sweep)": ("*=*/config.json",),
    "a comparison (config.compare)": ("alone/config.json", "teacher/config.json"),
    "a chain of runs (takd)": ("assistants/*/config.json",),
}
PUT_BACK = "put it back (a finished run has it in its summary.json), or name another folder"


def claim(workdir: Path, config: Mapping[str, Any], alone: bool = False) -> bool:
    """Makes the folder this run's own, if it is no run's yet, and returns whether it was not.

    With `alone`, no other process is at work there: what was killed before it saved anything is no run either.

    Raises ValueError where it holds another config's run, naming the differences, or something else.
    """
    path = workdir / "config.json"
    try:
        if (workdir / "metadata.json").exists():
            raise ValueError(f"--workdir={workdir} is the folder of a network, not of a run; name another")
        if not path.exists() and has_begun(workdir):
            raise ValueError(f"--workdir={workdir} holds a run, but no config.json that says of what; {PUT_BACK}")
        workdir.mkdir(parents=True, exist_ok=True)
        if free := not path.exists() or (alone and not has_begun(workdir)):
            _files.write_json(path, config)
        elif not os.access(workdir, os.W_OK):
            raise PermissionError("no permission")
        there = _files.read_json(path, PUT_BACK)
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written ({error}); name another") from error
    _agree(workdir, there, config)
    return free


def check(workdir: Path, config: Mapping[str, Any]) -> None:
    """ValueError where a folder holds a run that differs from a config in a field that both have a value of.

    For a run that others come before, whose other values are not known yet.
    """
    path = workdir / "config.json"
    if path.exists() and has_begun(workdir):
        there, here = _files.read_json(path, PUT_BACK), json.loads(json.dumps(config))
        known = {name for name, value in here.items() if value is not None and there.get(name) is not None}
        both = sorted(known - experiment.FINGERPRINTS.keys())
        _agree(workdir, *({name: values[name] for name in both} for values in (there, here)))


def _agree(workdir: Path, there: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """ValueError where a config is not that of the run in a folder."""
    unknown = tuple(name for name in LATER if name not in there)
    names = [name for name in {**there, **config} if name not in NOT_COMPUTED + MAY_CHANGE + unknown]
    means = {name: f" ({what})" for name, what in experiment.FINGERPRINTS.items()}
    differences = {
        name: f"  config.{name}: {there.get(name)!r} there, {config.get(name)!r} here{means.get(name, '')}"
        for name in names
        if there.get(name) != config.get(name)
    }
    if differences:
        network = workdir / "last"
        longer = differences.keys() <= LENGTH and (network / "metadata.json").exists()
        train_on = f"\nTo train its network on: another folder, and config.student_checkpoint={str(network)!r}"
        raise ValueError(
            f"--workdir={workdir} holds a run of another config; name another folder, remove this one, or use "
            "that run's values:\n" + "\n".join(differences.values()) + train_on * longer
        )


def check_kind(workdir: Path, kind: str, *others: str) -> None:
    """ValueError where a folder holds one of `KINDS`, and not this one (nor `others`, beside which it may lie)."""
    there = [name for name, patterns in KINDS.items() if any(any(workdir.glob(each)) for each in patterns)]
    if there and {kind, *others}.isdisjoint(there):
        raise ValueError(f"--workdir={workdir} holds {there[0]}, and this is {kind}; name another folder")


def has_begun(workdir: Path) -> bool:
    """Whether a folder holds a network or a checkpoint of a run."""
    files = ("best/metadata.json", "last/metadata.json", "summary.json")
    states = (path.name.isdigit() for path in workdir.glob("checkpoints/*"))
    return any((workdir / name).exists() for name in files) or any(states)


def release(workdir: Path) -> None:
    """Frees a folder in which nothing was saved, so that a run of any config may have it."""
    if not has_begun(workdir):
        (workdir / "config.json").unlink(missing_ok=True)


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of the finished run that a folder holds; None where it holds none."""
    path = workdir / "summary.json"
    return _files.read_json(path, needed={"best", "last"}) if path.exists() else None


class Held(ValueError):
    """Another run trains in a folder."""


@contextlib.contextmanager
def locked(
    workdir: Path, said: str = "--workdir={}: another run trains there; wait for it, or stop it"
) -> Iterator[bool]:
    """Keeps other runs out of a folder, which is made, and mends what a kill left of a save; yields whether it could.

    Held, `said` of the folder, where another is there. Does nothing where a folder cannot be locked (NFS,
    Windows). The lock is on the folder itself, so that nothing of it is left behind, whatever becomes of the process.
    """
    alone = False
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # which Windows has not

            workdir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(workdir, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a child of this process may have it open still
            alone = True
            checkpoint.remove_unfinished(workdir / "checkpoints")
            for name in ("best", "last"):
                _files.put_back(workdir / name)
        except BlockingIOError:
            raise Held(said.format(workdir)) from None
        except (OSError, ImportError):
            pass  # what cannot be written is told by `claim`
        yield alone
