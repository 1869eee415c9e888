"""What a teacher and a student say of images as they are and of the views that they meet in training.

    python -m benchmarks.on_views --teacher runs/teachers/resnet56 --student results/networks/cifar100_res56_res20

The test set, and 5,000 training images as they are, in weak and in strong views: top-1 accuracy of both, how often they
agree on the best class, and the mean squared difference of their centred logits beside the teacher's variance.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from rkd_jax import _files, _flags, data, evaluate, provenance
from rkd_jax.data import augment

CHUNK = 500
COLUMNS = ("student", "teacher", "agreement", "squared_difference", "variance")


def main():
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a network folder")
    parser.add_argument("--student", required=True, help="a network folder")
    parser.add_argument("--data_dir", default="", help="as config.data_dir")
    parser.add_argument("--num_train", type=_flags.positive, default=5000, help="training images")
    parser.add_argument("--output", type=Path, default=Path("results/on_views.json"))
    flags = parser.parse_args()
    with _flags.one_sentence(flags):
        splits = data.load("cifar100", flags.data_dir)
        student, teacher = (
            evaluate.restore(path, splits.test.images.shape[1:], splits, field=f"--{name}")
            for name, path in (("student", flags.student), ("teacher", flags.teacher))
        )
    centred = jax.jit(lambda images: [without_mean(network(images).logits) for network in (student, teacher)])
    chosen = np.random.default_rng(0).choice(len(splits.train.labels), flags.num_train, replace=False)
    train, labels = splits.train.images[chosen], splits.train.labels[chosen]
    found = {
        "test": compare(centred, *splits.test),
        "training": compare(centred, train, labels),
        "training, weak views": compare(centred, views("weak", train), labels),
        "training, strong views": compare(centred, views("strong", train), labels),
    }
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    _files.write_json(flags.output, {"rows": found, "provenance": provenance.record()})
    print(table(found))


def views(name, images):
    """A view of each image."""
    make = jax.jit(lambda key, images: augment.view(name, key, images))
    return np.concatenate([make(jax.random.key(i), images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)])


def without_mean(logits):
    """Each row's logits, centred."""
    return logits - logits.mean(-1, keepdims=True)


def compare(centred, images, labels):
    """The numbers of one row, from the student's and the teacher's centred logits; accuracies in percent."""
    with jax.default_matmul_precision("highest"):  # as networks are tested everywhere
        parts = [centred(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    s, t = (np.concatenate(x) for x in zip(*parts, strict=True))
    best = s.argmax(1), t.argmax(1)
    numbers = (
        100 * (best[0] == labels).mean(),
        100 * (best[1] == labels).mean(),
        100 * (best[0] == best[1]).mean(),
        np.square(s - t).mean(),
        np.square(t).mean(),
    )
    return {name: round(float(x), 2) for name, x in zip(COLUMNS, numbers, strict=True)}


def table(found):
    """The rows as a Markdown table."""
    heads = ("images", "student, top-1 %", "teacher, top-1 %", "agree, %", "squared difference", "teacher's variance")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.2f}" for c in COLUMNS) + " |" for name, row in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
