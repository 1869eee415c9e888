"""Prints the paper's tables with our results beside its numbers: `python -m rkd_jax.report.tables --table 4`."""

import argparse
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rkd_jax import _flags
from rkd_jax.report import cells, paper, run

Found = dict[tuple[str, str], list[dict[str, Any]]]  # pair and cell -> the results, by seed

NOTE = (
    "Top-1 accuracy in percent. *Paper*, and numbers in brackets: as the paper states them. *Best*, *last*: ours, of "
    "the best and of the last epoch; mean ± standard deviation over seeds. Empty: not in the paper, or not run. Our "
    "student alone (CE) and KD have the views and epochs of the paper's method; the paper's numbers for them are, on "
    "CIFAR-100, those that RepDistiller published, of 240 epochs on one weak view."
)
DIFFERENCE = " *Difference*: our best minus the paper's number."


def load(results: Path, scale: str) -> Found:
    """The results of a scale; ValueError for a damaged one, and where those of one pair had different teachers."""
    found: Found = {}
    fingerprints: dict[str, str] = {}
    for path in sorted((results / scale).glob("*/*.json")):
        result = cells.read(path)
        found.setdefault((result["pair"], result["cell"]), []).append(result)
        config = result.get("config", {})
        teacher = config.get("teacher_fingerprint")
        if not teacher or config.get("assistant"):  # takd's last teacher is its assistant
            continue
        if fingerprints.setdefault(result["pair"], teacher) != teacher:
            raise ValueError(f"{path} had another teacher than the pair's other results; remove the older of them")
    return found


def markdown(numbers: Collection[int], scale: str, found: Found) -> str:
    """The tables: as the paper has them where they have several pairs, and then a part for each pair."""
    size = cells.SCALES[scale]
    note = NOTE + (DIFFERENCE if not size.is_toy else "")
    lines = [f"# The paper's tables, scale {scale}", "", f"Scale {scale}: {size.text}.", "", note]
    for table in (table for table in paper.TABLES if table.number in numbers):
        lines += ["", f"## Table {table.number}: {table.title} (scale {scale})"]
        lines += ["", *overview(table, found)] if len(table.pairs) > 1 else []
        for column, pair in enumerate(table.pairs):
            lines += ["", f"### {paper.PAIRS[pair]}", "", *part(table, column, scale, found)]
    return "\n".join(lines) + "\n"


def overview(table: paper.Table, found: Found) -> list[str]:
    """The lines of a table in the paper's form: our best, and in brackets the paper's number."""
    rows = [
        [
            row.name,
            *(_both(found.get((pair, row.cell), []), x) for pair, x in zip(table.pairs, row.numbers, strict=True)),
        ]
        for row in table.rows
    ]
    return _lines(["best (paper)", *(paper.PAIRS[pair] for pair in table.pairs)], rows)


def _both(ours: Sequence[Mapping[str, Any]], number: float | None) -> str:
    return f"{spread(_top1(ours, 'best'))} {'' if number is None else f'({number:.2f})'}".strip()


def part(table: paper.Table, column: int, scale: str, found: Found) -> list[str]:
    """The lines of a table for one of its pairs, and where its results come from."""
    header = ["", "paper", "best", "last", "seeds", "difference"]
    used, rows = [], []
    for row in table.rows:
        ours = found.get((table.pairs[column], row.cell), [])
        used += ours
        rows.append(_row(row.name, row.numbers[column], ours))
    if cells.SCALES[scale].is_toy:  # a difference from the paper's would say nothing
        header, rows = header[:-1], [row[:-1] for row in rows]
    return [*_lines(header, rows), "", source(used)]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(line) + " |" for line in (header, ruler, *rows)]


def _top1(results: Sequence[Mapping[str, Any]], which: str) -> list[float]:
    return [result[which]["top1"] for result in results]


def _row(name: str, number: float | None, ours: Sequence[Mapping[str, Any]]) -> list[str]:
    best, last = _top1(ours, "best"), _top1(ours, "last")
    difference = f"{statistics.mean(best) - number:+.2f}" if ours and number is not None else ""
    count = str(len(ours)) if ours else ""
    return [name, "" if number is None else f"{number:.2f}", spread(best), spread(last), count, difference]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of one value, nothing of none."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def source(results: Sequence[Mapping[str, Any]]) -> str:
    """Where results come from: devices, the arithmetic of training, days, versions, commits."""
    if not results:
        return "Ours: none yet."

    def names(values) -> str:
        return ", ".join(sorted(set(values)))

    dtypes = names(result["config"]["dtype"] for result in results if "dtype" in result.get("config", {}))
    trained = f"trained in {dtypes}, " if dtypes else ""
    commits = [result["commit"] or "unknown" for result in results]
    days = sorted(result["date"][:10] for result in results)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return (
        f"Ours: {len(results)} results on {names(result['device'] for result in results)}, "
        f"{trained}{when}, jax {names(result['versions']['jax'] for result in results)}, "
        f"commit {names(commit[:10] + '+' * commit.endswith('+') for commit in commits)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rkd_jax.report.tables", description=__doc__.splitlines()[0])
    run.add_flags(parser, results=_flags.folder)
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    flags = parser.parse_args(arguments)
    with _flags.one_sentence(flags):
        if not (found := load(flags.results, flags.scale)):
            print(f"No result of scale {flags.scale} in {flags.results}: the paper's numbers alone.", file=sys.stderr)
        text = markdown(run.table_numbers(flags.table), flags.scale, found)
        if flags.output:
            flags.output.parent.mkdir(parents=True, exist_ok=True)
            flags.output.write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
