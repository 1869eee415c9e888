"""What a training step is on TPU v5e chips, compiled without one: its memory, what chips exchange, XLA's cost estimate.

    pip install "jax[tpu]" && JAX_PLATFORMS=cpu python -m benchmarks.tpu_program

XLA compiles for chips that are only described, here one and four of them: nothing is run or timed, and the cycles are
the estimate of XLA's own cost model, by which it schedules, of one step in bfloat16 at the config's batch.
"""

import argparse
import collections
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks import gpu_program
from rkd_jax import _files, provenance

CHIPS = (1, 4)
# A host that is not there.
HOST = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
CONFIGS = ("cifar100_res56_res20", "cifar100_res32x4_res8x4")
EXCHANGES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def main():
    """Prints a table of the configs' steps and keeps the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="files of configs/, without .py")
    parser.add_argument("--output", type=Path, default=Path("results/tpu_program.json"))
    flags = parser.parse_args()
    os.environ.update(HOST)
    jax.devices()  # the CPU's, before they are named a TPU's
    jax.default_backend = lambda: "tpu"
    found = {"steps": {}, "provenance": provenance.record() | {"device": "none; compiled for TPU v5e"}}
    for name in flags.configs:
        for chips in CHIPS:
            found["steps"][f"{name}, {chips}"] = step = tally(gpu_program.compiled(name, {}, describe(chips)))
            print(f"{name}, {chips}: {step}", flush=True)
    _files.write_json(flags.output, found)
    print(table(found["steps"]))


def describe(chips):
    """A mesh of so many chips; and from here on, everything is made as it is for them."""
    jax.device_count = lambda *_: chips
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:chips]
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def tally(program):
    """A step's memory on each chip in MiB, exchanges, and estimated cycles of each of its parts."""
    body, cycles = gpu_program.loop(program.as_text()), collections.Counter()
    for line in body.splitlines():
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles[gpu_program.part_of(line)] += int(estimate.group(1))
    memory = program.memory_analysis()
    return {
        "arguments_mib": memory.argument_size_in_bytes >> 20,
        "temporary_mib": memory.temp_size_in_bytes >> 20,
        "exchanges": {name: len(re.findall(rf" {name}(?:-start)?\(", body)) for name in EXCHANGES},
        "cycles": {part: cycles[part] for part in gpu_program.PARTS},
    }


def table(found):
    """The steps as a Markdown table."""
    heads = ("config, chips", "set and state, MiB", "temporary, MiB", "all-reduces", "other exchanges")
    heads = (*heads, "cycles estimated, millions", *(f"{part}, %" for part in gpu_program.PARTS))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, step in found.items():
        total, reduces = sum(step["cycles"].values()), step["exchanges"]["all-reduce"]
        row = [name, step["arguments_mib"], step["temporary_mib"], reduces]
        row += [sum(step["exchanges"].values()) - reduces, f"{total / 1e6:.1f}"]
        row += [f"{100 * step['cycles'][part] / total:.0f}" for part in gpu_program.PARTS]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
