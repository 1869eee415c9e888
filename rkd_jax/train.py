"""The training loop: for each step, train; now and then, log, evaluate, save."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rkd_jax import (
    _devices,
    _files,
    _trees,
    data,
    experiment,
    feed,
    methods,
    models,
    optim,
    processes,
    provenance,
    run_folder,
    steps,
)  # fmt: skip
from rkd_jax.checkpoint import Checkpoints, read_metadata, save_network
from rkd_jax.metrics import Clock, Silent, Writer

# Fields that students of one program may have of their own, beside those of their methods.
PER_STUDENT = (
    "student", "student_fingerprint", "method", "seed", "data_seed", "view_reduction", "learning_rate", "schedule",
    "decay_epochs", "decay_factor", "lr_warmup_epochs", "optimizer", "momentum", "nesterov", "weight_decay",
)  # fmt: skip
TEACHER = ("teacher", "teacher_fingerprint", "teacher_normalization", "fold_teacher")
ASK_EVERY = 50  # steps, at most, until processes ask each other whether one was told to stop


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Runs a config in a folder, or goes on with the run that was interrupted there, and returns its summary.

    The folder then holds `config.json`, `parameters.txt`, `metrics.jsonl`, `tensorboard/`, `summary.json`, the networks
    `best/` and `last/`, and the training state under `checkpoints/`. A resumed run ends with the same bits as one never
    stopped.

    Raises:
      ValueError, FileNotFoundError: the config asks for what is not there (before anything is written).
      Diverged, a FloatingPointError: the loss is not finite; the last good checkpoint stays.
      MemoryError: the device's memory does not suffice; the last checkpoint stays.
      OSError: JAX can start no device, or the disk is full.
      SystemExit: SIGTERM or SIGINT came; the state is saved, or the run is finished.
    """
    return train_together([(config, workdir)])[0]


def train_together(members: Sequence[tuple[ConfigDict, str | os.PathLike]]) -> list[dict[str, Any]]:
    """Runs several configs, each in its folder, in one program: every batch is made, and taught, once for all of them.

    They may differ in the student, its seed, its method and its optimizer (see `PER_STUDENT`), and share everything
    else, `data_seed` too. Each folder ends as `train_and_evaluate` would leave it, but for rounding where XLA compiles
    the larger program in another way, or a method that resumes the teacher (fcfd) keeps that of all from being folded.
    Members that are finished are not run again; those that were interrupted at different steps go on in groups. Returns
    the summaries, and raises as `train_and_evaluate` does; `Diverged` once the others are finished.
    """
    for field in ("sweep", "compare"):
        if any(config.get(field) for config, _ in members):
            raise ValueError(f"config.{field} is several runs, which rkd_jax.runs.run does; unset it here")
    _devices.start()
    processes.meet()
    runs = processes.everywhere(lambda: [experiment.build(config) for config, _ in members])
    folders = [Path(workdir) for _, workdir in members]
    if jax.process_count() > 1:
        processes.check_alike(_computed(runs, folders))
    mesh = steps.data_mesh(runs[0].recipe.batch_size)
    _check_shared(runs, folders)

    claimed: list[Path] = []  # by this call, in process 0

    def start() -> list[Any]:
        for run, folder in zip(runs, folders, strict=True):
            if run_folder.claim(folder, run.config, alone=locks.enter_context(run_folder.locked(folder))):
                claimed.append(folder)
        return [run_folder.finished(folder) for folder in folders]

    with contextlib.ExitStack() as locks, contextlib.ExitStack() as stack:
        stack.callback(lambda: [run_folder.release(folder) for folder in claimed])
        summaries = processes.in_lead(start)
        open_ones = [i for i, summary in enumerate(summaries) if summary is None]
        if processes.leads() and len(open_ones) < len(members):
            finished = [folder for folder, summary in zip(folders, summaries, strict=True) if summary is not None]
            print("\n".join(f"{folder} holds this run, finished; nothing to do" for folder in finished))
        students: list[Student] = []
        for i in open_ones:
            students.append(Student(runs[i], folders[i], folders[i].name if len(members) > 1 else ""))
            stack.callback(students[-1].close)
        left = students
        while left:
            group, step = _restore(left)
            with _devices.memory(_smaller(group)):
                _train(group, step, mesh)
            left = [student for student in left if student not in group]
    processes.meet()  # what process 0 wrote is there now, for all: a chain's next run reads it
    for i, student in zip(open_ones, students, strict=True):
        summaries[i] = student.summary or None
    if failed := [student for student in students if student.bad_step is not None]:
        raise Diverged(failed, summaries)
    return summaries


