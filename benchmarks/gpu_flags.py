"""A training step's time on a GPU, by XLA's flags, the arithmetic, and the students that share it.

    python -m benchmarks.gpu_flags --output results/gpu_flags.json

Each variant is a process of its own: all compile at the same time, for a minute, and are then timed in turn, each
alone on the device, three times 284 steps. The pairs are those of `benchmarks.train_step`, with both views, the batch
on the device and 71 steps a call. With `--peers`, PyTorch's eager steps too, as `benchmarks.train_step` has them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"
FLAGS = {
    "": "",
    "graphs": f"{GRAPHS} --xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "graphs, loop too": f"{GRAPHS},+WHILE,+CONDITIONAL --xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
}
SMALL, LARGE = "resnet56-resnet20", "resnet32x4-resnet8x4"
RANKING = "ranking_alignment"
CALL, CALLS = 71, 4


class Variant(NamedTuple):
    """What is timed."""

    pair: str
    methods: str = RANKING  # of the students that share the program
    dtype: str = "bfloat16"
    flags: str = ""  # of FLAGS
    packed: bool = True  # steps.PACKED as it is, or 0


VARIANTS = (
    Variant(SMALL),
    Variant(SMALL, packed=False),
    Variant(SMALL, flags="graphs"),
    Variant(SMALL, flags="graphs, loop too"),
    Variant(SMALL, f"{RANKING}+kd+cross_entropy", flags="graphs"),
    Variant(SMALL, f"{RANKING}+kd+cross_entropy"),
    Variant(SMALL, dtype="float32"),
    Variant(LARGE),
    Variant(LARGE, flags="graphs"),
)


def main():
    """Times every variant; prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/gpu_flags.json"))
    parser.add_argument("--peers", action="store_true", help="PyTorch's eager steps too")
    parser.add_argument("--seconds", type=float, default=105, help="of compiling, after which those that are ready go")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one is not None:
        return one(flags.one, flags.meet, flags.seconds)
    with tempfile.TemporaryDirectory() as meet:
        command = [sys.executable, "-m", "benchmarks.gpu_flags", "--meet", meet, "--seconds", str(flags.seconds)]
        processes = [
            subprocess.Popen(
                [*command, "--one", str(i)],
                env=os.environ
                | {
                    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[variant.flags]}",
                    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                },
            )
            for i, variant in enumerate(VARIANTS)
        ]
        for process in processes:
            process.wait()
        rows = [json.loads(path.read_text()) for path in sorted(Path(meet).glob("*.json"))]
    from rkd_jax import _files, provenance

    found = {"rows": rows, "peers": peers() if flags.peers else [], "provenance": provenance.record()}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    _files.write_json(flags.output, found)
    print(table(found))
    return None


def one(index, meet, seconds):
    """A variant's time, once those before it are timed."""
    start, variant = time.monotonic(), VARIANTS[index]
    try:
        import jax

        if jax.default_backend() != "gpu":
            sys.exit("benchmarks.gpu_flags: no GPU")
        run, setup = stepper(variant)
        run(1)
        compiled = time.monotonic() - start
        (meet / f"{index}.ready").touch()
        # Not beyond all measure: one that fails to compile is not waited for.
        alone = wait_for([meet / f"{i}.ready" for i in range(len(VARIANTS))], start + seconds)
        alone &= wait_for([meet / f"{i}.done" for i in range(index)], start + seconds + 8 * index)
        run(2)
        times = sorted(run(CALLS) for _ in range(3))
        row = variant._asdict() | {"milliseconds": [round(1e3 * x, 3) for x in times]}
        row |= {
            "alone": alone,
            "setup_seconds": round(setup - start),
            "compile_seconds": round(compiled - (setup - start)),
        }
        (meet / f"{index}.json").write_text(json.dumps(row))
    finally:
        for name in ("ready", "done"):
            (meet / f"{index}.{name}").touch()


def wait_for(paths, until):
    """Until all of the files are there, or it is time; returns whether they are."""
    while not (there := all(path.exists() for path in paths)) and time.monotonic() < until:
        time.sleep(0.02)
    return there


def stepper(variant):
    """A call that makes so many calls of CALL steps, and returns the seconds of a step; and when it was ready."""
    import jax
    import jax.numpy as jnp

    from benchmarks import train_step as pairs
    from rkd_jax import experiment, methods, steps

    if not variant.packed:
        steps.PACKED = 0
    names = variant.methods.split("+")
    ours = pairs.Ours(variant.pair, getattr(jnp, variant.dtype), names[0])
    learners = [
        experiment.create_learner(
            ours.student, methods.resolve(name, {}, "cifar100", *pairs.PAIRS[variant.pair][:2]), ours.tx
        )
        for name in names
    ]
    images, labels = pairs.random_images(50_000, ours.side, ours.classes)
    normalization = pairs.NORMALIZATION, pairs.NORMALIZATION
    recipe = steps.Recipe(("weak", "strong"), {"padding": 4}, pairs.BATCH, 781, 10_000, *normalization)
    inputs = steps.Inputs(ours.rng, (ours.rng,) * len(learners), images, labels, ours.variables)
    inputs = steps.replicate(inputs, ours.mesh)
    order = steps.replicate(steps.epoch_order(ours.rng, 0, len(labels)), ours.mesh)
    step = steps.make_train_step(learners, ours.teacher, recipe, ours.mesh)
    held = [tuple(jax.tree.map(jnp.copy, ours.state) for _ in learners)]

    def run(count):
        start = time.perf_counter()
        for _ in range(count):
            held[0], _ = step(held[0], inputs, order, CALL)
        jax.block_until_ready(held[0])
        return (time.perf_counter() - start) / count / CALL

    return run, time.monotonic()


def peers():
    """Milliseconds of PyTorch's eager steps, [least, median, most] of five times 60 steps."""
    from benchmarks import train_step as pairs

    found = []
    for pair, name, make in (
        (SMALL, "step", pairs.torch_step),
        (LARGE, "step", pairs.torch_step),
        (SMALL, "as used", pairs.torch_as_used),
    ):
        run, count, times = make(pair), 20 if name == "as used" else 60, []
        run(10)
        for _ in range(5):
            start = time.perf_counter()
            run(count)
            times.append(1e3 * (time.perf_counter() - start) / count)
        found.append({"pair": pair, "name": name, "milliseconds": [round(sorted(times)[i], 3) for i in (0, 2, 4)]})
    return found


def table(found):
    """The rows as a Markdown table."""
    lines = ["| pair | students | arithmetic | XLA_FLAGS | ms a step | images/s |", "|---" * 6 + "|"]
    for row in found["rows"]:
        milliseconds = row["milliseconds"][1]
        note = "" if row["packed"] else ", arrays not packed"
        lines.append(
            f"| {row['pair']} | {row['methods'].replace('+', ', ')} | {row['dtype']} | {row['flags'] or 'none'}{note} "
            f"| {milliseconds:.2f} | {64e3 / milliseconds:,.0f} |"
        )
    for row in found["peers"]:
        milliseconds = row["milliseconds"][1]
        lines.append(
            f"| {row['pair']} | PyTorch, eager, {row['name']} | TF32 | | {milliseconds:.1f} | "
            f"{64e3 / milliseconds:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
