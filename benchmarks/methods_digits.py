"""Every method on scikit-learn's digits, a few seeds each: does each train, and what does a step cost? A toy.

    python -m benchmarks.methods_digits --output results/methods_digits.json

resnet20 > resnet8, both views, one teacher for all; 355 test images, so that one image is 0.28 points: the order of the
methods here says nothing about their order on real images. Interrupted, it goes on where it was. The table goes into
docs/methods.md, between its markers.
"""

import argparse
import statistics
from pathlib import Path

import jax

from configs import digits
from rkd_jax import _files, _flags, experiment, methods, provenance, runs, train
from rkd_jax.report import cells

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = cells.SCALES["smoke"].toy
MARKERS = "<!-- digits -->\n", "<!-- /digits -->\n"


def main():
    """Runs what is missing, writes the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "methods_digits.json")
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods_digits"))
    parser.add_argument("--seeds", type=_flags.positive, default=3)
    parser.add_argument("--epochs", type=_flags.positive, default=10)
    flags = parser.parse_args()

    base = digits.get_config()
    base.update(compare=False, views="both", num_epochs=flags.epochs, eval_epochs=flags.epochs)
    base.update(decay_epochs=(0.6 * flags.epochs, 0.8 * flags.epochs))
    train.train_and_evaluate(experiment.alone(base, base.teacher), flags.workdir / "teacher")
    base.teacher_checkpoint = str(flags.workdir / "teacher" / "last")

    rows = {}
    for name in methods.names():
        config = base.copy_and_resolve_references()
        config.method = name
        config.update(OVERRIDES.get(name, {}))
        summaries = []
        for seed in range(flags.seeds):
            config.seed = seed
            summaries.append(runs.distil(config, flags.workdir / f"{name}-{seed}"))
            jax.clear_caches()
        top1 = [summary["last"]["top1"] for summary in summaries]
        step = [1000 * config.batch_size / summary["images_per_second"] for summary in summaries]
        rows[name] = {
            "top1": top1,
            "mean": statistics.mean(top1),
            "spread": statistics.stdev(top1) if len(top1) > 1 else None,
            "milliseconds_per_step": statistics.median(step),
            "config": summaries[0]["config"],
        }
    record = {"rows": rows, "seeds": list(range(flags.seeds)), **provenance.record()}
    _files.write_json(flags.output, record)
    page = ROOT / "docs" / "methods.md"
    before, rest = page.read_text().split(MARKERS[0])
    page.write_text(before + MARKERS[0] + table(record) + MARKERS[1] + rest.split(MARKERS[1])[1])
    print(table(record))


def table(record: dict) -> str:
    """Markdown of the results."""
    lines = ["| method | last top-1 %, mean of the seeds | standard deviation | ms a step |", "|---|---|---|---|"]
    for name, row in record["rows"].items():
        spread = "" if row["spread"] is None else f"{row['spread']:.2f}"
        lines.append(f"| {name} | {row['mean']:.2f} | {spread} | {row['milliseconds_per_step']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
