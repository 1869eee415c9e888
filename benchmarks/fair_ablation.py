"""The comparison that the paper lacks: every loss on the same views, batches, epochs and seeds. SHORT: not a full run.

    python -m benchmarks.fair_ablation --teacher_checkpoint TEACHER

resnet56 > resnet8 on 10,000 images of CIFAR-100, six epochs, tested on all 10,000 test images: cross_entropy, kd, lskd,
dkd and ranking_alignment; ranking_alignment at eps from 1 to 0.01 with its loss on one scale (rank_scale="logits"); and
the squared error of the centred logits, which is what eps = 1 comes to. All students of all seeds train in one program:
each batch is augmented and taught once. Interrupted, the same command goes on. Flags choose another student, other
epochs, images and losses; docs/findings.md gets a record's table between the marks of its name.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import jax

from configs import cifar100_res56_res20
from rkd_jax import _devices, _files, _flags, _memory, losses, provenance, train
from rkd_jax.methods import base

ROOT = Path(__file__).resolve().parents[1]
SAME = ("ranking_alignment, eps 1", "centred_mse")  # one training run, to rounding
RANKING = {"method": "ranking_alignment"}
MEMBERS = {
    "cross_entropy": {"method": "cross_entropy"},
    "kd": {"method": "kd"},
    "lskd": {"method": "lskd"},
    "dkd": {"method": "dkd"},
    "ranking_alignment, eps 1": {**RANKING, "eps": 1.0},
    "centred_mse": {"method": "benchmarks.fair_ablation:CentredMSE"},
    "ranking_alignment, eps 0.1": {**RANKING, "eps": 0.1, "rank_scale": "logits"},
    "ranking_alignment, eps 0.05": {**RANKING, "eps": 0.05, "rank_scale": "logits"},
    "ranking_alignment, eps 0.01": {**RANKING, "eps": 0.01, "rank_scale": "logits"},
}
OTHERS = {  # not of the default run
    **{name: {"method": name} for name in ("fitnets", "at", "vid", "crd", "sp", "ickd")},
    "reviewkd": {"method": "reviewkd", "beta": 0.6},  # its authors' weight for resnet56 > resnet20
    "cat_kd": {"method": "cat_kd", "beta": 0.7},  # likewise
}
CHOICES = MEMBERS | OTHERS


@dataclasses.dataclass(frozen=True)
class CentredMSE(base.Distiller):
    """CE + 5 * the mean squared error of logits from which each row's mean is taken: no rank in it."""

    def loss(self, params, state, student, teacher, batch, context):
        """See `rkd_jax.methods.base.Distiller.loss`."""
        s, t = (side.logits - side.logits.mean(-1, keepdims=True) for side in (student, teacher))
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        return {"label": label, "ranking": 5.0 * ((s - t) ** 2).mean()}, state, {}


