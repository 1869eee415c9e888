"""The pictures and numbers of soft_ranking.md, from a teacher's logits on a test set.

    python -m docs.soft_ranking --checkpoint cifar100_resnet56.pt --data_dir ~/tensorflow_datasets

writes images/soft_ranks.png, images/blocks.png and images/soft_ranking.json beside this file, and with --rows=FILE.npz
the logits of the first 64 images, which tests/test_ranking.py uses. matplotlib is needed.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import convert, data, models, ranking

IMAGES = Path(__file__).parent / "images"
STRENGTHS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.003, 0.001)


def main():
    """Logits, numbers, pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the teacher, in PyTorch's format")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--data_dir", default="", help="TFDS's folder")
    parser.add_argument("--normalisation", default="pytorch-cifar-models", choices=convert.NORMALISATION)
    parser.add_argument("--rows", type=Path, help="where to write 64 rows of logits")
    flags = parser.parse_args()
    logits, labels = predict(flags)
    found = measure(logits, labels)
    IMAGES.mkdir(exist_ok=True)
    about = {"model": flags.model, "dataset": flags.dataset, "images": len(logits)}
    (IMAGES / "soft_ranking.json").write_text(json.dumps(about | found, indent=1) + "\n")
    print(json.dumps(about | found, indent=1))
    draw_ranks(logits[0])
    draw_blocks(found["by_eps"])
    if flags.rows:
        np.savez_compressed(flags.rows, logits=logits[:64].astype(np.float32), labels=labels[:64].astype(np.int32))


def predict(flags):
    """The teacher's logits [N, C] and the labels [N] of the test set."""
    splits = data.load(flags.dataset, data_dir=flags.data_dir)
    network = models.create(flags.model, splits.num_classes)
    variables = convert.from_torch(flags.checkpoint, flags.model, splits.num_classes)
    mean, std = (jnp.asarray(x, jnp.float32) for x in convert.NORMALISATION[flags.normalisation])

    @jax.jit
    def apply(images):
        return network.apply(variables, (images / jnp.float32(255) - mean) / std, train=False).logits

    images = splits.test.images
    logits = [np.asarray(apply(jnp.asarray(images[i : i + 500]))) for i in range(0, len(images), 500)]
    return np.concatenate(logits), np.asarray(splits.test.labels)


def measure(logits, labels):
    """Blocks for each eps, and the eps below which a row is more than one block."""
    by_eps = {}
    for eps in STRENGTHS:
        blocks = np.asarray(jax.jit(ranking.num_blocks)(logits, eps))
        by_eps[str(eps)] = {
            "mean_blocks": round(float(blocks.mean()), 2),
            "p05_blocks": float(np.percentile(blocks, 5)),
            "p95_blocks": float(np.percentile(blocks, 95)),
            "one_block_fraction": round(float((blocks == 1).mean()), 4),
        }
    onset = ranking_begins(logits)
    return {
        "top1": round(float((logits.argmax(-1) == labels).mean()), 4),
        "by_eps": by_eps,
        "ranking_begins_at_eps": {f"p{q}": round(float(np.percentile(onset, q)), 3) for q in (1, 50, 99)},
    }


def ranking_begins(logits):
    """The largest eps at which a row is more than one block: max_k 2 (sum of the k largest centred) / (k (C - k))."""
    ordered = -np.sort(-np.asarray(logits, np.float64), axis=-1)
    top = np.cumsum(ordered - ordered.mean(-1, keepdims=True), axis=-1)[..., :-1]
    k = np.arange(1, logits.shape[-1])
    return np.max(2 * top / (k * (logits.shape[-1] - k)), axis=-1)


def draw_ranks(row):
    """Ranks against logits of one image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
    for axis, eps in zip(axes, (1.0, 0.3, 0.1, 0.01), strict=True):
        rank = ranking.soft_rank(row, regularization_strength=eps)
        axis.plot(row, rank, ".", markersize=4, color="#1f4e79")
        axis.set(title=f"eps = {eps:g}: {int(ranking.num_blocks(row, eps))} block(s)", xlabel="logit")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("soft rank")
    save(figure, "soft_ranks.png")


def draw_blocks(by_eps):
    """Number of blocks, and how many rows are one block, against eps."""
    import matplotlib.pyplot as plt

    eps = [float(e) for e in by_eps]
    column = {name: [row[name] for row in by_eps.values()] for name in next(iter(by_eps.values()))}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    left.fill_between(eps, column["p05_blocks"], column["p95_blocks"], alpha=0.25, color="#1f4e79", label="5 to 95 %")
    left.plot(eps, column["mean_blocks"], "o-", markersize=4, color="#1f4e79", label="mean")
    left.set(xlabel="eps", ylabel="blocks of 100", xscale="log")
    left.legend()
    right.plot(eps, column["one_block_fraction"], "o-", markersize=4, color="#1f4e79")
    right.set(xlabel="eps", ylabel="rows that are one block", xscale="log")
    for axis in (left, right):
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    save(figure, "blocks.png")


def save(figure, name):
    """A small picture."""
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=90)


if __name__ == "__main__":
    main()
