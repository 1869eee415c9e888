"""The pictures and numbers of soft_ranking.md, from a teacher's logits on CIFAR-100's test images.

    python -m docs.soft_ranking --teacher runs/teachers/resnet56

writes soft_ranks.png, blocks.png and soft_ranking.json into images/ beside this file, or into --output, and with
--rows=FILE.npz the logits of the first 64 images, which tests/test_ranking.py uses. matplotlib is needed.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from rkd_jax import _flags, data, evaluate, ranking

IMAGES = Path(__file__).parent / "images"
STRENGTHS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.003, 0.001)


def main():
    """Logits, numbers, pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="its folder")
    parser.add_argument("--data_dir", default="", help="TFDS's folder")
    parser.add_argument("--output", type=Path, default=IMAGES, help="where the pictures and numbers go")
    parser.add_argument("--rows", type=Path, help="where to write 64 rows of logits")
    flags = parser.parse_args()
    with _flags.one_sentence(flags):
        splits = data.load("cifar100", flags.data_dir)
        restored = evaluate.restore(flags.teacher, splits.test.images.shape[1:], splits, "--teacher")
    logits, labels = predict(restored, splits.test.images), splits.test.labels
    found = measure(logits, labels)
    flags.output.mkdir(exist_ok=True)
    about = {"model": restored.metadata["network"], "dataset": "cifar100", "images": len(logits)}
    (flags.output / "soft_ranking.json").write_text(json.dumps(about | found, indent=1) + "\n")
    print(json.dumps(about | found, indent=1))
    draw_ranks(logits[0], flags.output)
    draw_blocks(found["by_eps"], flags.output)
    if flags.rows:
        np.savez_compressed(flags.rows, logits=logits[:64].astype(np.float32), labels=labels[:64].astype(np.int32))


def predict(network, images):
    """The logits [N, C] of uint8 images."""
    logits = jax.jit(lambda images: network(images).logits)
    return np.concatenate([logits(images[i : i + 500]) for i in range(0, len(images), 500)])


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


def draw_ranks(row, folder):
    """Ranks against logits of one image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
    for axis, eps in zip(axes, (1.0, 0.3, 0.1, 0.01), strict=True):
        rank = ranking.soft_rank(row, regularization_strength=eps)
        axis.plot(row, rank, ".", markersize=4, color="#1f4e79")
        axis.set(title=f"eps = {eps:g}: {int(ranking.num_blocks(row, eps))} block(s)", xlabel="logit")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("soft rank")
    save(figure, folder / "soft_ranks.png")


def draw_blocks(by_eps, folder):
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
    save(figure, folder / "blocks.png")


def save(figure, path):
    """A small picture."""
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
