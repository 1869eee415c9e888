"""The paper's headline in slices of a GPU's time: `python -m rkd_jax.report.campaign --out DIR --minutes 9`.

Each slice goes on where DIR says that the last one stopped, ends before its minutes are over, and says what is next.
DIR/state is all that the next slice needs, on another machine too, and minutes old at most: docs/campaign.md.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from rkd_jax import _devices, _files, _flags, _memory, checkpoint, data, evaluate, experiment, run_folder
from rkd_jax.data import _prepared
from rkd_jax.report import cells, pack, paper, run

PAIR = "cifar100_res32x4_res8x4"
# Of DIR; of work, a part is: `Campaign.files`.
NOT_PACKED = ("state", ".state.new", ".state.old", "packed", "packed.new", "work", "data", "cache")


class Scale(NamedTuple):
    """How large a campaign is."""

    cells: str  # the scale of its cells
    margin: float  # seconds kept at a slice's end for the last save and for packing
    least: float  # seconds without which no training is begun or taken up: it would compile and stop
    pack: float  # seconds from one packing of the state to the next


SCALES = {
    "full": Scale("full", margin=45.0, least=90.0, pack=120.0),
    "smoke": Scale("tiny", margin=12.0, least=8.0, pack=5.0),
}


class Item(NamedTuple):
    """A part of the campaign: a benchmark, or runs, one after the other."""

    name: str
    members: tuple[cells.Cell, ...] = ()
    command: tuple[str, ...] = ()  # of a benchmark: the module and its flags
    seconds: float = 0.0  # that a benchmark is thought to take


def items(scale: str) -> list[Item]:
    """The campaign's list."""

    def students(name: str, *chosen: tuple[str, str]) -> Item:
        return Item(name, tuple(cells.Cell(pair, cell, 0) for pair, cell in chosen))

    def teacher(network: str) -> Item:  # its result stands in every column that has it as its teacher
        pairs = [pair for pair, title in paper.PAIRS.items() if title.startswith(f"{network} >") and "cifar" in pair]
        return students(f"teacher-{network}", *((pair, "teacher") for pair in pairs))

    ranking, small, benchmarks = "ranking_alignment", "cifar100_res56_res20", _benchmarks(scale)
    return [
        *benchmarks[:3],  # of the headline's pair; a lent device's first minutes are few
        teacher("resnet32x4"),
        students("headline", (PAIR, ranking)),
        students("headline-kd", (PAIR, "kd")),
        students("headline-cross_entropy", (PAIR, "cross_entropy")),
        *benchmarks[3:],
        *(students(f"headline-eps={eps}", (PAIR, f"{ranking}-eps={eps}-rank_scale=logits")) for eps in (0.1, 0.05)),
        # With a given teacher, or, but for the last of them, not at all.
        students("resnet56-resnet20-weak", (small, f"{ranking}-views=weak")),
        students("resnet56-resnet20", (small, ranking)),
        students("resnet56-resnet20-kd", (small, "kd")),
        students("resnet56-resnet20-cross_entropy", (small, "cross_entropy")),
        students("alone-resnet8x4", ("teachers.cifar100_resnet8x4", "cross_entropy")),
        teacher("wrn_40_2"),
        students("students-wrn_40_2", ("cifar100_wrn40_2_wrn16_2", ranking), ("cifar100_wrn40_2_wrn40_1", ranking)),
        teacher("vgg13"),
        students("students-vgg13", ("cifar100_vgg13_vgg8", ranking)),
    ]


def _benchmarks(scale: str) -> list[Item]:
    """The operator's, and two for each pair of networks."""
    if scale == "smoke":
        flags = ("--quick", "--peers", "while_loop")
        return [Item("soft_rank", command=("benchmarks.soft_rank", *flags), seconds=10)]
    steps = [
        Item(f"{stage}-{pair}", command=("benchmarks.train_step", "--pairs", pair, "--stages", stage), seconds=seconds)
        for pair in ("resnet32x4-resnet8x4", "resnet56-resnet20")
        for stage, seconds in (("stretch", 300), ("whole", 420))
    ]
    return [Item("soft_rank", command=("benchmarks.soft_rank", "--seconds", "4"), seconds=200), *steps]


