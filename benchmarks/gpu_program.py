"""What a training step is on an NVIDIA H100, compiled without one: its kernels, their memory traffic, its products.

    pip install "jax[cuda13]" && JAX_PLATFORMS=cpu python -m benchmarks.gpu_program [--configs NAME ...]

XLA compiles for a device that is only described: no GPU is used, and nothing is timed. Counted is the body of the loop
over the steps, in bfloat16, at the config's batch: what XLA starts on the device for one step, and the bytes that each
of these reads and writes. Which of its algorithms cuDNN takes for a convolution is found on the device alone.
"""

import argparse
import collections
import importlib
import json
import math
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of a driver that is not there

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rkd_jax import _files, experiment, provenance, steps

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CONFIGS = (
    "cifar100_res56_res20", "cifar100_res32x4_res8x4", "cifar100_wrn40_2_wrn16_2", "cifar100_res50_mv2",
    "tinyimagenet_res18_mv2",
)  # fmt: skip
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)")
COUNTS = ("kernels", "convolutions", "MB", "GFLOP")
PARTS = ("teacher", "student", "loss", "the rest")
NO_KERNEL = ("parameter", "get-tuple-element", "constant", "bitcast", "tuple")


def main():
    """Prints a table of the configs' steps and keeps the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="files of configs/, without .py")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the config, as JSON")
    parser.add_argument("--output", type=Path, default=Path("results/gpu_program.json"))
    flags = parser.parse_args()
    mesh = describe()
    fields = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in flags.set)}
    found = {"steps": {}, "provenance": provenance.record() | {"device": "none; compiled for NVIDIA H100 80GB HBM3"}}
    for name in flags.configs:
        found["steps"][name] = tally(compiled(name, fields, mesh).as_text())
    _files.write_json(flags.output, found)
    print(table(found["steps"]))


def describe():
    """A mesh of one H100; and from here on, everything is made as it is for a GPU."""
    jax.devices()  # the CPU's, before they are named a GPU's
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    jax.default_backend = lambda: "gpu"
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def compiled(name, fields, mesh):
    """The program of two steps of a config, in bfloat16 and at its real size."""
    config = importlib.import_module(f"configs.{name}").get_config()
    batch_size, num_images = config.batch_size, 100_000 if config.dataset == "tiny_imagenet" else 50_000
    config.update(fields | {"smoke": True, "dtype": "bfloat16"})
    run = experiment.build(config)
    recipe = run.recipe._replace(batch_size=batch_size, steps_per_epoch=num_images // batch_size)
    step, key = steps.make_train_step([run.learner], run.teacher, recipe, mesh), jax.random.key(0)
    images = jax.ShapeDtypeStruct((num_images, *run.splits.train.images.shape[1:]), jnp.uint8)
    labels = jax.ShapeDtypeStruct((num_images,), jnp.int32)
    inputs = steps.Inputs(key, (key,), images, labels, run.teacher_variables)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(lambda: run.create_state(key))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), ((state,), inputs, labels)
    )
    return step.lower(*arguments, 2).compile()


def tally(program):
    """Of each part of a step: kernels, how many of them are convolutions, MB moved, GFLOP of the convolutions."""
    body = loop(program)
    shapes, found = {}, collections.defaultdict(lambda: [0] * len(COUNTS))
    for name, shape, opcode, rest in INSTRUCTION.findall(body):
        shapes[name] = shape
        if opcode in NO_KERNEL:
            continue
        operands = [shapes.get(operand, "") for operand in re.findall(r"%[\w.-]+", rest.split("), ")[0])]
        moved = sum(map(size_of, [shape, *operands]))
        if any(size_of(operand) > 1e8 and operand.startswith("u8") for operand in operands):
            moved = 2 * size_of(shape)  # a gather from the training set
        convolution = "__cudnn$conv" in rest
        row = [1, int(convolution), moved / 1e6, operations(rest, shape, operands) / 1e9 if convolution else 0]
        for part in (part_of(rest), "all"):
            found[part] = [a + b for a, b in zip(found[part], row, strict=True)]
    return {part: dict(zip(COUNTS, row, strict=True)) for part, row in found.items()}


def loop(program):
    """The body of the loop over the steps, by far the longest of a program's computations."""
    return max(re.findall(r"^%?[\w.-]+ \(.*?\) -> .*? \{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL), key=len)


def part_of(instruction):
    """Of the step, by the name that JAX gave the operation."""
    name = re.search(r'op_name="(?:jit\(train_steps\)/while/body/\w+/)?([^"]*)"', instruction)
    name = name.group(1) if name else ""
    scope = re.sub(r"(transpose|jvp|vmap)\(|\)", "", name.split("/")[0])  # a network, a function's jit(), or nothing
    if "jvp(" in name:
        return "student" if re.match("[A-Z]", scope) else "loss"
    return "teacher" if re.match("[A-Z]", scope) else "the rest"


def dimensions(shape):
    """The array dimensions in an HLO shape: pairs of dtype and sizes."""
    pairs = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return [(kind, [int(x) for x in sizes.split(",") if x]) for kind, sizes in pairs if kind in BYTES]


def size_of(shape):
    """Bytes of an HLO shape, a tuple's too."""
    return sum(BYTES[kind] * math.prod(sizes) for kind, sizes in dimensions(shape))


def operations(instruction, shape, operands):
    """Of a convolution, multiplications and additions."""
    (_, a), (_, b), (_, out) = (dimensions(x)[0] for x in (*operands[:2], shape))
    if "BackwardFilter" in instruction:
        return 2 * math.prod(b) * math.prod(out) // b[-1]
    if "BackwardInput" in instruction:
        return 2 * math.prod(a) * math.prod(b) // a[-1]
    return 2 * math.prod(out) * math.prod(b) // out[-1]


def table(found):
    """The steps as a Markdown table."""
    heads = ("config", "kernels", "of these convolutions", *PARTS, "moved, MB", "convolutions, GFLOP")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, step in found.items():
        kernels, convolutions, size, flops = (step["all"][count] for count in COUNTS)
        row = [
            name,
            kernels,
            convolutions,
            *(step.get(part, {"kernels": 0})["kernels"] for part in PARTS),
            f"{size:.0f}",
            f"{flops:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
