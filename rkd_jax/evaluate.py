"""Restores networks from disk and reports their accuracy."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from clu import parameter_overview
from ml_collections import ConfigDict

from rkd_jax import checkpoint, experiment, models, steps, train


def evaluate(config: ConfigDict, path: str | os.PathLike) -> dict[str, Any]:
    """Accuracy of one network folder on the config's test set.

    The network is the one that the folder names, with its own normalisation; of the config, only the fields about the
    data and `eval_batch_size` are read. Returns {"network", "parameters", "step" (None: not trained here), "top1",
    "top5" (both in percent), "loss", "images"}.
    """
    fields = experiment.Fields(experiment.shrink(config))
    splits = experiment.load_splits(fields)
    variables, metadata = checkpoint.load_network(path, num_classes=splits.num_classes, field="--workdir")
    side = splits.test.images.shape[1]
    network = models.create(metadata["network"], splits.num_classes, image_size=side, field=f"network of {path}")
    experiment.check_variables(network, variables, splits.test.images.shape[1:], str(path))
    normalization = steps.Normalization(tuple(metadata["mean"]), tuple(metadata["std"]))
    eval_step = steps.make_eval_step(network, normalization)
    result = steps.evaluate(eval_step, variables, *splits.test, fields.at_least("eval_batch_size", 1))
    return {
        "network": metadata["network"],
        "parameters": int(parameter_overview.count_parameters(variables["params"])),
        "step": metadata.get("step"),
        **result,
        "images": len(splits.test.labels),
    }


def run(config: ConfigDict, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """What `python main.py --mode=eval` does: evaluates a network folder, or the best and last networks of runs.

    Prints a line for each, and writes them all, with command, commit, versions and device, to WORKDIR/evaluation.json.
    """
    workdir = Path(workdir)
    paths = (
        [workdir]
        if (workdir / "metadata.json").exists()
        else sorted(
            path.parent
            for pattern in ("*/metadata.json", "*/*/metadata.json")
            for path in workdir.glob(pattern)
            if path.parent.name in ("best", "last")
        )
    )
    if not paths:
        raise FileNotFoundError(
            f"--workdir={workdir} holds no network: neither metadata.json, nor best/ and last/ of a run that was "
            "evaluated at least once"
        )
    results = []
    for path in paths:
        result = evaluate(config, path)
        results.append({"path": str(path), **result})
        step = f"step {result['step']:,}: " if result["step"] is not None else ""
        print(
            f"{path}: {result['network']}, {step}top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % "
            f"({result['images']:,} test images)"
        )
    with contextlib.suppress(PermissionError):  # a shared teacher may be read-only
        (workdir / "evaluation.json").write_text(
            json.dumps({"results": results, **train.provenance()}, indent=2) + "\n"
        )
    return results
