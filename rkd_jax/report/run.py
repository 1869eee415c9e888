"""Runs what the paper's tables need and is not yet in the results: `python -m rkd_jax.report.run --table 4`.

Interrupted, the same command goes on where it was. Several of them share the work, where folders can be locked.
`python -m rkd_jax.report.tables` prints the tables.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from rkd_jax import _devices, _files, _flags, _memory, evaluate, experiment, provenance, run_folder, runs, train
from rkd_jax.methods import takd
from rkd_jax.report import cells, paper

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    """What is run once, for one or more cells."""

    name: str  # of its folder: data set, networks, cell, seed
    folder: Path
    config: ConfigDict
    cells: list[cells.Cell]
    given: Path | None = None  # a network that is there: evaluated, not trained

    @property
    def network(self) -> Path:
        """Its network, where another run has it as its teacher."""
        return self.given or self.folder / "best"

    @property
    def group(self) -> tuple:
        """Runs of one group have their data, views, teacher (if any) and seed in common, and may be run as one."""
        pair, name, seed = self.cells[0]
        alone = name == "teacher" or isinstance(experiment.create_method(self.config), takd.Method)
        return pair, seed, self.name if alone else ""


def plan(chosen: Iterable[cells.Cell], scale: str, workdir: Path, *teachers: Path, **fields: Any) -> list[Run]:
    """The runs of some cells, the teachers' first; `teachers`: folders that may hold some; `fields`: of every run's
    config, such as dtype.

    Cells with the same config share a run: pairs with one teacher, or one student alone, in common, and many in a toy.
    """
    found: dict[str, Run] = {}

    def add(cell: cells.Cell) -> Run:
        config = cells.configure(cell, scale)
        config.update(fields)
        if config.teacher:
            config.teacher_checkpoint = str(add(cell._replace(name="teacher", seed=0)).network)
        name = f"{_place(config)}/{cell.name}-seed{cell.seed}"
        if name not in found:
            given = None
            if cell.name == "teacher" and cells.SCALES[scale].toy is None:
                given = next(filter(None, (find(folder, config.student) for folder in teachers)), None)
            found[name] = Run(name, workdir / scale / name, config, [], given)
        if cell not in found[name].cells:
            found[name].cells.append(cell)
        return found[name]

    for cell in chosen:
        add(cell)
    return sorted(found.values(), key=lambda run: run.cells[0].name != "teacher")


def _place(config: ConfigDict) -> str:
    return "_".join(filter(None, (config.dataset, config.teacher, config.student)))


def find(teachers: Path, network: str) -> Path | None:
    """The folder of a network under `teachers`: NAME or NAME/best, as written or in lower case."""
    for path in (teachers / network, teachers / network.lower()):
        for folder in (path, path / "best"):
            if (folder / "metadata.json").is_file():
                return folder
    return None


def missing(planned: Sequence[Run], results: Path, scale: str) -> list[Run]:
    """The runs that lack a result, and the unfinished teachers that those need.

    ValueError for a damaged result.
    """

    def done(cell: cells.Cell) -> bool:
        path = cell.path(results, scale)
        return path.exists() and bool(cells.read(path))

    lacking = {run.name for run in planned if not all(map(done, run.cells))}
    needed = {run.config.teacher_checkpoint for run in planned if run.name in lacking}
    gone = {
        run.name
        for run in planned
        if str(run.network) in needed and not run.given and not (run.folder / "summary.json").exists()
    }
    return [run for run in planned if run.name in lacking | gone]


def groups(todo: Iterable[Run], together: int) -> list[list[Run]]:
    """The runs in groups of at most `together`, in order."""
    found: dict[tuple, list[Run]] = {}
    for run in todo:
        found.setdefault(run.group, []).append(run)
    return [group[i : i + together] for group in found.values() for i in range(0, len(group), together)]


def execute(todo: Sequence[Run], results: Path, scale: str, together: int = 1) -> dict[str, Exception]:
    """Runs what is to be run and writes its cells' results; returns the errors of runs that failed, by their names.

    Where one of a group diverges, or the device's memory does not suffice for it, its runs go on one by one. A run that
    another process makes is left to it: `run_folder.Held` among the errors. A teacher's error is that of its students.
    """
    for config in {run.config.dataset: run.config for run in todo}.values():
        experiment.load_splits(experiment.Fields(config.to_dict()))  # what is not there is said before the first run
    errors: dict[str, Exception] = {}
    queue, networks = groups(todo, together), {str(run.network): run for run in todo}
    for place, group in enumerate(queue, start=1):
        names = ", ".join(run.name for run in group)
        print(f"\n[{place}/{len(queue)}] {names}", flush=True)
        try:
            teacher = networks.get(group[0].config.teacher_checkpoint)
            if teacher and teacher.name in errors and not (teacher.folder / "summary.json").exists():
                raise errors[teacher.name]
            summaries = summarize(group)
        except (FloatingPointError, MemoryError, run_folder.Held) as error:
            print(error if isinstance(error, run_folder.Held) else f"Error: {error}")
            if len(group) > 1:
                queue += [[run] for run in group]
            else:
                errors[names] = error
            continue
        for run, summary in zip(group, summaries, strict=True):
            for cell in run.cells:
                write(cell, run, summary, results, scale)
        jax.clear_caches()
    return errors


def summarize(group: Sequence[Run]) -> list[dict[str, Any]]:
    """The summaries of a group's runs: trained, or of a network that is there, evaluated."""
    if group[0].given:
        (run,) = group
        result = evaluate.evaluate(run.config, run.given, "--teachers")
        return [{"best": result, "last": result, "given": str(run.given), **provenance.record()}]
    return train_members([(run.config, run.folder) for run in group])