def _train(students: Sequence["Student"], start: int, mesh: Mesh) -> None:
    """The loop, from step `start` on: for each call of the step, train; now and then, log, evaluate, save."""
    run = students[0].run
    loop, recipe, split = run.loop, run.recipe, run.splits.train
    data_rng, spe = jax.random.key(run.data_seed), recipe.steps_per_epoch
    states = steps.replicate(tuple(student.state for student in students), mesh)
    totals = [steps.replicate(student.totals(), mesh) for student in students]
    taught = [student.run for student in students if student.run.teacher]
    # A teacher that one of them resumes is not folded, and serves the others as well.
    teaching = max(taught, key=lambda run: run.method.resumes_teacher, default=run)
    recipe = recipe._replace(teacher_normalization=teaching.recipe.teacher_normalization)
    train_step = steps.make_train_step([student.run.learner for student in students], teaching.teacher, recipe, mesh)

    plan = feed.calls(start, recipe.num_steps, spe, loop.steps_per_call, loop.log_every, loop.eval_every)
    streams = feed.streams(run.config["stream"], split)
    rngs = tuple(jax.random.key(student.run.config["seed"]) for student in students)
    inputs = steps.Inputs(data_rng, rngs, *((None, None) if streams else split), teaching.teacher_variables)
    inputs = steps.replicate(inputs, mesh)
    if streams:
        source = feed.streamed(plan, data_rng, spe, split, mesh, recipe.batch_size)
    else:
        source = feed.resident(plan, data_rng, spe, split, mesh)

    # By network: one program for all students that have it.
    eval_steps = {student.run.config["student"]: _eval_step(student.run, mesh) for student in students}
    for student in students:
        student.open(start, eval_steps[student.run.config["student"]])
    clock = Clock(*max((student.progress["seconds"], student.progress["timed_steps"]) for student in students))
    saved = time.monotonic()
    compiled: set[int] = set()  # counts of steps a call that there is a program for
    with _signals() as received, contextlib.closing(source):
        for call in source:
            if fresh := call.count not in compiled:  # this call compiles, which the clock does not count
                clock.stop(int(states[0].step))  # waits for the device
                compiled.add(call.count)
            states, new = train_step(states, inputs, call.source, call.count)
            totals = [steps.accumulate(*pair) for pair in zip(totals, new, strict=True)]
            students[0].writer.advance(call.count)

            done = call.step + call.count
            last = done == recipe.num_steps
            log, evaluate = (last or done % every == 0 for every in (loop.log_every, loop.eval_every))
            # Of several processes, any may be told to stop, and all do so together: now and then they ask each other.
            ask = log or evaluate or done // ASK_EVERY > call.step // ASK_EVERY
            stop = bool(received) if jax.process_count() == 1 else ask and processes.anywhere(bool(received))
            save = last or stop or time.monotonic() - saved >= loop.checkpoint_seconds
            if not (log or evaluate or save or fresh):
                continue

            for student, state in zip(students, states, strict=True):
                student.check(state)  # waits for the device
            # Of several processes, none leaves where the others may not have looked: each saves by its own clock.
            agreed = jax.process_count() == 1 or log or evaluate or stop or fresh
            if agreed and all(student.bad_step is not None for student in students):
                return
            clock.stop(done)
            sound = [i for i, student in enumerate(students) if student.bad_step is None]
            if log:
                speed = clock.rate() * recipe.batch_size
                for i in sound:
                    students[i].log(done, totals[i], speed)
                totals = [{} for _ in students]
            if evaluate:
                for i in sound:
                    students[i].evaluate(done, states[i])
            if save:
                for i in sound:
                    students[i].save(done, states[i], totals[i], clock)
                saved = time.monotonic()
            if stop and not last:
                why = f"saved at step {done}; the same command goes on from there"
                raise SystemExit(students[0].stop(received, why))
            clock.start(done)
        for student in students:
            if student.bad_step is None:
                student.finish(together=len(students))
        if processes.anywhere(bool(received)):  # during the last call, test or save
            raise SystemExit(students[0].stop(received, "the run is finished, and what would follow it is left"))