class Campaign:
    """A campaign's folder, and the slice of it that is under way."""

    def __init__(
        self,
        out: Path,
        scale: str,
        minutes: float,
        data_dir: str,
        dtype: str | None,
        limit: int,
        chosen: Sequence[str] = (),
    ):
        self.out, self.scale, self.limit = out, scale, limit
        listed = {item.name: item for item in items(scale)}
        if unknown := [name for name in chosen if name not in listed]:
            raise ValueError(f"--items: {unknown[0]!r} is not in the list; it has {', '.join(listed)}")
        self._items = [item for item in listed.values() if item.name in (chosen or listed)]
        self.results, self.work = out / "results" / "tables", out / "work"
        self._start = time.monotonic()
        self._end = self._start + 60 * minutes - SCALES[scale].margin
        self._whole = 0.0  # seconds of this slice, once it has begun to work
        self._files_rest = threading.Lock()  # held by who packs the state, and while an item's files are moved
        self._holds_device = False
        self._record_path = out / "campaign.json"
        if not self._record_path.exists() and any((out / "state").glob("part-*")):
            pack.unpack(out / "state", out)
            self._note_packed(pack.state(out / "state"))
            print(f"unpacked {out / 'state'}")
        if (packed := pack.state(out / "state")) and packed not in _lines(out / "packed"):
            raise ValueError(
                f"--out={out}: state/ is not the state of what else it holds; put it into a new folder and name that, "
                "or remove it and go on with the rest"
            )
        self.record: dict[str, Any] = {"scale": scale, "items": {}}
        if self._record_path.exists():
            self.record = _files.read_json(self._record_path, "begin in a new folder, with state/", set(self.record))
        for flag, value in (("scale", scale), ("dtype", dtype)):
            there = self.record.get(flag, value)
            if value is not None and there != value:
                raise ValueError(f"--{flag}={value}: {out} holds a campaign of {there}; use that, or another --out")
        self._dtype = dtype
        self._data_dir = data_dir
        self._cells_scale = SCALES[scale].cells

    # What is to be done.

    def is_done(self, item: Item) -> bool:
        """Whether nothing is left to do about an item: it is done, or has failed."""
        return self.record["items"].get(item.name, {}).get("state") in ("done", "failed")

    def open_items(self) -> list[Item]:
        """The items that are left of those chosen, in order."""
        return [item for item in self._items if not self.is_done(item)]

    def lacking(self, item: Item) -> str:
        """The teacher that an item needs and that is neither there nor trained by it; "" where it can be run."""
        for cell in item.members:
            teacher = cells.configure(cell, self._cells_scale).teacher
            if teacher and run.find(self.out / "teachers", teacher) is None:
                return teacher
        return ""

    def plan(self, item: Item) -> list[run.Run]:
        """An item's runs."""
        fields = {"dtype": self.dtype(), "data_dir": self._data_dir}
        if self.scale == "full":
            fields["eval_batch_size"] = 2500  # a device that is lent has the memory
        folder, teachers = self.work / item.name, self.out / "teachers"
        return run.plan(item.members, self._cells_scale, folder, teachers, **fields)

    def dtype(self) -> str:
        """The networks' arithmetic: as the campaign has it so far, as the flag says, or as suits the device."""
        if "dtype" not in self.record:
            self.record["dtype"] = self._dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
        return self.record["dtype"]

    def left(self) -> float:
        """Seconds of this slice that are left for work."""
        return self._end - time.monotonic()

    def given(self, networks: Sequence[str]) -> None:
        """Notes teachers that were not trained here: the state is without them."""
        if networks:
            self.record["given"] = sorted({*self.record.get("given", ()), *networks})
            self._write()

    # Doing it.

    def check_data(self) -> None:
        """Loads the open items' data sets, or says that one is not there; takes no device: benchmarks need it whole."""
        for cell in {cell.pair: cell for item in self.open_items() for cell in item.members}.values():
            config = cells.configure(cell, self._cells_scale)
            config.data_dir = self._data_dir
            experiment.load_splits(experiment.Fields(config.to_dict()))

    def slice(self) -> bool:
        """Works through the list until the minutes are over; returns whether SIGTERM cut it off, as the timer does."""
        self._whole, cut_off = self.left(), False
        stopper = threading.Timer(max(self.left(), 0.1), os.kill, (os.getpid(), signal.SIGTERM))
        stopper.daemon = True
        before = signal.signal(signal.SIGTERM, _stop)  # where the loop of training does not take it
        over = threading.Event()
        packer = threading.Thread(target=self._keep_packed, args=(over,), name="packer", daemon=True)
        try:
            stopper.start()
            packer.start()
            for item in self.open_items():
                if not self._begin(item):
                    break
        except SystemExit as stop:
            if stop.code != 128 + signal.SIGTERM:
                raise
            cut_off = True
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stopper.cancel()
            over.set()
            if packer.ident:  # it was started
                packer.join()
            self.save()
            signal.signal(signal.SIGTERM, before)
        print(f"\nthis slice took {time.monotonic() - self._start:.0f} s\n{self.next()}", flush=True)
        return cut_off

    def _begin(self, item: Item) -> bool:
        """Takes up an item; False where this slice is over."""
        if item.command:
            begun = self.left()
            if self._holds_device or begun < min(item.seconds, 0.9 * self._whole):
                print(f"\n{item.name} is left for the next slice: it takes the device alone, for {item.seconds:.0f} s")
            elif facts := self._benchmark(item):
                self._note(item, **facts)
            elif begun >= 0.9 * self._whole:
                self._note(item, state="failed", note="not done within a slice; give more --minutes")
            return True
        if teacher := self.lacking(item):
            print(f"\n{item.name} is skipped: there is no {teacher}")
            self._note(item, state="skipped", note=f"there is no {teacher}; --teachers DIR names DIR/{teacher}")
            return True
        if self.left() < SCALES[self.scale].least:
            return False
        self._holds_device = True
        _devices.start()
        before = self.record["items"].pop(item.name, {})
        print(f"\n== {item.name}", flush=True)
        planned, errors = self.plan(item), {}
        self._write()  # the dtype
        for each in run.missing(planned, self.results, self._cells_scale):
            if self.left() < SCALES[self.scale].least:
                return False
            errors |= run.execute([each], self.results, self._cells_scale)
        note = {"note": "; ".join(f"{name}: {error}" for name, error in errors.items())} if errors else {}
        if any(isinstance(error, MemoryError) for error in errors.values()):  # perhaps others', and gone next time
            self._note(item, state="stopped", **note)
            return before.get("state") == "stopped"  # not for the first time: the others go on
        with _uninterrupted(), self._files_rest:
            facts = self._keep(item, planned)
            self._note(item, state="failed" if errors else "done", **facts, **note)
            self.save()
        return True

    def _benchmark(self, item: Item) -> dict[str, Any] | None:
        """Runs a benchmark in a process of its own, before this one takes the device; None: the slice was too short."""
        output = self.out / "results" / f"{item.command[0].split('.')[1]}.json"
        command = [sys.executable, "-m", *item.command, "--output", os.path.relpath(output, run.ROOT)]
        print(f"\n== {item.name}: python {' '.join(command[1:])}", flush=True)
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
        try:
            ran = subprocess.run(
                command, cwd=run.ROOT, capture_output=True, text=True, timeout=self.left() - 1, env=env
            )
        except subprocess.TimeoutExpired as error:
            print(f"{(error.stdout or b'').decode(errors='replace')}not done within this slice")
            return None
        if ran.returncode:
            said = ran.stdout + ran.stderr
            note = (said.strip() or f"exit {ran.returncode}").splitlines()[-1]
            print(f"{said}failed: {note}")
            stopped = self.record["items"].get(item.name, {}).get("state") == "stopped"
            # Memory that a process just ended still held is there the next time.
            again = not stopped and any(sign in said for sign in _devices.NO_MEMORY)
            return {"state": "stopped" if again else "failed", "note": note}
        print(ran.stdout, flush=True)
        return {"state": "done"}

    def _note(self, item: Item, **facts: Any) -> None:
        self.record["items"][item.name] = facts
        self._write()

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        _files.write_json(self._record_path, self.record)

    def _keep(self, item: Item, planned: Sequence[run.Run]) -> dict[str, Any]:
        """Of an item's runs, keeps the finished ones' best networks, as float16, and the curves; removes the rest."""
        speeds = {}
        for each in planned:
            cell = each.cells[0]
            if (metrics := each.folder / "metrics.jsonl").exists():
                curves = self.out / "results" / "curves" / item.name / each.config.student
                curves.mkdir(parents=True, exist_ok=True)
                shutil.copy(metrics, curves / f"{cell.name}.jsonl")
            if each.given or not (each.folder / "summary.json").exists():
                continue
            summary = _files.read_json(each.folder / "summary.json")
            speeds[cell.name] = summary["images_per_second"]
            network = self.out / "networks" / item.name / each.config.student / cell.name
            if cell.name == "teacher":
                network = self.out / "teachers" / each.config.student
                self.record["given"] = [name for name in self.record.get("given", ()) if name != network.name]
            halve(each.folder / "best", network)
            if cell.name == "teacher":  # measured as it is kept
                result = evaluate.evaluate(each.config, network)
                trained = {"top1": summary["best"]["top1"], **{k: summary[k] for k in ("commit", "device", "date")}}
                facts = {name: result[name] for name in ("top1", "top5", "loss")} | {"trained": trained}
                halve(network, network, **facts)
        shutil.rmtree(self.work / item.name, ignore_errors=True)
        return {"images_per_second": speeds}

    # What lasts.

    def files(self, halved: bool = True) -> dict[str, Path]:
        """What the next slice needs, by name: of runs under way the newest checkpoint, and the best network.

        Not the teachers that were given, for the same command names them again. Where `halved`, which is not for runs
        that are being trained, the best networks' kernels become float16 first.
        """
        found = [path for each in sorted(self.out.glob("*")) if each.name not in NOT_PACKED for path in _below(each)]
        given = {self.out / "teachers" / name for name in self.record.get("given", ())}
        found = [path for path in found if given.isdisjoint(path.parents)]
        for config in sorted(self.work.rglob("config.json")):
            folder = config.parent
            names = ("config.json", "metrics.jsonl", "summary.json")
            found += [folder / name for name in names if (folder / name).exists()]
            if (folder / "best").exists():
                if halved:
                    try:
                        halve(folder / "best", folder / "best")
                    except (OSError, ValueError) as error:
                        print(f"note: packed as it is: {error}")
                found += _below(folder / "best")
            if (step := _saved(folder)) and not (folder / "summary.json").exists():
                found += _below(folder / "checkpoints" / str(step))
        return {str(path.relative_to(self.out)): path for path in found}

    def save(self) -> None:
        """Packs the state, and says where it is too large."""
        self._write()
        size, folders = self._pack(self.files())
        said = f"state: {size / 2**20:.1f} MiB in {self.out / 'state'}"
        if size > self.limit:
            largest = sorted(folders.items(), key=lambda folder: -folder[1])[:8]
            said = (
                f"WARNING: {said} are more than --state_mib={self.limit >> 20}: "
                + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in largest)
                + ". Carry all parts all the same, or copy what is finished (networks/, teachers/ that no later item "
                "needs) elsewhere and delete it here"
            )
        print(said, flush=True)

    def _pack(self, files: dict[str, Path]) -> tuple[int, dict[str, int]]:
        return pack.pack(files, self.out / "state", self._note_packed)

    def _keep_packed(self, over: threading.Event) -> None:
        """Packs the state now and then, where it has changed, until the slice is over."""
        seldom = wait = SCALES[self.scale].pack
        packed, said = None, set()
        while not over.wait(wait):
            wait = seldom
            try:
                with self._files_rest:
                    files = self.files(halved=False)
                    found = _versions(files)
                    if found == packed:
                        continue
                    if found != _versions(self.files(halved=False)):  # a network is being replaced
                        raise FileNotFoundError
                    self._pack(files)
                    packed = found
            except FileNotFoundError:  # likewise, while it was read
                wait = min(1.0, seldom)
            except Exception as error:  # the disk is full, say; training goes on as long as it can
                if str(error) not in said:
                    said.add(str(error))
                    print(f"note: the state could not be packed: {error}", flush=True)

    def _note_packed(self, state: str) -> None:
        """Notes that DIR/state is, or is about to be, this one, which is that of the rest of DIR."""
        noted = self.out / "packed"
        _files.write_text(noted, "\n".join([*_lines(noted)[-1:], state]) + "\n")

    def next(self) -> str:
        """What is done, what failed or was skipped, and what is next, with the time that it will take."""
        listed, notes = items(self.scale), self.record["items"]
        done = [item for item in listed if notes.get(item.name, {}).get("state") == "done"]
        lines = [f"{len(done)} of {len(listed)} items are done"]
        for item in listed:
            facts = notes.get(item.name, {})
            if facts.get("state") in ("failed", "skipped", "stopped"):
                lines.append(f"{facts['state']}: {item.name}: {facts.get('note')}")
        waiting = [item for item in self.open_items() if notes.get(item.name, {}).get("state") != "skipped"]
        for i, item in enumerate(waiting):
            lines.append(f"{'then' if i else 'next'}: {item.name}, {self.estimate(item)}")
        chosen = "" if len(self._items) == len(listed) else " of the chosen items"
        return "\n".join(lines if waiting else [*lines, f"nothing is left{chosen}"])

    def estimate(self, item: Item) -> str:
        """How long an item will take, by the images per second measured in it."""
        if item.command:
            return f"about {timedelta(seconds=item.seconds)}"
        seconds, where, known = 0.0, "", "about"
        for each in run.missing(self.plan(item), self.results, self._cells_scale):
            config, folder = each.config, each.folder
            lines = _files.read_lines(folder / "metrics.jsonl")
            speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
            if not speeds:
                known = "more than"  # this run's time is not known yet
                continue
            images = len(experiment.load_splits(experiment.Fields(config.to_dict())).train.labels)
            steps, done = images // config.batch_size * config.num_epochs, _saved(folder)
            seconds += (steps - done) * config.batch_size / speeds[-1]
            where = f" from step {done:,} of {steps:,}"
        if known == "more than" and not where:
            return "time unknown"
        return f"{known} {timedelta(seconds=round(seconds))}{where} of training"


