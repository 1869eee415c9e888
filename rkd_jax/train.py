"""The training loop: for each step, train; now and then, log, evaluate, save."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from rkd_jax import experiment, methods, models, steps
from rkd_jax.checkpoint import Checkpoints, save_network
from rkd_jax.metrics import Clock, Writer

# Fields that say where things lie, not what is computed: a run may go on under others.
ELSEWHERE = ("data_dir", "teacher_checkpoint", "checkpoint_seconds")


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Runs a config in a folder, or goes on with the run that was interrupted there, and returns its summary.

    The folder then holds `config.json`, `metrics.jsonl`, `tensorboard/`, `summary.json`, the networks `best/` and
    `last/`, and the training state under `checkpoints/`. A resumed run ends with the same bits as one never stopped.

    Raises:
      ValueError, FileNotFoundError: the config asks for what is not there (before anything is written).
      FloatingPointError: the loss is not finite; the last good checkpoint stays.
      SystemExit: SIGTERM or SIGINT came; the state is saved.
    """
    run = experiment.build(config)
    mesh = steps.data_mesh(run.recipe.batch_size)
    workdir = Path(workdir)
    claim(workdir, run.config)
    if (workdir / "summary.json").exists():
        print(f"{workdir} holds this run, finished; nothing to do")
        return json.loads((workdir / "summary.json").read_text())

    loop, recipe, (train, test) = run.loop, run.recipe, run.splits[:2]
    rng = jax.random.key(run.config["seed"])
    state = run.create_state(rng)
    checkpoints = Checkpoints(workdir / "checkpoints")
    progress: dict[str, Any] = {"best": None, "last": None, "totals": {}, "seconds": 0.0}
    state, progress = checkpoints.restore(state) or (state, progress)
    start, parameters = int(state.step), int(parameter_overview.count_parameters(state.params["student"]))
    state = steps.replicate(state, mesh)
    totals = steps.replicate({k: np.float32(v) for k, v in progress["totals"].items()}, mesh)
    inputs = steps.replicate(steps.Inputs(rng, train.images, train.labels, run.teacher_variables), mesh)
    train_step = run.make_train_step(mesh)
    eval_step = steps.make_eval_step(run.student, run.recipe.student_normalization)

    writer = Writer(workdir, start, recipe.num_steps, recipe.steps_per_epoch, recipe.batch_size)
    writer.say(_headline(run, parameters, start))
    clock, saved, order = Clock(progress["seconds"]), time.monotonic(), None
    with _signals() as received, contextlib.closing(checkpoints), contextlib.closing(writer):
        for step in range(start, recipe.num_steps):
            if order is None or step % recipe.steps_per_epoch == 0:
                order = steps.epoch_order(rng, step // recipe.steps_per_epoch, len(train.labels))
                order = steps.replicate(order, mesh)
            state, new = train_step(state, inputs, order)
            totals = steps.accumulate(totals, new)
            writer.advance()

            done = step + 1
            last = done == recipe.num_steps
            log, evaluate = (last or done % every == 0 for every in (loop.log_every, loop.eval_every))
            save = last or received or time.monotonic() - saved >= loop.checkpoint_seconds
            if not (log or evaluate or save or step == start):
                continue

            check_finite(state, workdir)  # waits for the device
            clock.stop(done)
            if log:
                rate = float(run.schedule(step))
                speed = clock.rate(done) * run.recipe.batch_size
                writer.write(done, "train", _means(totals) | {"learning_rate": rate, "images_per_second": speed})
                totals = {}
            if evaluate:
                variables = {"params": state.params["student"], "batch_stats": state.batch_stats}
                result = {"step": done, **steps.evaluate(eval_step, variables, *test, loop.eval_batch_size)}
                writer.write(done, "test", {name: result[name] for name in ("top1", "top5", "loss")})
                _keep(workdir, run, progress, variables, result)
            if save:
                progress |= {"totals": {k: float(v) for k, v in totals.items()}, "seconds": clock.seconds}
                checkpoints.save(done, state, progress)
                saved = time.monotonic()
            if received and not last:
                writer.say(
                    f"{signal.Signals(received[0]).name}: saved at step {done}; the same command goes on from there"
                )
                raise SystemExit(128 + received[0])
            clock.start()

    summary = _summary(run, progress, parameters)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder this run's own; ValueError where it holds another config's run, naming the differences."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            fresh = workdir / "config.json.new"
            fresh.write_text(json.dumps(config, indent=2) + "\n")
            fresh.replace(path)
        elif not os.access(workdir, os.W_OK):
            raise PermissionError("no permission")
        there = json.loads(path.read_text())
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written ({error}); name another") from error
    names = [name for name in {**there, **config} if name not in ELSEWHERE]
    differences = [
        f"  config.{name}: {there.get(name)!r} there, {config.get(name)!r} here"
        for name in names
        if there.get(name) != config.get(name)
    ]
    if differences:
        raise ValueError(
            f"--workdir={workdir} holds a run of another config; name another folder, or use that run's values:\n"
            + "\n".join(differences)
        )


def check_finite(state: steps.TrainState, workdir: Path) -> None:
    """FloatingPointError, naming the step, where a loss or an update was NaN or infinite."""
    if (step := int(state.bad_step)) >= 0:
        raise FloatingPointError(
            f"the loss or the update of step {step} is not finite. Lower config.learning_rate, or the weight of the "
            f"method's loss; the checkpoints in {workdir} are from before it"
        )


def _means(totals: Mapping[str, jax.Array]) -> dict[str, float]:
    sums = jax.device_get(totals)
    names = sorted(sums, key=lambda name: (name != "loss", name))
    return {name: float(sums[name] / sums["count"]) for name in names if name != "count"}


def _keep(workdir: Path, run: experiment.Experiment, progress: dict[str, Any], variables: Any, result: dict[str, Any]):
    """Saves the evaluated network as the last and, where it is, the best."""
    best = progress["best"] is None or result["top1"] > progress["best"]["top1"]
    for name in ("last", "best") if best else ("last",):
        progress[name] = result
        facts = {
            "network": models.resolve(run.config["student"], run.splits.test.images.shape[1]),
            "num_classes": run.splits.num_classes,
            "dataset": run.config["dataset"],
            "image_size": run.splits.test.images.shape[1],
            "mean": run.splits.mean,
            "std": run.splits.std,
            "source": "trained by rkd_jax",
            "step": result["step"],
            "top1": result["top1"],
            "top5": result["top5"],
        }
        save_network(workdir / name, variables, facts)


def _headline(run: experiment.Experiment, parameters: int, start: int) -> str:
    config, method = run.config, run.method
    names = methods.hyperparameters(method)
    with_fields = ", ".join(f"{name}={config[name]}" for name in names)
    teacher = f" from {config['teacher']}" if method.needs_teacher else ""
    return (
        f"{config['student']} ({parameters:,} parameters) learns {config['dataset']}{teacher} by {config['method']}"
        + (f" ({with_fields})" if names else "")
        + f": {len(run.splits.train.labels):,} training and {len(run.splits.test.labels):,} test images, "
        f"{run.recipe.num_steps:,} steps of {run.recipe.batch_size}, seed {config['seed']}, on {device_name()}"
        + (" | SMOKE: random images" if config["smoke"] else "")
        + (f" | goes on from step {start:,}" if start else "")
    )


def device_name() -> str:
    """The devices of this process, in words: "2 x NVIDIA H100"."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return kind if count == 1 else f"{count} x {kind}"


def provenance() -> dict[str, Any]:
    """What a result must name: command, commit, versions, device, date."""
    module = sys.modules["__main__"].__spec__  # None for a script
    script = ["-m", module.name] if module else [os.path.relpath(sys.argv[0])]
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
        "device": device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of this source tree, with "+" where it was changed since; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _summary(run: experiment.Experiment, progress: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    images = run.recipe.num_steps * run.recipe.batch_size
    return {
        "best": progress["best"],
        "last": progress["last"],
        "parameters": parameters,
        "steps": run.recipe.num_steps,
        "seconds": round(progress["seconds"], 1),
        "images_per_second": round(images / max(progress["seconds"], 1e-9), 1),
        **provenance(),
        "config": run.config,
    }


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that the loop can save before it obeys; a second one is obeyed at once."""
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def handle(number, frame):
        received.append(number)
        for each, handler in handlers.items():
            signal.signal(each, handler)

    with contextlib.suppress(ValueError):  # not the main thread: signals are another's business
        handlers |= {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
