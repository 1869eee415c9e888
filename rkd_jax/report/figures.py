"""Figures of networks and runs on disk: what a student has of its teacher, and what a hyper-parameter does.

    python -m rkd_jax.report.figures ranked_logits --teacher runs/teacher --students CE=runs/ce RA=runs/ra --image 7
    python -m rkd_jax.report.figures logit_difference --teacher runs/teacher --students CE=runs/ce RA=runs/ra
    python -m rkd_jax.report.figures tsne --networks CE=runs/ce RA=runs/ra --classes 0 1 2 3
    python -m rkd_jax.report.figures curves --runs CE=runs/ce RA=runs/ra
    python -m rkd_jax.report.figures field temperature --runs runs/temperature-sweep
    python -m rkd_jax.report.figures lambda --runs runs/lam-*
    python -m rkd_jax.report.figures eps --runs runs/eps-sweep

Each writes OUTPUT.png and OUTPUT.svg (default: runs/figures/<figure>). A network is its folder, or a run's folder: its
best network, then. NAME=FOLDER gives the name in the figure. For `curves`, a run is its folder or a copy of its
metrics.jsonl under any name (results/curves/*.jsonl); a sweep's folder is all its runs.
"""

import argparse
import dataclasses
import difflib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from scipy import stats

from rkd_jax import _files, _flags, checkpoint, data, evaluate, run_folder
from rkd_jax.report import paper

# Okabe and Ito's colours, which readers who are colour-blind tell apart, without the yellow that vanishes on white.
BLUE, RED, GREEN, PURPLE, SKY, ORANGE, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
COLORS = BLUE, RED, GREEN, PURPLE, SKY, ORANGE, BLACK, "#882255", "#999933", "#888888"
HEADROOM = 0.66  # of a panel of ranked logits is for the points; above them is room for words
MARKERS, LINES, GREY = "osD^vPX*<>", ("-", "--", ":", "-."), "0.6"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.hashsalt": "rkd_jax",  # the same figure is the same file
}


# Networks: what they say about test images.


class Predicted(NamedTuple):
    """A network's outputs for N images."""

    label: str  # its name in the figure
    logits: np.ndarray  # [N, C]
    embedding: np.ndarray | None  # [N, D]; None where the network returns none


def named(text: str) -> tuple[str, Path]:
    """ "NAME=FOLDER" or "FOLDER" -> (name, folder); a sweep's folders have "=" in their names, and so may a name."""
    splits = [("", text)] + [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "="]
    name, path = next((split for split in splits if Path(split[1]).exists()), splits[-1])
    folder = Path(path)
    label = folder.parent.name if folder.name in ("best", "last") else folder.name.removesuffix(".jsonl")
    return name or label, folder


def network_folder(folder: Path) -> Path:
    """A network's folder as it is; of a run's folder, that of its best network."""
    return folder / "best" if (folder / "best" / "metadata.json").exists() else folder