def _eval_step(run: experiment.Experiment, mesh: Mesh) -> Callable[..., Any]:
    """In float32, whatever config.dtype is, as `rkd_jax.evaluate` and exports have it."""
    network = models.create(run.config["student"], run.splits.num_classes, image_size=run.splits.test.images.shape[1])
    return steps.make_eval_step(network, run.recipe.student_normalization, mesh)


class Student:
    """One student's run on disk: its folder, its checkpoints, its numbers."""

    def __init__(self, run: experiment.Experiment, workdir: Path, label: str):
        self.run, self.workdir = run, workdir
        self.writer: Writer | Silent = Silent()
        self.summary: dict[str, Any] = {}
        self.bad_step: int | None = None  # the first whose loss or update was not finite
        self._label = label
        self._checkpoints = Checkpoints(workdir / "checkpoints") if processes.leads() else None
        with _devices.memory("take a smaller config.student, or lower what makes its method's own arrays large"):
            key = jax.random.key(run.config["seed"])
            self.state = steps.run_once(run.create_state, key, run.student_variables)
        self.parameters = models.count_parameters(self.state.params["student"])
        self.progress: dict[str, Any] = {"best": None, "last": None, "totals": {}, "seconds": 0.0, "timed_steps": 0}
        self._networks: dict[str, tuple[Any, dict[str, Any]]] = {}  # not on disk yet: variables and metadata, by name

    def saved(self) -> list[int]:
        """The steps that it has checkpoints of; process 0 looks."""
        return processes.agree(sorted(self._checkpoints.steps()) if self._checkpoints else [])

    def read(self, step: int) -> tuple[Any, dict[str, Any]] | None:
        """The state and the progress of a checkpoint; None where it is damaged."""
        states = self._checkpoints
        found = processes.everywhere(lambda: states.restore(self.state, step) if states else None)
        if not processes.agree(found is not None):
            return None
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.state)
        state, progress = found or (template, None)
        return processes.agree_arrays(state), processes.agree(progress and self._with_best(progress, step))

    def _with_best(self, progress: dict[str, Any], step: int) -> dict[str, Any]:
        """A checkpoint's progress, with the best network that lies in the folder.

        Networks are written before the checkpoint that tells of them. A kill between the two leaves one of a later
        step, which the run comes to again, on a GPU perhaps with other rounding.
        """
        with contextlib.suppress(OSError, ValueError, LookupError):  # not there, or damaged: it is written again
            found, best = read_metadata(self.workdir / "best"), progress["best"]
            if best and (found.get("step") or 0) > step and found["top1"] > best["top1"]:
                return progress | {"best": {name: found.get(name) for name in best}}
        return progress

    def totals(self) -> dict[str, np.ndarray]:
        """The sums of the metrics since the last log."""
        return {name: np.float32(value) for name, value in self.progress["totals"].items()}

    def open(self, start: int, eval_step: Callable[..., Any]) -> None:
        """Ready to test, and to write: what was written beyond step `start` is dropped."""
        self._eval_step = eval_step
        if not self._checkpoints:
            return
        self._checkpoints.drop_after(start)
        _write_overview(self.state.params["student"], self.workdir / "parameters.txt")
        recipe = self.run.recipe
        self.writer = Writer(
            self.workdir, start, recipe.num_steps, recipe.steps_per_epoch, recipe.batch_size, self._label
        )
        self.writer.say(_headline(self.run, self.parameters, start))

    def check(self, state: steps.TrainState) -> None:
        """Looks whether a loss or an update was NaN or infinite; no step after it is logged, tested or saved."""
        if self.bad_step is None and (step := int(state.bad_step)) >= 0:
            self.bad_step = step
            self._write_networks()
            if self._label:
                self.writer.say(f"step {step:,} is not finite; the other students go on")

    def log(self, step: int, totals: Mapping[str, jax.Array], speed: float) -> None:
        """Writes the means of the metrics since the last log, and the speed in images per second."""
        sums = jax.device_get(totals)
        names = sorted(set(sums) - {"count"}, key=lambda name: (name != "loss", name))
        means = {name: float(sums[name] / sums["count"]) for name in names}
        rate = float(self.run.schedule(step - 1))
        self.writer.write(step, "train", means | {"learning_rate": rate, "images_per_second": speed})

    def evaluate(self, step: int, state: steps.TrainState) -> None:
        """Tests the network, and keeps it as the last and, where it is, the best, to be saved with the next checkpoint.

        Not at once: a network of many small arrays takes longer to write than a GPU takes for a hundred steps.
        """
        run, variables = self.run, {"params": state.params["student"], "batch_stats": state.batch_stats}
        images = jax.ShapeDtypeStruct((1, *run.splits.test.images.shape[1:]), np.float32)
        variables = run.method.deploy(run.student, images, variables, state.params["method"], state.method_state)
        size = self.run.loop.eval_batch_size
        result = {"step": step, **steps.evaluate(self._eval_step, variables, *self.run.splits.test, size)}
        self.writer.write(step, "test", {name: result[name] for name in ("top1", "top5", "loss")})
        result = _files.plain(result)
        best = self.progress["best"] is None or result["top1"] > self.progress["best"]["top1"]
        variables = jax.device_get(variables) if processes.leads() else None  # the next step takes the device's
        network = variables, _facts(self.run, result)
        for name in ("last", "best") if best else ("last",):
            self.progress[name], self._networks[name] = result, network

    def _write_networks(self) -> None:
        for name, (variables, metadata) in self._networks.items():
            if processes.leads():
                save_network(self.workdir / name, variables, metadata)
        self._networks = {}

    def save(self, step: int, state: steps.TrainState, totals: Mapping[str, jax.Array], clock: Clock) -> None:
        """Writes the networks of the tests since the last checkpoint, and a checkpoint."""
        self._write_networks()
        self.progress |= {"totals": {k: float(v) for k, v in totals.items()}}
        self.progress |= {"seconds": clock.seconds, "timed_steps": clock.steps}
        if self._checkpoints:
            self._checkpoints.save(step, state, self.progress)

    def stop(self, received: Sequence[int], why: str) -> int:
        """Says that a signal, of this process or of another, ends the command; returns its exit status."""
        number = received[0] if received else signal.SIGTERM
        self.writer.say(f"{signal.Signals(number).name}: {why}")
        return 128 + number

    def finish(self, together: int) -> None:
        """Writes the summary of a program of so many students."""
        self.summary = _summary(self.run, self.progress, self.parameters, together)
        if processes.leads():
            _files.write_json(self.workdir / "summary.json", self.summary)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.writer.close()
        if self._checkpoints:
            self._checkpoints.close()


