"""A training step's time on a GPU, by XLA's flags, the arithmetic, and the students that share it.

    python -m benchmarks.gpu_flags --output results/gpu_flags.json

Each variant is a process of its own: all compile at the same time, for a minute, and are then timed in turn, each
alone on the device, three times 284 steps. The pairs are those of `benchmarks.train_step`, with both views, the set
on the device and 71 steps a call. With `--peers`, PyTorch's steps too, as `benchmarks.train_step` has them: eager,
compiled by `torch.compile`, and as one CUDA graph. XLA_FLAGS that are set are left out. It needs PyTorch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
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
    parser.add_argument("--output", type=Path, help="default, for all pairs and flags: results/gpu_flags.json")
    parser.add_argument("--peers", action="store_true", help="PyTorch's steps too")
    parser.add_argument("--pairs", nargs="+", choices=(SMALL, LARGE), default=(SMALL, LARGE), help="these alone")
    parser.add_argument("--flags", nargs="+", choices=tuple(FLAGS), default=tuple(FLAGS), help="of XLA, these alone")
    parser.add_argument("--seconds", type=float, default=105, help="of compiling, after which those that are ready go")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    variants = [variant for variant in VARIANTS if variant.pair in flags.pairs and variant.flags in flags.flags]
    if flags.one is not None:
        return one(flags.one, flags.meet, flags.seconds, variants)
    if not variants:
        parser.error("no variant has these --pairs and --flags")
    if flags.output is None and len(variants) < len(VARIANTS):
        parser.error("name an --output: results/gpu_flags.json has all pairs and flags")
    output = flags.output or Path("results/gpu_flags.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not (rows := timed(variants, flags)):
        sys.exit("benchmarks.gpu_flags: no variant could be timed")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the peers need memory, and have this process's device
    from rkd_jax import _files, provenance

    found = {"rows": rows, "peers": [], "provenance": provenance.record()}
    found["provenance"]["versions"] |= {"torch": metadata.version("torch")} if flags.peers else {}
    _files.write_json(output, found)
    for row in peers(flags.pairs) if flags.peers else ():
        found["peers"].append(row)
        _files.write_json(output, found)  # whatever becomes of the others
    print(table(found))
    return None


def timed(variants, flags):
    """The rows of the variants, each in a process of its own; what fails is said, and left out."""
    with tempfile.TemporaryDirectory() as folder:
        meet = Path(folder)
        command = [sys.executable, "-m", "benchmarks.gpu_flags", "--meet", folder, "--seconds", str(flags.seconds)]
        command += ["--pairs", *flags.pairs, "--flags", *flags.flags]
        processes = [
            subprocess.Popen(
                [*command, "--one", str(i)],
                env=os.environ | {"XLA_FLAGS": FLAGS[variant.flags], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            for i, variant in enumerate(variants)
        ]
        until = time.monotonic() + flags.seconds + 8 * len(variants) + 60
        while None in [process.poll() for process in processes] and time.monotonic() < until:
            for i, process in enumerate(processes):
                if process.poll():  # XLA ends a process without a word to the others
                    leave(meet, i)
            time.sleep(0.1)
        for variant, process in zip(variants, processes, strict=True):
            process.kill()
            if process.wait():
                print(f"{variant}: exit {process.returncode}", file=sys.stderr)
        return [json.loads(path.read_text()) for path in sorted(meet.glob("*.json"))]


def one(index, meet, seconds, variants):
    """A variant's time, once those before it are timed."""
    start, variant = time.monotonic(), variants[index]
    try:
        import jax

        if jax.default_backend() != "gpu":
            sys.exit("benchmarks.gpu_flags: no GPU")
        run = stepper(variant)
        setup = time.monotonic()
        run(CALL)
        compiled = time.monotonic()
        (meet / f"{index}.ready").touch()
        # Not beyond all measure: one that fails to compile is not waited for.
        alone = wait_for([meet / f"{i}.ready" for i in range(len(variants))], start + seconds)
        alone &= wait_for([meet / f"{i}.done" for i in range(index)], start + seconds + 8 * index)
        run(2 * CALL)
        row = variant._asdict() | {"milliseconds": sorted(milliseconds(run, CALLS * CALL) for _ in range(3))}
        row |= {"alone": alone, "setup_seconds": round(setup - start), "compile_seconds": round(compiled - setup)}
        (meet / f"{index}.json").write_text(json.dumps(row))
    finally:
        leave(meet, index)


def leave(meet, index):
    """Has nobody wait for a variant."""
    for name in ("ready", "done"):
        (meet / f"{index}.{name}").touch()


def wait_for(paths, until):
    """Until all of the files are there, or it is time; returns whether they are."""
    while not (there := all(path.exists() for path in paths)) and time.monotonic() < until:
        time.sleep(0.02)
    return there


def stepper(variant):
    """A run of steps, as `benchmarks.train_step` has them, CALL a call."""
    import jax.numpy as jnp

    from benchmarks import train_step as pairs
    from rkd_jax import methods, steps

    if not variant.packed:
        steps.PACKED = 0
    names = variant.methods.split("+")
    learn_by = [methods.resolve(name, {}, "cifar100", *pairs.PAIRS[variant.pair][:2]) for name in names]
    ours = pairs.Ours(variant.pair, getattr(jnp, variant.dtype), names[0])
    return ours.stepper(50_000, learn_by=learn_by, a_call=CALL)


def milliseconds(run, count):
    """Of a step, over so many."""
    start = time.perf_counter()
    run(count)
    return round(1e3 * (time.perf_counter() - start) / count, 3)


def peers(chosen):
    """Milliseconds of PyTorch's steps, [least, median, most] of five times 60 steps (20 as used), or what failed."""
    from benchmarks import train_step as pairs

    sides = {
        ("eager, step", "TF32"): pairs.torch_step,
        ("eager, as used", "TF32"): pairs.torch_as_used,
        ("torch.compile, step", "bfloat16"): lambda pair: pairs.torch_step(pair, "reduce-overhead"),
        ("CUDA graph, step", "bfloat16"): lambda pair: pairs.torch_step(pair, graph=True),
        ("torch.compile and CUDA graph, step", "bfloat16"): lambda pair: pairs.torch_step(pair, "default", graph=True),
    }
    for pair in chosen:
        for (name, arithmetic), make in sides.items():
            row = {"pair": pair, "name": name, "arithmetic": arithmetic}
            try:
                run, count = make(pair), 20 if "as used" in name else 60
                run(10)
                times = sorted(milliseconds(run, count) for _ in range(5))
                row["milliseconds"] = [times[0], times[2], times[4]]
            except Exception as error:  # whatever the compiler fails with
                row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{pair}, PyTorch, {name}: {row['failed']}", file=sys.stderr)
            yield row


def table(found):
    """The rows as a Markdown table."""
    lines = ["| pair | students | arithmetic | XLA_FLAGS | ms a step | images/s |", "|---" * 6 + "|"]
    for row in found["rows"]:
        median = row["milliseconds"][1]
        note = ("" if row["packed"] else ", arrays not packed") + ("" if row["alone"] else ", not alone")
        lines.append(
            f"| {row['pair']} | {row['methods'].replace('+', ', ')} | {row['dtype']} | {row['flags'] or 'none'}{note} "
            f"| {median:.2f} | {64e3 / median:,.0f} |"
        )
    for row in found["peers"]:
        if "failed" in row:
            continue
        median = row["milliseconds"][1]
        lines.append(
            f"| {row['pair']} | PyTorch, {row['name']} | {row['arithmetic']} | | {median:#.3g} | {64e3 / median:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