def load_images(args: argparse.Namespace) -> tuple[str, data.Splits]:
    """The data set of --dataset, or else that on which the flags' networks were trained, in their images' size."""
    flags = {flag: getattr(args, flag) for flag in ("teacher", "students", "networks") if hasattr(args, flag)}
    metadata = [
        checkpoint.read_metadata(network_folder(named(text)[1]), f"--{flag}")
        for flag, texts in flags.items()
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    found = {args.dataset} if args.dataset else {each.get("dataset") for each in metadata} - {None}
    if len(found) != 1:
        trained = f"were trained on {' and '.join(sorted(found))}" if found else "do not name theirs"
        raise ValueError(f"--dataset is missing, and the networks {trained}; say which test images to show them")
    (dataset,) = found
    sides = {each.get("image_size") for each in metadata if each.get("dataset") == dataset} - {None}
    if len(sides) > 1:
        raise ValueError(f"the networks take images of {' and '.join(map(str, sorted(sides)))} pixels; draw them apart")
    return dataset, evaluate.load_splits(dataset, args.data_dir, sides.pop() if sides else None)


def predict(texts: Sequence[str], images: np.ndarray, splits: data.Splits, flag: str) -> list[Predicted]:
    """Shows uint8 images [N, H, W, K] of a set to the networks that a flag names, 500 at a time."""
    found = []
    for text in texts:
        label, folder = named(text)
        network = evaluate.restore(network_folder(folder), images.shape[1:], splits, flag)
        apply = jax.jit(lambda variables, batch, one=network: dataclasses.replace(one, variables=variables)(batch))
        with jax.default_matmul_precision("highest"):  # as a run's tests have it
            outputs = [apply(network.variables, images[i : i + 500]) for i in range(0, len(images), 500)]
        values = zip(*((each.logits, each.embedding) for each in outputs), strict=True)
        logits, embedding = (None if each[0] is None else np.concatenate([*map(np.asarray, each)]) for each in values)
        found.append(Predicted(label, logits, embedding))
    return found


def cut(name: str, length: int = 14) -> str:
    """A name of at most so many letters, with an ellipsis where it was longer."""
    return name if len(name) <= length else name[: length - 1].rstrip(" ,") + "…"


def class_names(splits: data.Splits) -> list[str]:
    """The names of a data set's classes, or their numbers."""
    return [name.replace("_", " ") for name in splits.class_names] or [str(i) for i in range(splits.num_classes)]


def logit_difference(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of |student - teacher| over the images of each true class; [N, C], [N, C], [N] -> [C, C], row: true class.

    The row of a class without images is NaN.
    """
    rows = np.full((teacher.shape[1],) * 2, np.nan)
    for label in np.unique(labels):
        rows[label] = np.abs(student - teacher)[labels == label].mean(0)
    return rows


def _panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of that size in inches, in rows of up to three."""
    columns = count if count < 4 else 2 if count == 4 else 3
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, 0.6 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _headline(figure: Figure, text: str) -> None:
    """A title above the whole figure, in lines as long as it is wide."""
    width = int(11 * figure.get_figwidth())  # letters that so many inches hold
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in text.splitlines()))


def draw_ranked_logits(args: argparse.Namespace) -> Figure:
    """The paper's Fig. 3, for one test image: every network's logits, in the order of the teacher's."""
    dataset, splits = load_images(args)
    images, labels = splits.test
    if not 0 <= args.image < len(images):
        raise ValueError(f"--image={args.image} is not among the test images of {dataset}: 0 to {len(images) - 1:,}")
    chosen, true = images[args.image : args.image + 1], int(labels[args.image])
    teacher, *students = (
        *predict([args.teacher], chosen, splits, "--teacher"),
        *predict(args.students, chosen, splits, "--students"),
    )
    names = class_names(splits)
    short = [cut(name, 24) for name in names]
    figure, axes = _panels(1 + len(students), 4.6, 3.2, sharey=True)
    logits = [network.logits[0] for network in (teacher, *students)]
    low, high = np.min(logits), np.max(logits)
    axes[0].set_ylim(low - 0.04 * (high - low), low + (high - low) / HEADROOM + 1e-6)
    for i, (axis, network) in enumerate(zip(axes, [teacher, *students], strict=True)):
        _ranked_panel(axis, network, teacher, true, short, chr(ord("a") + i))
    inset = axes[0].inset_axes((0.8, HEADROOM, 0.2, 1 - HEADROOM))
    inset.imshow(np.squeeze(chosen[0]), cmap="gray")
    inset.axis("off")
    _legend(figure, 3, *axes[1].get_legend_handles_labels())
    _headline(figure, f"{dataset}, test image {args.image}, true class {names[true]}: logits in the teacher's order")
    return figure