class Diverged(FloatingPointError):
    """Students whose loss or update was NaN or infinite; `summaries` has None for each, and those of the others."""

    def __init__(self, students: Sequence[Student], summaries: Sequence[dict[str, Any] | None]):
        self.summaries = list(summaries)
        first = students[0]
        where = "" if len(summaries) == 1 else f" of {', '.join(str(student.workdir) for student in students)}"
        kept = f"; {first.workdir} holds the run to before it, and another config needs another --workdir"
        mend = "Lower config.learning_rate, or the weight of the method's loss"
        if first.bad_step == 0:
            mend += ", or look at its formula, for nothing had been learned yet"
        super().__init__(
            f"the loss or the update of step {first.bad_step}{where} is not finite. "
            f"{mend}{kept if run_folder.has_begun(first.workdir) else ''}"
        )


def _smaller(students: Sequence[Student]) -> str:
    """What to do where the device's memory does not suffice for a step of these students."""
    config, first = students[0].run.config, students[0].workdir
    ways = ["lower config.batch_size"]
    if len(students) > 1:
        ways.append("train fewer students together")
    if config["dtype"] == "float32":
        ways.append("take config.dtype=bfloat16")
    if not feed.streams(config["stream"], students[0].run.splits.train):
        ways.append("keep the training set off the device by config.stream=True")
    kept = f"; {first} holds the run so far, and another batch size or dtype needs another --workdir"
    return ", or ".join(ways) + (kept if run_folder.has_begun(first) else "")


