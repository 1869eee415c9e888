"""Restores networks from disk and reports their accuracy."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from rkd_jax import _devices, _files, checkpoint, data, experiment, models, processes, provenance, run_folder, steps
from rkd_jax.data import augment

READ = ("dataset", "data_dir", "image_size", "num_train", "num_test", "eval_batch_size", "smoke")  # of a config


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """A network from disk: called with uint8 images [B, H, W, K], it returns its `models.Outputs` of them.

    ValueError for images of another type (those of floats in 0..1 would be scaled twice) or form.
    """

    network: nn.Module
    variables: Any
    normalization: steps.Normalization  # its own, not that of the data set
    metadata: dict[str, Any]

    def __call__(self, images: jax.Array) -> models.Outputs:
        """Normalises and applies; `jax.jit` takes it as it is."""
        images, channels = jnp.asarray(images), len(self.normalization.mean)
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(f"images have the shape {images.shape}; give a batch of them, [B, H, W, {channels}]")
        if images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype}; give uint8 from 0 to 255, as they come from a file")
        return self.network.apply(self.variables, augment.normalize(images, *self.normalization), train=False)


def restore(
    path: str | os.PathLike, image_shape: Sequence[int], splits: data.Splits | None = None, field: str = "--workdir"
) -> Restored:
    """The network of a folder, for images [H, W, K], of the classes of `splits`.

    ValueError or FileNotFoundError, that names the flag `field`, where there is no such network.
    """
    if len(image_shape) != 3:
        raise ValueError(f"image_shape={tuple(image_shape)}; give height, width and channels, such as (32, 32, 3)")
    classes = {"num_classes": splits.num_classes, "class_names": splits.class_names} if splits else {}
    variables, metadata = checkpoint.load_network(path, field=field, **classes)
    experiment.check_channels(metadata, image_shape[-1], f"{path}", "here are")
    network = models.create(metadata["network"], metadata["num_classes"], field=f"network of {path}")
    experiment.check_variables(network, variables, tuple(image_shape), str(path))
    return Restored(network, variables, steps.Normalization(tuple(metadata["mean"]), tuple(metadata["std"])), metadata)


def load_splits(dataset: str, data_dir: str, side: int | None) -> data.Splits:
    """A data set by name; of one whose images can be had in any size, those of the side that a network takes."""
    return _in_size(lambda size: data.load(dataset, data_dir, image_size=size), dataset, side)


def _in_size(load: Callable[[int | None], data.Splits], dataset: str, side: int | None) -> data.Splits:
    splits = load(None)
    return splits if side in (None, splits.test.images.shape[1]) or ":" not in dataset else load(side)


def evaluate(
    config: ConfigDict,
    path: str | os.PathLike,
    field: str = "--workdir",
    load_splits: Callable[[experiment.Fields], data.Splits] = experiment.load_splits,
    by_class: bool = False,
) -> dict[str, Any]:
    """Accuracy of one network folder on the config's test set; `field` named the folder, for the errors.

    The network is the one that the folder names, with its own normalisation; of the config, only the fields of `READ`
    are read. Where the config leaves the size of the images open, it is the network's. `load_splits` may keep a set
    for the next network.
    Returns {"network", "parameters", "step" (None: not trained here), "top1", "top5" (both in percent), "loss",
    "images", "image_size"}; with `by_class` "classes", too, the top-1 accuracy of each class, by its name or, where
    that is not known, its number (None: it has no images).
    """
    values = experiment.shrink(config)
    fields = experiment.Fields(values)
    side = checkpoint.read_metadata(path, field).get("image_size")

    def load(size: int | None) -> data.Splits:
        return load_splits(experiment.Fields({**values, "image_size": size}))

    splits = _in_size(load, fields.dataset, side) if fields.image_size is None else load(fields.image_size)
    found = restore(path, splits.test.images.shape[1:], splits, field)
    eval_step = steps.make_eval_step(found.network, found.normalization, steps.local_mesh())
    sums = steps.total(eval_step, found.variables, *splits.test, fields.at_least("eval_batch_size", 1))
    result = {
        "network": found.metadata["network"],
        "parameters": models.count_parameters(found.variables["params"]),
        "step": found.metadata.get("step"),
        **_files.plain(steps.means(sums)),
        "images": len(splits.test.labels),
        "image_size": splits.test.images.shape[1],
    }
    if by_class:
        names = splits.class_names or map(str, range(splits.num_classes))
        of_class = zip(names, sums["top1_of_class"], sums["count_of_class"], strict=True)
        result["classes"] = {name: 100 * float(hits / count) if count else None for name, hits, count in of_class}
    return result


class _Kept:
    """`experiment.load_splits` that keeps the set that it loaded last, for the networks of a run have the same."""

    def __init__(self):
        self._fields, self._splits = None, None

    def __call__(self, fields: experiment.Fields) -> data.Splits:
        if (asked := {name: getattr(fields, name) for name in READ}) != self._fields:
            self._fields = self._splits = None  # before another takes its memory
            self._splits = experiment.load_splits(fields)
            self._fields = asked
        return self._splits


def recorded(path: Path, config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """The config to test a network with: its run's, with `changes`.

    For a network moved out of its run, it is `config` (which has the changes) on the data set that its metadata names;
    where the changes name a data set, `config` as it is. ValueError where that set's images can be had in any size, and
    nothing says in which, and where nothing names a data set, and that of `config` is not the network's.
    """
    if "dataset" in changes:
        return config
    if path.name in ("best", "last") and (file := path.parent / "config.json").is_file():
        return ConfigDict({**_files.read_json(file, run_folder.PUT_BACK), **changes})
    metadata = checkpoint.read_metadata(path, "--workdir")
    dataset = metadata.get("dataset", "")
    if not dataset:
        if metadata["num_classes"] != data.load(config.dataset, config.data_dir).num_classes:
            raise ValueError(
                f"--workdir={path} has {metadata['num_classes']} classes and does not say of what data set; name it: "
                "--config.dataset=cifar100, say"
            )
        return config
    if ":" in dataset and "image_size" not in metadata:
        raise ValueError(
            f"--workdir={path} was trained on {dataset}, and is apart from its run; name --config.dataset and "
            "--config.image_size"
        )
    return ConfigDict({**config.to_dict(), "dataset": dataset})


def run(
    config: ConfigDict, workdir: str | os.PathLike, changes: Mapping[str, Any] | None = None, given: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """What `python main.py --mode=eval` does: evaluates a network folder, or the best and last networks of runs.

    Prints a line for each, and writes them all, with the accuracy of each class, command, commit, versions and device,
    to WORKDIR/evaluation.json.
    changes: where the user named no config, the fields that are set; each network is then tested as `recorded` says.
    given: the fields that were set by hand, of which those that no test reads are named. Of several processes, the
    first does it.
    """
    _devices.start()
    processes.meet()
    return processes.in_lead(lambda: _run(config, Path(workdir), changes, given))


def _run(
    config: ConfigDict, workdir: Path, changes: Mapping[str, Any] | None, given: Iterable[str]
) -> list[dict[str, Any]]:
    paths = (
        [workdir]
        if (workdir / "metadata.json").exists()
        else sorted(path.parent for path in workdir.rglob("metadata.json") if path.parent.name in ("best", "last"))
    )
    if not workdir.is_dir():
        what = "a file (of PyTorch? `python -m rkd_jax.convert` makes it a folder)" if workdir.exists() else "not there"
        raise FileNotFoundError(f"--workdir={workdir} is {what}; name the folder of a network, or of a run")
    if not paths:
        raise FileNotFoundError(
            f"--workdir={workdir} holds no network: neither metadata.json, nor best/ and last/ of a run that was "
            "evaluated at least once, and has saved since"
        )
    if idle := [f"config.{name}" for name in given if name not in READ]:
        print(f"a test reads no {', '.join(idle)}: the networks are tested as they were trained")
    results, load_splits = [], _Kept()
    for path in paths:
        chosen = config if changes is None else recorded(path, config, changes)
        result = evaluate(chosen, path, load_splits=load_splits, by_class=True)
        random = bool(chosen.smoke and data.form(chosen.dataset))
        images = f"{result['images']:,} " + ("random images" if random else f"test images of {chosen.dataset}")
        images += f", {result['image_size']} pixels" if ":" in chosen.dataset else ""
        results.append({"path": str(path), "dataset": "random images" if random else chosen.dataset, **result})
        step = f"step {result['step']:,}: " if result["step"] is not None else ""
        line = f"{path}: {result['network']}, {step}top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
        print(f"{line} ({images})")
    try:
        _files.write_json(workdir / "evaluation.json", {"results": results, **provenance.record()})
    except OSError as error:  # a shared teacher may be read-only
        print(f"not written: {error}")
    return results
