"""The cells of the tables as configs of ours, at several scales."""

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rkd_jax import _files, experiment, methods, runs
from rkd_jax.report import paper


class Scale(NamedTuple):
    """How large the runs are."""

    text: str  # for the readers of a table
    overrides: dict  # of every config
    epochs: float = 1.0  # the part of all that is counted in epochs
    toy: dict | None = None  # for a toy on the digits in place of the pair's config: some methods' fields there
    networks: dict | None = None  # in place of the pair's

    @property
    def is_toy(self) -> bool:
        """Whether the networks or the images are others than the paper's, so that nothing compares with its numbers."""
        return self.toy is not None or self.networks is not None


SCALES = {
    "full": Scale("the paper's recipe", {}),
    "short": Scale("a tenth of the epochs, on 10,000 training images", {"num_train": 10_000}, epochs=0.1),
    "smoke": Scale(
        "a toy, not comparable with the paper: every pair is resnet20 > resnet8 on scikit-learn's digits for 160 "
        "steps, and a method's one run, with its weights for the digits (lambda 5), stands in all columns",
        {
            "compare": False, "views": "both", "num_train": 640, "batch_size": 32, "num_epochs": 8,
            "decay_epochs": (5, 7), "eval_epochs": 1.0,
        },
        # ttm's published weight, 45, is for CIFAR-100; at this rate and on ten classes the student collapses. cat_kd's
        # is one for each pair of networks, and here that of resnet56 > resnet20.
        toy={"cat_kd": {"beta": 0.7}, "takd": {"assistant": "resnet14"}, "ttm": {"beta": 5.0}},
    ),
    "tiny": Scale(
        "a rehearsal, not comparable with the paper: small networks in place of the pair's, 60 steps on 320 images",
        {
            "num_train": 320, "num_test": 100, "batch_size": 16, "num_epochs": 3, "decay_epochs": (1, 2),
            "log_every": 10, "eval_batch_size": 100,
        },
        networks={
            "resnet32x4": "resnet8", "resnet8x4": "resnet8", "wrn_40_2": "resnet8", "wrn_16_2": "resnet8",
            "wrn_40_1": "resnet8", "vgg13": "resnet14", "vgg8": "resnet8", "resnet56": "resnet20",
            "resnet20": "resnet8", "resnet110": "resnet14", "resnet32": "resnet8", "ResNet50": "resnet14",
            "ResNet18": "resnet14", "ShuffleV1": "resnet8", "ShuffleV2": "resnet8", "MobileNetV2": "resnet8",
        },
    ),
}  # fmt: skip


class Cell(NamedTuple):
    """One number of ours.

    Its name is "teacher", or a method and what is set of its hyper-parameters, "ranking_alignment-lam=0.1", or of the
    config's other fields that are text, "ranking_alignment-views=weak".
    """

    pair: str  # the name of its config
    name: str
    seed: int

    @property
    def method(self) -> str:
        """The name, without the hyper-parameters."""
        return self.name.split("-")[0]

    def path(self, results: Path, scale: str) -> Path:
        """Its file."""
        return results / scale / self.pair / f"{self.name}-seed{self.seed}.json"


def read(path: Path) -> dict[str, Any]:
    """The result in a cell's file; ValueError where it is damaged."""
    needed = {"pair", "cell", "best", "last", "commit", "versions", "device", "date"}
    return _files.read_json(path, "remove it, and report.run makes it again", needed)


def select(
    numbers: Collection[int], seeds: int, pairs: Collection[str] = (), names: Collection[str] = ()
) -> list[Cell]:
    """The cells of some tables, by seed and by pair; of `pairs` and `names` (methods, "teacher") alone where given.

    A teacher has one seed, 0. ValueError where a pair or a name is in none of the tables.
    """
    tables = [table for table in paper.TABLES if table.number in numbers]
    columns = list(dict.fromkeys(pair for table in tables for pair in table.pairs))
    cells = [
        Cell(pair, row.cell, seed)
        for seed in range(seeds)
        for pair in columns
        for table in tables
        for row in table.rows
        if pair in table.pairs and row.cell and not (row.cell == "teacher" and seed)
    ]
    cells = list(dict.fromkeys(cells))
    for flag, given, known in (
        ("only", pairs, columns),
        ("methods", names, dict.fromkeys(cell.method for cell in cells)),
    ):
        if wrong := set(given) - set(known):
            raise ValueError(f"--{flag}: {sorted(wrong)[0]!r} is not in the tables; they have {', '.join(known)}")
    return [cell for cell in cells if cell.pair in (pairs or columns) and (not names or cell.method in names)]


def configure(cell: Cell, scale: str) -> ConfigDict:
    """The config of a cell's run, but for the teacher's checkpoint; ValueError for what its method cannot take."""
    size = SCALES[scale]
    config = _load(cell.pair if size.toy is None else "digits")
    if cell.name == "teacher" and size.toy is None:
        config = _load(f"teachers.{cell.pair.split('_')[0]}_{config.teacher.lower()}")
    elif cell.name == "teacher":
        config = experiment.alone(config, config.teacher)
    elif cell.name == "cross_entropy":  # on the views and epochs of the distilled ones, as a fair comparison has it
        config = experiment.alone(config, config.student)
    else:
        config.method = cell.method
        config.update((size.toy or {}).get(cell.method, {}))
        for name, value in (part.split("=") for part in cell.name.split("-")[1:]):
            config[name] = runs.parse(name, value, config.get_type(name))
    config.seed = cell.seed
    _shorten(config, size.epochs)
    config.update(size.overrides)
    for field in ("teacher", "student"):
        config[field] = (size.networks or {}).get(config[field], config[field])
    return config


def _load(name: str) -> ConfigDict:
    try:
        return importlib.import_module(f"configs.{name}").get_config()
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"configs/{name.replace('.', '/')}.py is not found; run from the repository") from error


def _shorten(config: ConfigDict, part: float) -> None:
    """Takes a part of everything that is counted in epochs: their number, the decay, the methods' warm-ups."""
    if part == 1:
        return
    config.num_epochs = round(config.num_epochs * part)
    config.decay_epochs = tuple(epoch * part for epoch in config.decay_epochs)
    for name, value in methods.hyperparameters(experiment.create_method(config)).items():
        if name.endswith("_epochs"):
            config[name] = value * part