def _computed(runs: Sequence[experiment.Experiment], folders: Sequence[Path]) -> dict[str, Any]:
    """What makes the numbers of runs, by name: the same in all processes, or they would train apart."""
    facts: dict[str, Any] = {"the number of runs": len(runs)}
    for run, folder in zip(runs, folders, strict=True):
        found = {f"config.{name}": value for name, value in run.config.items() if name not in run_folder.NOT_COMPUTED}
        found["the digest of the images of config.dataset"] = found.pop("config.data_fingerprint")
        found["whether the set is streamed (config.stream)"] = feed.streams(run.config["stream"], run.splits.train)
        facts |= {f"{folder.name}: {name}" if len(runs) > 1 else name: value for name, value in found.items()}
    return facts


def _check_shared(runs: Sequence[experiment.Experiment], folders: Sequence[Path]) -> None:
    """ValueError where runs of one program differ in what they share, naming the field."""
    if len(set(folders)) < len(folders):
        raise ValueError("two of the runs that train together have the same folder; give each its own")

    def check(i: int, other: int, names: Iterable[str]) -> None:
        for name in names:
            here, there = runs[i].config.get(name), runs[other].config.get(name)
            if here != there:
                raise ValueError(
                    f"runs that train together share config.{name}, which is {there!r} in {folders[other]} and "
                    f"{here!r} in {folders[i]}; train them apart, or with one value"
                )

    first = runs[0]
    for i, run in enumerate(runs[1:], start=1):
        own = {*PER_STUDENT, *TEACHER, "teacher_checkpoint", "student_checkpoint"}
        own |= {*methods.hyperparameters(run.method), *methods.hyperparameters(first.method)}
        # Of views of one's own, the fields of the others are None.
        check(i, 0, ("views", *(name for name in run.config if name not in own)))
        if run.data_seed != first.data_seed:
            raise ValueError(
                f"runs that train together see the same images, and the seed is {first.data_seed} in "
                f"{folders[0]} and {run.data_seed} in {folders[i]}; set config.data_seed, the same for all"
            )
    taught = [i for i, run in enumerate(runs) if run.teacher is not None]
    for i in taught[1:]:
        check(i, taught[0], TEACHER)


def _restore(students: Sequence[Student]) -> tuple[list[Student], int]:
    """The first student, those that can go on with it, and the newest step that each has a whole checkpoint of, or 0.

    They are taken back to that step. ValueError where one had checkpoints, and all turn out to be damaged.
    """
    while True:
        group, common = [], set(students[0].saved()) or {0}
        for student in students:
            if both := common & (set(student.saved()) or {0}):
                common = both
                group.append(student)
        if (step := max(common)) == 0:
            return group, 0
        found = [student.read(step) for student in group]
        if None not in found:
            for student, (state, progress) in zip(group, found, strict=True):
                student.state, student.progress = state, progress
            return group, step
        if lost := [student.workdir for student in group if not student.saved()]:
            raise ValueError(
                f"{' and '.join(map(str, lost))}: no checkpoint is whole, and those that are not are set aside as "
                "damaged-STEP; the same command now starts anew there, and overwrites what else is left of the run"
            )