def _ranked_panel(
    axis: Axes, network: Predicted, teacher: Predicted, true: int, names: Sequence[str], letter: str
) -> None:
    """One network's logits of the one image."""
    own, reference = network.logits[0], teacher.logits[0]
    order = np.argsort(-reference, kind="stable")
    rank = np.argsort(order) + 1  # of every class, by the teacher
    number = np.arange(1, len(order) + 1)
    axis.plot(number, own[order], "o", color=BLUE, markersize=3 if len(order) > 20 else 5, label="network's logits")
    axis.plot(rank[true], own[true], "D", color=RED, markersize=7, label=f"true class, {names[true]}")
    lines = [f"{names[i]}  {own[i]:.1f}  ({rank[i]})" for i in np.argsort(-own, kind="stable")[:5]]
    title, heading, right = f"({letter}) teacher", "largest logits (rank)", 0.76
    if network.label != "teacher":  # as its folder may be called
        title += f", {network.label}"
    if network is not teacher:
        axis.plot(number, reference[order], "-", color=GREY, linewidth=1.2, label="teacher's logits", zorder=1)
        rho = stats.spearmanr(own, reference).statistic
        title = f"({letter}) {network.label}: Spearman's ρ with the teacher {rho:.2f}"
        heading, right = "largest logits (teacher's rank)", 1
    look = {"ha": "right", "va": "top", "fontsize": 7.5}
    axis.text(right, 0.99, "\n".join([heading, *lines]), transform=axis.transAxes, **look)
    axis.set(title=textwrap.fill(title, 48), xlabel="class, by its rank among the teacher's logits", ylabel="logit")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_logit_difference(args: argparse.Namespace) -> Figure:
    """How far each student's logits are from the teacher's, by true class and by logit; one colour scale."""
    dataset, splits = load_images(args)
    images, labels = data.subset(splits.test, _count(args, splits), f"--num_images={args.num_images}", "test images")
    (teacher,) = predict([args.teacher], images, splits, "--teacher")
    students = predict(args.students, images, splits, "--students")
    maps = [logit_difference(student.logits, teacher.logits, labels) for student in students]
    # Neither a few outliers, nor one of many students, take the whole scale.
    highest = np.median([np.nanquantile(found, 0.995) for found in maps])
    names = [cut(name) for name in class_names(splits)] if splits.num_classes <= 20 else []
    longest = max(map(len, names), default=0)
    figure, axes = _panels(len(maps), 3.8 + 0.07 * longest, 3.5 + 0.07 * longest, sharey=True)
    for axis, student, found in zip(axes, students, maps, strict=True):
        picture = axis.imshow(found, cmap="cividis", vmin=0, vmax=highest or 1, interpolation="nearest")
        title = textwrap.fill(f"{student.label}: mean {np.nanmean(found):.2f}", 40)
        axis.set(title=title, xlabel="class of the logit")
        axis.grid(False)
        if names:
            size = 9 if len(names) <= 10 else 7
            axis.set_xticks(range(splits.num_classes), names, rotation=90 if longest > 2 else 0, fontsize=size)
            axis.set_yticks(range(splits.num_classes), names, fontsize=size)
    for axis in axes[:: axes[0].get_gridspec().ncols]:
        axis.set_ylabel("true class of the image")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, extend="max" if np.nanmax(maps) > highest else "neither")
    bar.set_label("mean |student's logit - teacher's|")
    _headline(figure, f"{dataset}, {len(images):,} test images: students' logits against those of {teacher.label}")
    return figure


def _count(args: argparse.Namespace, splits: data.Splits) -> int:
    return min(2000, len(splits.test.labels)) if args.num_images is None else args.num_images