def train_members(members: Sequence[tuple[ConfigDict, Path]]) -> list[dict[str, Any]]:
    """Trains a group's runs in one program; each goes on where it was."""
    return train.train_together(members) if len(members) > 1 else [runs.distil(*members[0])]


def write(cell: cells.Cell, run: Run, summary: dict[str, Any], results: Path, scale: str) -> None:
    """Writes a cell's file, whole or not at all."""
    path = cell.path(results, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"scale": scale, "pair": cell.pair, "cell": cell.name, "seed": cell.seed}
    record = place | {"run": run.name} | summary
    _files.write_json(path, record)


def describe(planned: Sequence[Run], todo: Sequence[Run], scale: str) -> str:
    """The plan as text."""
    waiting = {run.name for run in todo}
    lines = [f"scale {scale}: {cells.SCALES[scale].text}"]
    for run in planned:
        if run.name not in waiting:
            state = "in results"
        elif run.given:
            state = "evaluate"
        else:
            state = "go on" if (run.folder / "config.json").exists() else "run"
        where = f", {run.given}" if run.given else ""
        lines.append(f"{state:10}  {run.name}{where} ({len(run.cells)} cell{'s' * (len(run.cells) > 1)})")
    total = sum(len(run.cells) for run in planned)
    return "\n".join([*lines, f"{len(planned)} runs for {total} cells; {len(todo)} to be run"])


def add_flags(parser: argparse.ArgumentParser, results: Callable[[str], Path] = Path) -> None:
    """The flags that the tables have too; `results`: the type of --results."""
    numbers = sorted({table.number for table in paper.TABLES})
    choices = (*map(str, numbers), "all")
    parser.add_argument("--table", nargs="+", choices=choices, default=["all"], help="the paper's; default: all")
    parser.add_argument("--scale", choices=tuple(cells.SCALES), default="full", help="docs/tables.md; default: full")
    parser.add_argument(
        "--results", type=results, default=Path("results/tables"), help="where the results are; default: results/tables"
    )


def table_numbers(given: Sequence[str]) -> list[int]:
    """The numbers that --table names."""
    return sorted({table.number for table in paper.TABLES if "all" in given or str(table.number) in given})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rkd_jax.report.run", description=__doc__)
    add_flags(parser)
    parser.add_argument("--seeds", type=_flags.positive, default=3, help="this many, from 0; default: 3")
    parser.add_argument("--only", nargs="+", default=(), metavar="PAIR", help="pairs by their configs' names")
    parser.add_argument("--methods", nargs="+", default=(), metavar="METHOD", help="these methods alone, or teacher")
    parser.add_argument(
        "--teachers", type=_flags.folder, nargs="+", metavar="DIR",
        default=[Path("runs/teachers"), Path(os.path.relpath(ROOT / "teachers"))],
        help="where a teacher is looked for, as DIR/NAME or DIR/NAME/best; default: runs/teachers, then the "
        "repository's teachers",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=Path, default="runs/report", help="where the runs are kept; default: runs/report"
    )
    parser.add_argument("--together", type=_flags.positive, default=1, help="train up to this many of a pair as one")
    parser.add_argument("--data_dir", help="as config.data_dir")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="as config.dtype, of every run")
    parser.add_argument("--eval_batch_size", type=_flags.positive, help="as config.eval_batch_size")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    flags = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    with _flags.one_sentence(flags):
        chosen = cells.select(table_numbers(flags.table), flags.seeds, flags.only, flags.methods)
        fields = {name: getattr(flags, name) for name in ("data_dir", "dtype", "eval_batch_size")}
        fields = {name: value for name, value in fields.items() if value is not None}
        planned = plan(chosen, flags.scale, flags.workdir, *flags.teachers, **fields)
        todo = missing(planned, flags.results, flags.scale)
        print(describe(planned, todo, flags.scale), flush=True)
        if flags.dry_run:
            return
        _memory.keep()
        _devices.cache_programs(_files.cache())
        errors = execute(todo, flags.results, flags.scale, flags.together)
        where = ("--table", *flags.table, "--scale", flags.scale, "--results", str(flags.results))
        print(f"\nThe results are in {flags.results / flags.scale}; the tables are printed by")
        print(shlex.join(["python", "-m", "rkd_jax.report.tables", *where]))
    held = [name for name, error in errors.items() if isinstance(error, run_folder.Held)]
    if held:
        print("\n".join(["These are left to another process, which makes them or their teacher:", *held]))
    if failed := [f"{name}: {error}" for name, error in errors.items() if name not in held]:
        sys.exit("\n".join(["Error: these runs failed; the others are done:", *failed]))


if __name__ == "__main__":
    main()