def _facts(run: experiment.Experiment, result: dict[str, Any]) -> dict[str, Any]:
    """A trained network's metadata."""
    known = {"class_names": run.splits.class_names} if run.splits.class_names else {}
    return known | {
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
        "loss": result["loss"],
    }


def _headline(run: experiment.Experiment, parameters: int, start: int) -> str:
    config, method = run.config, run.method
    names = methods.hyperparameters(method)
    with_fields = ", ".join(f"{name}={config[name]}" for name in names)
    teacher = f" from {config['teacher']}" if method.needs_teacher else ""
    used = ("learning_rate", *optim.taken(config["optimizer"]))
    options = ", ".join(f"{name}={config[name]}" for name in used)
    height, width, _ = run.splits.train.images.shape[1:]
    return (
        f"{config['student']} ({parameters:,} parameters) learns {config['dataset']}{teacher} by {config['method']}"
        + (f" ({with_fields})" if names else "")
        + f": {len(run.splits.train.labels):,} training and {len(run.splits.test.labels):,} test images of "
        + f"{height}x{width} in {run.splits.num_classes} classes, {run.recipe.num_steps:,} steps of "
        + f"{run.recipe.batch_size}, seed {config['seed']}, "
        + f"on {provenance.device_name()}"
        + (" | SMOKE" + (": random images" if data.form(config["dataset"]) else "") if config["smoke"] else "")
        + (f" | optimizer {config['optimizer']} ({options})" if config["optimizer"] != "sgd" else "")
        + (f" | schedule {config['schedule']}" if config["schedule"] != "step" else "")
        + (f" | goes on from step {start:,}" if start else _begins_with(run))
        + _not_reached(run)
    )


def _begins_with(run: experiment.Experiment) -> str:
    if not (path := run.config["student_checkpoint"]):
        return ""
    leaves = jax.tree_util.tree_leaves_with_path(run.student_variables, is_leaf=lambda x: x is None)
    new = dict.fromkeys(_trees.name(where[1:-1] or where) for where, leaf in leaves if leaf is None)
    return f" | begins with {path}" + (f", {' and '.join(new)} new for other classes" if new else "")


def _not_reached(run: experiment.Experiment) -> str:
    """What of the rate's schedule a run is too short for."""
    config, epochs = run.config, run.recipe.num_steps / run.recipe.steps_per_epoch
    decays, warmup = config["decay_epochs"], config["lr_warmup_epochs"]
    if config["smoke"]:
        return ""
    falls = f" | the rate never falls: config.decay_epochs={decays}" if decays and min(decays) >= epochs else ""
    rises = f" | the rate rises to the end: config.lr_warmup_epochs={warmup}" if warmup > epochs else ""
    return falls + rises


def _write_overview(params: Any, path: Path) -> None:
    """Writes clu's table of a network's parameters, where clu is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        from clu import parameter_overview

        path.write_text(parameter_overview.get_parameter_overview(params) + "\n")


def _summary(run: experiment.Experiment, progress: Mapping[str, Any], parameters: int, together: int) -> dict[str, Any]:
    images = progress["timed_steps"] * run.recipe.batch_size
    return {
        "best": progress["best"],
        "last": progress["last"],
        "parameters": parameters,
        "steps": run.recipe.num_steps,
        "seconds": round(progress["seconds"], 1),
        "together": together,  # students in the program that took these seconds
        "images_per_second": round(images / progress["seconds"], 1) if progress["seconds"] else None,
        **provenance.record(),
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