def _look(i: int) -> dict[str, str]:
    """The marker and colour of the i-th class; no two of the first hundred share both."""
    return {"marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)], "color": COLORS[i % len(COLORS)]}


def draw_tsne(args: argparse.Namespace) -> Figure:
    """t-SNE of the embeddings of test images of a few classes."""
    from sklearn import manifold, metrics  # here: half a second that the other figures need not pay

    dataset, splits = load_images(args)
    classes = list(range(min(10, splits.num_classes))) if args.classes is None else list(dict.fromkeys(args.classes))
    if wrong := [label for label in classes if not 0 <= label < splits.num_classes]:
        raise ValueError(f"--classes: {wrong[0]} is no class of {dataset}; name some of 0 to {splits.num_classes - 1}")
    kept = np.isin(splits.test.labels, classes)
    split = data.Split(splits.test.images[kept], splits.test.labels[kept])
    count = min(100 * len(classes), len(split.labels)) if args.num_images is None else args.num_images
    images, labels = data.subset(split, count, f"--num_images={args.num_images}", "test images of these classes")
    if not 1 < len(set(labels)) < len(labels):
        raise ValueError(
            f"--classes, --num_images: {len(labels)} images of {len(set(labels))} classes; take two classes or more, "
            "and more images than classes"
        )
    if len(classes) > 30:
        raise ValueError(f"--classes: {len(classes)} are too many to be told apart; name 30 at most")
    networks = predict(args.networks, images, splits, "--networks")
    for network in networks:
        if network.embedding is None:
            raise ValueError(f"--networks: {network.label!r} has no embedding; return it in rkd_jax.models.Outputs")
    names = [cut(name, 24) for name in class_names(splits)]
    figure, axes = _panels(len(networks), 3.4, 3.4)
    for axis, network in zip(axes, networks, strict=True):
        perplexity = min(30, (len(images) - 1) / 3)
        points = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(network.embedding)
        for i, label in enumerate(classes):
            x, y = points[labels == label].T
            axis.scatter(x, y, s=12, linewidths=0, alpha=0.8, label=names[label], **_look(i))
        silhouette = metrics.silhouette_score(network.embedding, labels)
        title = textwrap.fill(f"{network.label}: silhouette {silhouette:.2f}", 36)
        axis.set(title=title, xticks=[], yticks=[], box_aspect=1)
        axis.set_aspect("equal", adjustable="datalim")
        axis.spines[["top", "right"]].set_visible(True)
    look = {"title": "class", "markerscale": 1.8, "ncols": math.ceil(len(classes) / 15)}
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", **look)
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)  # room beside the panels
    _headline(figure, f"{dataset}: t-SNE of the embeddings of {len(images):,} test images (axes without unit)")
    return figure


# Runs: what their numbers were.


def each_run(paths: Sequence[str]) -> list[str]:
    """The paths of runs, and for a sweep's folder those of all its runs, such as lam=0.1,seed=0.

    Without the sweep.json that SWEEP/* names, too.
    """
    found = []
    for path in (path for path in paths if Path(path).name != "sweep.json"):
        inside = sorted(str(run) for run in Path(path).glob("*=*") if run.is_dir())
        found += inside or [path]
    return found


def load_record(path: str) -> dict[str, Any]:
    """What a finished run says of itself: its folder's summary.json, or any JSON file of such content."""
    file = Path(path) / "summary.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--runs: there is no {file}; name folders of finished runs, or their JSON files")
    try:
        return _files.read_json(file, "name a run's folder or its summary.json", {"config", "best", "last"})
    except ValueError as error:
        raise ValueError(f"--runs: {error}") from error


