"""Where a run's numbers go: the console, `metrics.jsonl`, and TensorBoard event files. None of it needs TensorFlow.

Without tensorboardX there are no event files, which is said once; without tqdm, no progress bar.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rkd_jax import _files

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None

TIMES = ("images_per_second",)  # the only numbers that two identical runs do not share


class Writer:
    """Writes metrics of a run that starts, or goes on, at `step`: what was written beyond it is cut off."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int,
        num_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        label: str = "",  # before each line on the console
    ):
        self._label = f"{label} | " if label else ""
        self._path = path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in _files.read_lines(path) if line["step"] <= step]
        with _files.writing(path):
            _files.write_text(path, "".join(json.dumps(_files.plain(line)) + "\n" for line in kept))
            self._file = path.open("a")
        try:
            with _without_torch():
                from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            self._board = None
            _say_once("tensorboardX is not installed: no event files; metrics.jsonl has the same numbers")
        else:
            board = Path(workdir) / "tensorboard"
            for stale in board.glob("events.out.tfevents.*"):  # a kill may have cut it short
                stale.unlink()
            self._board = SummaryWriter(str(board), flush_secs=10)
            for line in kept:
                self._draw(line)
        self._steps_per_epoch = steps_per_epoch
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._step = step
        self._bar = None

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar: on a terminal, there is none in a file."""
        if tqdm is None:
            return
        if self._bar is None:
            start = {"total": self._num_steps, "initial": self._step}
            self._bar = tqdm(**start, unit="step", disable=None, dynamic_ncols=True, leave=False)
        self._bar.update(steps)

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics as of `step`, of one kind: "train" or "test"."""
        epoch = step / self._steps_per_epoch
        with _files.writing(self._path):
            line = _files.plain({"step": step, "epoch": round(epoch, 4), "kind": kind, **metrics})
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if self._board:
                self._draw(line)
        line = f"{kind:5} step {step}/{self._num_steps} epoch {epoch:.2f}"
        for name, value in metrics.items():
            alone = name == "label" and value == metrics.get("loss")  # the only term
            if name not in TIMES and not alone:
                line += f" {name} {value:.2f} %" if name.startswith("top") else f" {name} {value:.4g}"
        if metrics.get("images_per_second"):
            left = (self._num_steps - step) * self._batch_size / metrics["images_per_second"]
            line += f" | {metrics['images_per_second']:,.0f} images/s, {timedelta(seconds=round(left))} left"
        self.say(line)

    def _draw(self, line: Mapping[str, Any]) -> None:
        """Adds a line of `metrics.jsonl` to the event files."""
        kind = line.get("kind", "train")
        for name, value in line.items():
            if name not in ("step", "epoch", "kind"):
                self._board.add_scalar(f"{kind}/{name}", math.nan if value is None else value, line["step"])

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        (tqdm.write if tqdm else _say)(self._label + line)

    def close(self) -> None:
        """Finishes the files."""
        if self._bar is not None:
            self._bar.close()
        with _files.writing(self._path), contextlib.ExitStack() as both:
            if self._board:
                both.callback(self._board.close)
            self._file.close()


class Silent:
    """A Writer that writes nothing: that of the processes that do not lead."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports PyTorch where that is installed: seconds of every start, for nothing that is used here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


def _say(line: str) -> None:
    print(line, flush=True)


_say_once = functools.cache(_say)


class Clock:
    """The steps and seconds that a run spends on training: without the calls that compile, evaluating and saving."""

    def __init__(self, seconds: float = 0.0, steps: int = 0):
        self.seconds, self.steps = seconds, steps  # of training so far, interrupted runs included
        self._started: tuple[int, float] | None = None  # at which step, and when; None: it stands
        self._logged = (steps, seconds)  # at the last log

    def stop(self, step: int) -> None:
        """The device has done `step` steps, and does something else."""
        if self._started is not None:
            since, mark = self._started
            self.steps += step - since
            self.seconds += time.monotonic() - mark
            self._started = None

    def start(self, step: int) -> None:
        """Training goes on after `step` steps."""
        self._started = step, time.monotonic()

    def rate(self) -> float:
        """Steps per second since the last call; 0 where none was counted."""
        steps, seconds = self.steps - self._logged[0], self.seconds - self._logged[1]
        self._logged = (self.steps, self.seconds)
        return steps / seconds if steps else 0.0