def main():
    """Trains the members and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher_checkpoint", required=True, help="a resnet56 of CIFAR-100")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fair_ablation_short.json")
    parser.add_argument("--workdir", type=Path, default=Path("runs/fair_ablation"))
    parser.add_argument("--student", default="resnet8")
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=CHOICES,
        default=list(MEMBERS),
        metavar="LOSS",
        help=", ".join(map(repr, CHOICES)),
    )
    parser.add_argument("--seeds", type=_flags.positive, default=2, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--epochs", type=_flags.positive, default=6)
    parser.add_argument("--num_train", type=_flags.positive, default=10_000)
    parser.add_argument("--views", choices=("weak", "strong", "both"), default="both")
    parser.add_argument("--view_reduction", choices=("sum", "mean"), default="sum", help="of a loss over both views")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.parse_args()
    _memory.keep()
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    with _flags.one_sentence(flags):
        _devices.cache_programs(flags.workdir / "cache")
        _devices.start()

    shared = cifar100_res56_res20.get_config()
    shared.update(student=flags.student, teacher_checkpoint=flags.teacher_checkpoint, num_train=flags.num_train)
    # The paper's schedule in small: the rate falls after 1/2, 6/10 and 7/10 of the epochs.
    shared.update(num_epochs=flags.epochs, decay_epochs=tuple(flags.epochs * part for part in (0.5, 0.6, 0.7)))
    shared.update(views=flags.views, view_reduction=flags.view_reduction, dtype=flags.dtype)
    shared.update(data_seed=0, checkpoint_seconds=120.0)
    if jax.default_backend() == "cpu":
        shared.update(eval_epochs=flags.epochs / 4, log_every=26)
    else:  # whole epochs, which are a call each
        shared.update(eval_epochs=float(-(-flags.epochs // 4)), eval_batch_size=2500)
    members, folders = [], {}
    for name in flags.losses:
        for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
            config = shared.copy_and_resolve_references()
            config.update(seed=seed, **CHOICES[name])
            folders[name, seed] = flags.workdir / f"{name.replace(', ', '_').replace(' ', '=')}-seed{seed}"
            members.append((config, folders[name, seed]))
    with _flags.one_sentence(flags):
        try:
            summaries = train.train_together(members)
        except train.Diverged as error:  # the others are finished
            print(f"note: {error}")
            summaries = error.summaries

    if not (finished := list(filter(None, summaries))):
        sys.exit("Error: all students diverged")
    rows = {}
    for i, name in enumerate(flags.losses):
        own = summaries[i * flags.seeds : (i + 1) * flags.seeds]
        last, best = ([each and each[kind]["top1"] for each in own] for kind in ("last", "best"))
        if one := next(filter(None, own), None):
            rows[name] = {"last": last, "best": best, "config": one["config"] | {"seed": flags.first_seed}}
    record = {
        "scale": "short",
        "views": flags.views,
        "rows": rows,
        "trained_at": finished[0]["commit"],
        "seconds": finished[0]["seconds"],
        **provenance.record(),
    }
    if set(SAME) <= set(rows) and len(finished) == len(summaries):
        ours, theirs = (losses_of(folders[name, flags.first_seed] / "metrics.jsonl") for name in SAME)
        record["same_run"] = {step: abs(ours[step] / theirs[step] - 1) for step in sorted(ours)}
    _files.write_json(flags.output, record)
    found = table(records(flags.output))
    page, (start, end) = ROOT / "docs" / "findings.md", marks(flags.output)
    before, there, rest = page.read_text().partition(start)
    if there:
        page.write_text(before + start + found + end + rest.partition(end)[2])
    print(found)


def losses_of(path: Path) -> dict[int, float]:
    """The training losses of a run by step."""
    return {line["step"]: line["loss"] for line in _files.read_lines(path) if line["kind"] == "train"}


def records(path: Path) -> list[dict]:
    """The record NAME.json that `path` belongs to, and the NAME_seed*.json that add seeds to it."""
    name = path.stem.partition("_seed")[0]
    paths = [*path.parent.glob(f"{name}.json"), *sorted(path.parent.glob(f"{name}_seed*.json"))]
    return [json.loads(each.read_text()) for each in paths]


def marks(path: Path) -> tuple[str, str]:
    """The lines between which docs/findings.md has the table of the records of `path`."""
    name = path.stem.partition("_seed")[0]
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"


def by_seed(found: list[dict], loss: str, kind: str) -> dict[int, float]:
    """Seed -> top-1 of a loss, over several records; kind: the "last" epoch, or the "best"."""
    rows = [record["rows"][loss] for record in found if loss in record["rows"]]
    # None: it diverged.
    return {row["config"]["seed"] + i: top1 for row in rows for i, top1 in enumerate(row[kind]) if top1 is not None}


def table(found: list[dict]) -> str:
    """Markdown of the results of one or several records."""
    names = [name for name in CHOICES if any(name in record["rows"] for record in found)]
    last, best = ({name: by_seed(found, name, kind) for name in names} for kind in ("last", "best"))
    seeds = sorted({seed for values in last.values() for seed in values})
    if len(seeds) == 1:
        lines = ["| loss | top-1 %, last epoch | best epoch |", "|---|---|---|"]
        lines += [f"| {name} | {last[name][seeds[0]]:.2f} | {best[name][seeds[0]]:.2f} |" for name in names]
        return "\n".join(lines) + "\n"
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [f"| loss | top-1 %, last epoch: {heads} | mean (standard deviation) | best epoch, mean |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    for name in names:
        each = " | ".join(f"{last[name][seed]:.2f}" if seed in last[name] else "" for seed in seeds)
        values = list(last[name].values())
        mean = f"{statistics.mean(values):.2f} ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
        lines.append(f"| {name} | {each} | {mean} | {statistics.mean(best[name].values()):.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