def load_metrics(path: str, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind: "train" or "test"."""
    file = Path(path)
    if file.is_file() and file.suffix != ".jsonl":
        raise ValueError(f"--runs: {file} is no run; name runs' folders, or copies of their metrics.jsonl")
    file = file if file.is_file() else file / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"--runs: there is no {file}; name the folder of a run that has trained")
    if not (found := [line for line in _files.read_lines(file) if line.get("kind") == kind]):
        raise ValueError(f"--runs: {file} has no line of kind {kind!r} yet; wait for the run, or leave it out")
    return found


def sweep(records: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    """The value of a field in each record; ValueError where the runs differ in more than it and the seed."""
    configs = [record["config"] for record in records]
    if any(field not in config for config in configs):
        near = difflib.get_close_matches(field, configs[0], 1)
        hint = f", or did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"--runs: one of them is of a method without {field}; name runs of those that have it alone{hint}"
        )
    follows = {"data_fingerprint"} if field in ("num_train", "num_test", "image_size") else set()
    unknown = {name for name in run_folder.LATER if any(name not in config for config in configs)}
    passed = {field, "seed", *run_folder.NOT_COMPUTED, *run_folder.MAY_CHANGE, *follows, *unknown}
    for name in sorted(set().union(*configs) - passed):
        values = {json.dumps(config.get(name)) for config in configs}
        if len(values) > 1:
            raise ValueError(
                f"--runs: they differ in {name}, too ({', '.join(sorted(values))}); name runs that differ in "
                f"{' and '.join(dict.fromkeys((field, 'seed')))} alone"
            )
    return [config[field] for config in configs]


def draw_field(args: argparse.Namespace) -> Figure:
    """Accuracy against any field of the config that is a number, best and last."""
    records = [load_record(path) for path in each_run(args.runs)]
    values = sweep(records, args.field)
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise ValueError(f"FIELD={args.field} has the value {wrong[0]!r}, which is no number; name another field")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    _accuracies(axis, values, records)
    axis.set(xlabel=args.field, ylabel="test top-1, %")
    if min(values) >= 0 and max(values) >= 10 * min(filter(None, values), default=1):
        _log(axis, values)
    elif len(ticks := sorted(set(values))) <= 10:
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    _legend(figure, 3)
    _headline(figure, _title(records, f"accuracy by {args.field}"))
    return figure


def draw_lambda(args: argparse.Namespace) -> Figure:
    """Accuracy against lambda, best and last, with the paper's Table 5 where it has the pair."""
    runs = each_run(args.runs)
    records = [load_record(path) for path in runs]
    values = sweep(records, "lam")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    _accuracies(axis, values, records)
    config = records[0]["config"]
    if papers := table_5(config):
        axis.plot(*zip(*papers.items(), strict=True), "d--", color=BLACK, label="the paper's Table 5")
    axis.set(xlabel="λ, weight of the ranking term", ylabel="test top-1, %")
    _log(axis, [*values, *papers])
    _legend(figure, 3)
    _headline(figure, _title(records, "accuracy by λ; ε = {:g}".format(records[0]["config"]["eps"])))
    return figure


def table_5(config: Mapping[str, Any]) -> dict[float, float]:
    """The paper's top-1 in percent by lambda, where it has them for a config's pair; else {}."""
    title, dataset = f"{config['teacher']} > {config['student']}".lower(), config["dataset"].replace("_", "")
    for table in (table for table in paper.TABLES if table.number == 5):
        if table.pairs[0].startswith(dataset) and paper.PAIRS[table.pairs[0]].lower() == title:
            return {float(row.name): row.numbers[0] for row in table.rows}
    return {}


def draw_eps(args: argparse.Namespace) -> Figure:
    """Accuracy, and the number of blocks of the soft ranks, against eps."""
    runs = each_run(args.runs)
    records = [load_record(path) for path in runs]
    values = sweep(records, "eps")
    last = [load_metrics(path, "train")[-1] for path in runs]
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _accuracies(upper, values, records)
    upper.set(ylabel="test top-1, %")
    for i, who in enumerate(("student", "teacher")):
        look = {"marker": "^v"[i], "color": (GREEN, PURPLE)[i], "linestyle": ("-", "--")[i]}
        _means(lower, values, [line[f"{who}_blocks"] for line in last], f"blocks, {who}", look)
    lower.set(xlabel="ε, strength of the soft rank", ylabel="mean number of blocks", yscale="log")
    _plain_numbers(lower)
    for axis in (upper, lower):
        axis.axvline(1, color=GREY, linewidth=1, linestyle=":", label="the paper's ε" if axis is upper else None)
    _log(lower, values)
    lower.axhline(1, color=GREY, linewidth=1, label="one block: the centred logits", zorder=1)
    _legend(figure, 3)
    what = "accuracy and blocks by ε; λ = {lam:g}, rank_scale {rank_scale}"
    _headline(figure, _title(records, what.format(**records[0]["config"])))
    return figure


def _legend(figure: Figure, most: int, *entries: Any) -> None:
    """Below the panels, in at most so many columns, and in fewer where the names would not fit."""
    for columns in range(most, 0, -1):
        legend = figure.legend(*entries, loc="outside lower center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _means(axis: Axes, x: Sequence[float], y: Sequence[float], label: str, look: Mapping[str, Any]) -> None:
    """A line through the means at each x, and a point for every run."""
    order = sorted(set(x))
    means = [np.mean([b for a, b in zip(x, y, strict=True) if a == value]) for value in order]
    axis.plot(order, means, label=label, **({"markersize": 5} | look))
    if len(order) < len(x):
        axis.plot(x, y, look["marker"], color=look["color"], markersize=3, alpha=0.5)


def _accuracies(axis: Axes, values: Sequence[float], records: Sequence[Mapping[str, Any]]) -> None:
    best = {"marker": "*", "color": RED, "markersize": 12}
    last = {"marker": "o", "color": BLUE, "linestyle": "--"}  # both are seen where they are equal
    for name, look in (("best", best), ("last", last)):
        top1 = [record[name]["top1"] for record in records]
        _means(axis, values, top1, f"top-1 of the {name} epoch", look)


def _log(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are the values; linear below the smallest positive one, where there is a 0."""
    ticks = sorted(set(values))
    scale = {"value": "log"} if ticks[0] > 0 else {"value": "symlog", "linthresh": min(ticks[1:], default=1)}
    axis.set_xscale(**scale)
    axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axis.set_xticks([], minor=True)


class _Plain(LogFormatter):
    """30 and 0.1, not 3 x 10^1 and 1e-01, at the ticks that have room for it."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_numbers(axis: Axes) -> None:
    """Plain numbers along a logarithmic y axis."""
    axis.yaxis.set_major_formatter(_Plain())
    axis.yaxis.set_minor_formatter(_Plain(minor_thresholds=(2, 0.5)))


def _title(records: Sequence[Mapping[str, Any]], what: str) -> str:
    config, seeds = records[0]["config"], len({record["config"]["seed"] for record in records})
    pair = [name for name in (config["teacher"], config["student"]) if name]  # cross_entropy may have no teacher
    networks = f"{' > '.join(pair)} by {config['method']}"
    counts = sorted({record["last"]["step"] for record in records})
    steps = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    steps = f"{steps}\u00a0steps, {seeds}\u00a0seed{'s'[: seeds > 1]}"  # no line ends within
    return f"{config['dataset']}, {networks}, {steps}\n{what}"


def draw_curves(args: argparse.Namespace) -> Figure:
    """Loss, training accuracy and test top-1 of runs, by epoch, the best and the last evaluation marked."""
    runs = each_run(args.runs)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, accuracy, top1 = figure.subplots(1, 3)
    for i, (label, folder) in enumerate(map(named, runs)):
        look = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}
        lines, tests = (load_metrics(folder, kind) for kind in ("train", "test"))
        epochs = [line["epoch"] for line in lines]
        one = {"marker": "o"} if len(lines) == 1 else {}  # a line of one point would not be seen
        loss.plot(epochs, [line["loss"] for line in lines], **look, **one, label=label)
        accuracy.plot(epochs, [line["top1"] for line in lines], **look, **one)
        top1.plot([line["epoch"] for line in tests], [line["top1"] for line in tests], **look)
        best = max(tests, key=lambda line: line["top1"])  # the first of equals, as training keeps it
        for line, mark, size in ((tests[-1], "o", 6), (best, "*", 12)):
            top1.plot(line["epoch"], line["top1"], mark, color=look["color"], markersize=size, markeredgecolor="white")
    loss.set(title="training loss, each by its own method", ylabel="loss", yscale="log")
    _plain_numbers(loss)
    accuracy.set(title="training accuracy, on augmented images", ylabel="top-1, %")
    top1.set(title="test accuracy (star: best, dot: last)", ylabel="top-1, %")
    for axis in (loss, accuracy, top1):
        axis.set_xlabel("epoch")
    _legend(figure, min(5, len(runs)))
    return figure


# The command.

FIGURES = {
    "ranked_logits": draw_ranked_logits,
    "logit_difference": draw_logit_difference,
    "tsne": draw_tsne,
    "curves": draw_curves,
    "field": draw_field,
    "lambda": draw_lambda,
    "eps": draw_eps,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rkd_jax.report.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, draw in FIGURES.items():
        command = commands.add_parser(name, help=draw.__doc__.splitlines()[0], description=draw.__doc__)
        command.add_argument(
            "--output",
            type=Path,
            default=Path("runs/figures") / name,
            metavar="FILE",
            help="default: runs/figures/<figure>",
        )
        if name == "field":
            command.add_argument(
                "field", metavar="FIELD", help="of configs/default.py or of a method: what the runs differ in"
            )
        if name in ("curves", "field", "lambda", "eps"):
            metavar = "NAME=FOLDER" if name == "curves" else "FOLDER"
            what = "of runs, or of a sweep" + (", or files of metrics" if name == "curves" else "")
            command.add_argument("--runs", nargs="+", required=True, metavar=metavar, help=what)
            continue
        command.add_argument("--dataset", default="", help="default: what the networks were trained on")
        command.add_argument("--data_dir", default="", help=_flags.DATA_DIR_HELP)
        if name == "tsne":
            command.add_argument("--networks", nargs="+", required=True, metavar="NAME=FOLDER")
            command.add_argument("--classes", type=int, nargs="+", help="numbers; default: the first ten")
        else:
            command.add_argument("--teacher", required=True, metavar="NAME=FOLDER")
            command.add_argument("--students", nargs="+", required=True, metavar="NAME=FOLDER")
        if name == "ranked_logits":
            command.add_argument("--image", type=int, default=0, help="number of the test image, from 0")
        else:
            command.add_argument("--num_images", type=int, help="test images, classes balanced")
    return parser.parse_args(argv)


def output_name(path: Path) -> str:
    """The name of the files without .png and .svg; ValueError where none can be written there."""
    others = Figure().canvas.get_supported_filetypes().keys() - {"png", "svg"}
    where = f"--output={path}" if path.name else "--output is empty or"
    if path.is_dir():
        raise ValueError(f"{where} is a folder; name a file in it, without suffix")
    if not (above := next(folder for folder in path.parents if folder.exists())).is_dir():
        raise ValueError(f"{where} is not in a folder: {above} is a file; name another")
    if path.suffix.removeprefix(".") in others:
        raise ValueError(f"{where}: figures are written as .png and .svg; name it {path.stem}")
    return path.name.removesuffix(".png").removesuffix(".svg")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws a figure, writes it twice, says where; an error of the user's is one sentence."""
    args = parse(argv)
    with _flags.one_sentence(args), matplotlib.rc_context(STYLE):
        name = output_name(args.output)  # before the work
        figure = FIGURES[args.figure](args)
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                path = args.output.with_name(f"{name}.{suffix}")
                figure.savefig(path, metadata=metadata)
                print(path)
        except OSError as error:
            raise OSError(
                f"--output={args.output} cannot be written ({error.strerror or error}); name another"
            ) from error


if __name__ == "__main__":
    main()