def halve(source: Path, target: Path, **facts: Any) -> None:
    """Writes a network with its kernels as float16, half its size, and `facts` added to its metadata."""
    if source == target and not facts and checkpoint.read_metadata(source).get("kernels") == "float16":
        return
    variables, metadata = checkpoint.load_network(source, field=str(source))
    variables = jax.tree.map(lambda x: x.astype(np.float16) if x.ndim > 1 else x, variables)
    checkpoint.save_network(target, variables, metadata | {"kernels": "float16"} | facts)


def _below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]


def _versions(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """By which it is seen whether one of some files has changed; FileNotFoundError where one is gone."""
    found = {name: path.stat() for name, path in files.items()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def _saved(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 where it has none."""
    return max((int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()), default=0)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGTERM waits until the end of what must not be done by half."""
    waiting: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if waiting:
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other slices out of a campaign's folder, which is not left behind where nothing was written."""
    there = out.exists()
    with run_folder.locked(out, "--out={}: another slice is under way there; wait for it, or stop it"):
        try:
            yield
        finally:
            if not there:
                with contextlib.suppress(OSError):  # it is not empty, or could not be made
                    out.rmdir()


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")


def _random_data(folder: Path) -> None:
    """Noise in the form of CIFAR-100, as its decoded cache."""
    if not (folder / "cifar100").exists():
        _prepared.write_cache("cifar100", folder, data.random("cifar100", 320, 100))


def _take_teachers(given: Path, target: Path, scale: str) -> list[str]:
    """Copies the teachers that are given and that the campaign has none of yet; returns their names."""
    taken = []
    for item in items(scale):
        for cell in item.members:
            network = cells.configure(cell, SCALES[scale].cells).teacher
            if network and run.find(target, network) is None and (found := run.find(given, network)):
                shutil.copytree(found, target / network)
                taken.append(network)
    return taken


def main(arguments: Sequence[str] | None = None) -> bool:
    """The command; returns whether a signal cut its slice off."""
    parser = argparse.ArgumentParser(prog="python -m rkd_jax.report.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the campaign's folder; DIR/state is enough to go on")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="of this slice; 0 unpacks and says what is next")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="smoke: a rehearsal of minutes on a CPU")
    parser.add_argument("--data_dir", default="", help="as config.data_dir; smoke without it: random images")
    parser.add_argument(
        "--teachers", type=_flags.folder, nargs="+", default=[run.ROOT / "teachers"], metavar="DIR",
        help="they hold teachers that need not be trained, as DIR/NAME or DIR/NAME/best; default: the repository's",
    )  # fmt: skip
    parser.add_argument("--items", nargs="+", default=(), metavar="ITEM", help="of the list these alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--state_mib", type=int, default=64, help="warn where DIR/state takes more")
    flags = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    _devices.cache_programs(flags.out / "cache")
    data_dir = flags.data_dir
    with _flags.one_sentence(flags), _alone(flags.out):
        if flags.scale == "smoke" and not data_dir:
            data_dir = str(flags.out / "data")
            _random_data(flags.out / "data")
        campaign = Campaign(
            flags.out, flags.scale, flags.minutes, data_dir, flags.dtype, flags.state_mib << 20, flags.items
        )
        if flags.minutes > 0:
            campaign.check_data()
        for folder in flags.teachers:
            campaign.given(_take_teachers(folder, flags.out / "teachers", flags.scale))
        if flags.minutes > 0:
            return campaign.slice()
        print(campaign.next())
    return False


if __name__ == "__main__":
    _memory.keep()
    if main():
        # All is saved and printed. Where the signal came in the midst of a compilation, the interpreter could crash as
        # it takes JAX down, and a slice that went well would end with a failure's status.
        os._exit(0)
