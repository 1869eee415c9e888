"""Images per second of whole training steps, beside PyTorch; both sides in one run.

    python -m benchmarks.train_step --pairs resnet56-resnet20 [--quick]

A step takes a batch of 64 images, makes two views of each, applies the teacher once and the student once to each view,
forward and, the student, backward, and updates by SGD. An image counts once, whatever its views. The sides:

rkd_jax           the project's step: batch, views, networks, ranking_alignment and update, all on the device
rkd_jax step      the same without augmentation: the images as they are, twice (XLA then shares the student's first
                  convolution, a third of a percent of the work)
... bfloat16      as these, networks in bfloat16; GPU alone
PyTorch as used   DataLoader with workers, PIL views, eager, NCHW, float32
PyTorch step      eager, channels_last, float32; one batch that lies on the device, no augmentation
PyTorch best      as that, with torch.compile, on a GPU with CUDA graphs (mode="reduce-overhead", or the default mode
                  where that fails) and bfloat16 autocast too; left out where it does not work

On a GPU rkd_jax folds the teacher's batch norms, as it does in training, and float32 is TF32 on both sides, which is
XLA's default and that of PyTorch's convolutions.

The PyTorch sides compute the loss as the squared difference of centred logits, which soft ranks are at eps = 1: it is
the cheaper loss. Every repetition times each side once, in turn; times are medians, ratios medians over repetitions of
PyTorch's time / ours. What the output file holds already of other pairs and stages is kept.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the GPU's memory too

from rkd_jax import _files, _flags, _memory, provenance

if __name__ == "__main__":
    _memory.keep()

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import pil_views
from rkd_jax import experiment, losses, methods, models, optim, steps
from rkd_jax.data import augment
from rkd_jax.models import __main__ as networks
from tests import torch_networks

BATCH = 64
PAIRS = {  # teacher, student, side of the images, classes
    "resnet56-resnet20": ("resnet56", "resnet20", 32, 100),
    "resnet32x4-resnet8x4": ("resnet32x4", "resnet8x4", 32, 100),
    "wrn_40_2-wrn_16_2": ("wrn_40_2", "wrn_16_2", 32, 100),
    "ResNet50-MobileNetV2": ("ResNet50", "MobileNetV2", 32, 100),
    "ResNet18-MobileNetV2-64": ("ResNet18", "MobileNetV2_64x64", 64, 200),
}
NORMALIZATION = steps.Normalization((0.5,) * 3, (0.25,) * 3)


@functools.cache
def on_gpu():
    """Whether jax has a GPU. Not asked on import: a DataLoader's workers import this module, and would take it too."""
    return jax.default_backend() == "gpu"


def main():
    """Measure every pair, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--quick", action="store_true", help="two repetitions; no torch.compile")
    parser.add_argument("--repeats", type=_flags.positive, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="default: all")
    parser.add_argument("--output", type=Path, default=Path(f"results/train_step_{jax.default_backend()}.json"))
    parser.add_argument("--alone", choices=["rkd_jax", "PyTorch"], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.quick:
        flags.repeats, flags.no_compile = 2, True
    if flags.alone:
        return alone(flags.alone, flags.pairs[0])
    found = json.loads(flags.output.read_text()) if flags.output.exists() else {}
    for pair in flags.pairs:
        for stage in flags.stages:
            row = STAGES[stage](pair, flags) | {"provenance": provenance.record()}
            print(json.dumps({pair: {stage: {k: v for k, v in row.items() if k in SHOWN}}}, indent=1), flush=True)
            found.setdefault(pair, {})[stage] = row
            flags.output.parent.mkdir(parents=True, exist_ok=True)
            _files.write_json(flags.output, found)
    print(table(found))
    return None


def whole(pair, flags):
    """Steps of every side: images per second, ratios, floating-point operations per second."""
    ours, notes = Ours(pair), {"cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    sides = {"rkd_jax": ours.stepper(), "rkd_jax step": ours.stepper(views=("none", "none"))}
    if on_gpu():
        ours = Ours(pair, jnp.bfloat16)
        sides |= {"rkd_jax bfloat16": ours.stepper(), "rkd_jax step bfloat16": ours.stepper(views=("none", "none"))}
    sides |= {"PyTorch as used": torch_as_used(pair), "PyTorch step": torch_step(pair)}
    if flags.no_compile:
        notes["PyTorch best"] = "torch.compile was left out"
    else:
        for mode in ("reduce-overhead", "default") if on_gpu() else ("default",):
            try:
                best = torch_step(pair, mode)
                for _ in range(3):  # the second call records CUDA graphs
                    best(1)
            except Exception as error:  # whatever the compiler fails with
                notes[f"torch.compile, {mode}"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            else:
                sides["PyTorch best"], notes["PyTorch best"] = best, f"torch.compile, {mode}"
                break
    seconds = time_in_turn(sides, flags.repeats)
    ratios = {
        "whole step / PyTorch as used": ratio(seconds, "PyTorch as used", "rkd_jax"),
        "step / PyTorch step": ratio(seconds, "PyTorch step", "rkd_jax step"),
    }
    if "PyTorch best" in seconds:
        ours = "rkd_jax step bfloat16" if on_gpu() else "rkd_jax step"
        ratios["step / PyTorch best"] = ratio(seconds, "PyTorch best", ours)
    return {
        "images_per_second": {name: round(BATCH / np.median(s), 2) for name, s in seconds.items()},
        "ratio": ratios,
        "gflops": rates(pair, seconds),
        "seconds": rounded(seconds),
        "notes": notes,
    }


def stretch(pair, flags):
    """Many steps in a row, as a GPU trains: the time of 300 epochs from them, and what the step's time goes to.

    The time is of training alone, without evaluating and saving. "relative" are times without a part, or otherwise, to
    the whole step's. The peak of memory is the process's: measure one pair at a time.
    """
    count, dtype = (2000, jnp.bfloat16) if on_gpu() else (10, jnp.float32)
    ours = Ours(pair, dtype)
    whole = ours.stepper(50_000)
    whole(20 if on_gpu() else 1)  # compiles
    start = time.perf_counter()
    whole(count)
    step = (time.perf_counter() - start) / count
    found = {"dtype": dtype.__name__, "steps": count, "milliseconds_a_step": round(1e3 * step, 3)}
    found["hours_of_300_epochs"] = round(300 * (50_000 // BATCH) * step / 3600, 2)
    found["peak_mb"] = peak_device() >> 20 if on_gpu() else peak_resident() >> 10
    found["gflops"] = round(operations(pair) / step / 1e9, 1)
    product = time_in_turn({"": product_step(dtype)}, 5)[""]
    found["part_of_matrix_rate"] = round(operations(pair) / step / (2 * product_size() ** 3 / np.median(product)), 4)
    others = {
        "without augmentation": ours.stepper(50_000, views=("none", "none")),
        "without the teacher and its loss": Ours(pair, dtype, "cross_entropy").stepper(50_000),
        "one step a call": ours.stepper(50_000, a_call=1),
    }
    seconds = time_in_turn({"whole": whole, **others}, flags.repeats)
    found["relative"] = {name: ratio(seconds, name, "whole") for name in others}
    if on_gpu():
        try:
            found["kernels"] = kernels(whole)
        except Exception as error:  # a profile is not worth the numbers above
            found["kernels"] = f"{type(error).__name__}: {error}"
    return found


def kernels(run, device="/device:GPU", line="Stream"):
    """Milliseconds of a step that kinds of kernels take, by name, the longest first; the device idles in the rest."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            run(20)
            seconds = time.perf_counter() - start
        (path,) = Path(folder).rglob("*.xplane.pb")
        found = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for each in plane.lines if plane.name.startswith(device) else ():
                for event in each.events if each.name.startswith(line) else ():
                    found[re.sub(r"[._]?\d+$", "", event.name)] += event.duration_ns / 1e9
    busy = {"all": sum(found.values()), **dict(found.most_common(25))}
    return {
        "milliseconds_a_step": {name[:80]: round(50 * s, 4) for name, s in busy.items()},
        "traced": round(50 * seconds, 4),
    }


def parts(pair, flags):
    """The step's parts, each jitted alone."""
    seconds = time_in_turn(Ours(pair).parts(), flags.repeats)
    return {"milliseconds": {name: round(1e3 * float(np.median(s)), 2) for name, s in seconds.items()}}


def extras(pair, flags):
    """A larger set on the device, the method beside kd, five lambdas in one program: ratios of step times."""
    ours = Ours(pair)
    sides = {
        "five lambdas": ours.stepper(
            learn_by=[dataclasses.replace(ours.method, lam=lam) for lam in (0.1, 0.5, 1.0, 5.0, 10.0)]
        ),
        "10,000 images": ours.stepper(10_000),
        "50,000 images": ours.stepper(50_000),
        "kd": Ours(pair, method="kd").stepper(),
    }
    seconds = time_in_turn(sides, flags.repeats)
    ratios = {
        "50,000 images / 10,000": ratio(seconds, "50,000 images", "10,000 images"),
        "ranking_alignment / kd": ratio(seconds, "10,000 images", "kd"),
        "five runs / one program of five": round(5 * ratio(seconds, "10,000 images", "five lambdas"), 3),
    }
    return {"ratio": ratios, "seconds": rounded(seconds)}


def processes(pair, flags):
    """Start-up and memory of each side in a process of its own."""
    return {name: in_a_process(name, pair) for name in ("rkd_jax", "PyTorch")}


STAGES = {"stretch": stretch, "whole": whole, "parts": parts, "extras": extras, "processes": processes}
SHOWN = (
    "images_per_second", "ratio", "gflops", "notes", "milliseconds", "rkd_jax", "PyTorch", "milliseconds_a_step",
    "hours_of_300_epochs", "peak_mb", "part_of_matrix_rate", "relative", "kernels",
)  # fmt: skip


def rounded(seconds):
    """For the JSON."""
    return {name: [round(value, 5) for value in s] for name, s in seconds.items()}


def time_in_turn(sides, repeats):
    """Seconds of a step of every side, [repeats] each; a side runs steps(n) and waits for the device."""
    count = 20 if on_gpu() else 1
    for run in 2 * list(sides.values()):  # compiles; then each has its memory beside the others'
        run(count)
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run(count)
            seconds[name].append((time.perf_counter() - start) / count)
            if name == "PyTorch as used":
                time.sleep(0.5)  # its workers fetch ahead
    return seconds


def ratio(seconds, theirs, ours):
    """The median over the repetitions of their time / ours."""
    return round(float(np.median(np.divide(seconds[theirs], seconds[ours]))), 3)


# Our side.


class Ours:
    """A pair in rkd_jax, made as rkd_jax.experiment makes it, on random images."""

    def __init__(self, pair, dtype=jnp.float32, method="ranking_alignment"):
        teacher, student, self.side, self.classes = PAIRS[pair]
        self.teacher, self.student = (models.create(name, self.classes, dtype) for name in (teacher, student))
        self.method = methods.resolve(method, {}, "cifar100" if self.side == 32 else "tiny_imagenet", teacher, student)
        schedule = optim.create_schedule("step", 0.025, num_steps=10_000, steps_per_epoch=100, decay_epochs=(150,))
        self.tx = optim.create_optimizer("sgd", schedule, momentum=0.9, weight_decay=5e-4)
        self.mesh, self.rng, shape = steps.data_mesh(BATCH), jax.random.key(0), (self.side, self.side, 3)
        self.variables = experiment.untrained(self.teacher, shape)
        if on_gpu():
            self.variables = models.fold(self.teacher, self.variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        made_of = self.student, self.teacher, self.variables, self.method, self.tx, shape, BATCH
        state = steps.run_once(lambda rng: steps.create_state(rng, *made_of), self.rng)
        self.state = steps.replicate(state, self.mesh)

    def stepper(self, num_images=10_000, views=("weak", "strong"), learn_by=(), a_call=None):
        """A run of steps, of a student for each method given that keeps no state."""
        images, labels = random_images(num_images, self.side, self.classes)
        recipe = steps.Recipe(views, {"padding": 4}, BATCH, num_images // BATCH, 10_000, NORMALIZATION, NORMALIZATION)
        inputs = steps.replicate(steps.Inputs(self.rng, (self.rng,), images, labels, self.variables), self.mesh)
        order = steps.replicate(steps.epoch_order(self.rng, 0, num_images), self.mesh)
        learners = [experiment.create_learner(self.student, method, self.tx) for method in learn_by or [self.method]]
        inputs = inputs._replace(rngs=(self.rng,) * len(learners))
        train_step = steps.make_train_step(learners, self.teacher, recipe, self.mesh)
        held = [tuple(jax.tree.map(jnp.copy, self.state) for _ in learners)]  # they are donated
        a_call = a_call or (10 if on_gpu() else 1)

        def run(count):
            for done in range(0, count, a_call):
                held[0], _ = train_step(held[0], inputs, order, min(a_call, count - done))
            jax.block_until_ready(held[0])

        return run

    def parts(self):
        """The step's parts, each jitted alone, of both views."""
        state, images = self.state, jnp.asarray(random_images(BATCH, self.side, self.classes)[0])
        labels = jnp.asarray(random_images(BATCH, self.side, self.classes)[1])
        x = augment.normalize(images, *NORMALIZATION)
        logits = jax.random.normal(self.rng, (BATCH, self.classes)), jax.random.normal(self.rng, (BATCH, self.classes))

        def views(rng, images):
            return [augment.view(name, rng, images) for name in ("weak", "strong")]

        def student(params, views):
            variables = {"params": params, "batch_stats": state.batch_stats}
            return sum(
                losses.cross_entropy(
                    self.student.apply(variables, view, train=True, mutable=["batch_stats"])[0].logits, labels
                ).mean()
                for view in views
            )

        def loss(student, teacher):
            distances = losses.ranking_alignment(student, teacher) + losses.cross_entropy(student, labels)
            return 2 * distances.mean()

        def optimizer(params, opt_state):
            return self.tx.update(params, opt_state, params)

        return {
            "augment": repeated(views, self.rng, images),
            "teacher": repeated(
                lambda v, x: self.teacher.apply(v, x, train=False).logits,
                jax.device_put(self.variables),
                jnp.concatenate([x, x]),
            ),
            "student forward+backward": repeated(jax.grad(student), state.params["student"], [x, x]),
            "loss": repeated(jax.grad(loss), *logits),
            "optimizer": repeated(optimizer, state.params, state.opt_state),
        }


def repeated(function, *arguments):
    """A run of a function, jitted alone."""
    function = jax.jit(function)

    def run(count):
        for _ in range(count):
            result = function(*arguments)
        jax.block_until_ready(result)

    return run


def random_images(count, side, classes):
    """uint8 images and int32 labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, rng.integers(0, classes, count).astype(np.int32)


# PyTorch's side.


class Logits(torch.nn.Module):
    """A network without its features, which a compiled one would write, though nobody reads them."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """Images to logits."""
        return self.network(x)[0]


def torch_pair(pair, memory_format):
    """Teacher, student and optimizer on the device."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if on_gpu() else "cpu"
    teacher, student = (Logits(torch_networks.create(name, PAIRS[pair][3])).to(device) for name in PAIRS[pair][:2])
    teacher, student = teacher.eval().to(memory_format=memory_format), student.train().to(memory_format=memory_format)
    return teacher, student, torch.optim.SGD(student.parameters(), 0.025, 0.9, weight_decay=5e-4), device


def torch_update(teacher, student, optimizer, views, labels, autocast=False):
    """One step on two views; mdistiller too applies both networks once a view."""
    optimizer.zero_grad()
    total = 0
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for view in views:
            with torch.no_grad():
                t = teacher(view)
            s = student(view).float()
            t = t.float()
            distance = (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)).square().mean()
            total = total + torch.nn.functional.cross_entropy(s, labels) + 5 * distance
    total.backward()
    optimizer.step()


def wait():
    """For the GPU, where there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def torch_step(pair, mode=None, graph=False):
    """Channels-last steps on a batch that lies on the device.

    Compiled, where a mode of torch.compile is given; with `graph`, replayed as one CUDA graph, the optimizer's work
    too. In bfloat16 on a GPU, with either.
    """
    teacher, student, optimizer, device = torch_pair(pair, torch.channels_last)
    if mode:
        teacher, student = torch.compile(teacher, mode=mode), torch.compile(student, mode=mode)
    images, labels = random_images(BATCH, PAIRS[pair][2], PAIRS[pair][3])
    view = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    view, labels = view.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long().to(device)

    def step():
        if mode and not graph:
            torch.compiler.cudagraph_mark_step_begin()
        torch_update(teacher, student, optimizer, (view, view), labels, autocast=bool(mode or graph) and on_gpu())

    step = recorded(step) if graph else step

    def run(count):
        for _ in range(count):
            step()
        wait()

    return run


def recorded(step):
    """A function that replays all of a step's kernels as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and chooses the convolutions' algorithms, which a recording cannot
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def replay(step=step):  # whose networks the graph reads and writes
        graph.replay()

    return replay


def torch_as_used(pair):
    """Eager NCHW steps on what a DataLoader's workers make in PIL."""
    teacher, student, optimizer, device = torch_pair(pair, torch.contiguous_format)
    dataset = pil_views.TwoViews(*random_images(10_000, PAIRS[pair][2], PAIRS[pair][3]))
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=min(8, len(os.sched_getaffinity(0))),
        persistent_workers=True, pin_memory=on_gpu(), multiprocessing_context="forkserver",
    )  # fmt: skip

    def forever():
        while True:
            yield from loader

    batches = forever()

    def run(count):
        for _ in range(count):
            *views, labels = (value.to(device, non_blocking=True) for value in next(batches))
            torch_update(teacher, student, optimizer, views, labels)
        wait()

    return run


# Rates, memory, start-up.


def rates(pair, seconds):
    """Billions of floating-point operations a second: of each side's step, and of a large matrix product."""
    found = {name: round(operations(pair) / np.median(s) / 1e9, 1) for name, s in seconds.items()}
    size = product_size()
    dtypes = {"float32": (jnp.float32, torch.float32)}
    if on_gpu():
        dtypes["bfloat16"] = jnp.bfloat16, torch.bfloat16
    for name, (ours, theirs) in dtypes.items():
        b = torch.randn((size, size), device="cuda" if on_gpu() else "cpu").to(theirs)

        def torch_product(count, b=b):
            for _ in range(count):
                b @ b
            wait()

        products = time_in_turn({"jax": product_step(ours), "torch": torch_product}, 5)
        for side_name, s in products.items():
            found[f"matrix product, {side_name} {name}"] = round(2 * size**3 / np.median(s) / 1e9, 1)
    return found


def operations(pair):
    """Floating-point operations of a step, of two views: a backward pass is two of forward."""
    teacher, student, side, classes = PAIRS[pair]
    return 2 * 2 * BATCH * (sum_macs(teacher, classes, side) + 3 * sum_macs(student, classes, side))


def product_size():
    """The side of the square matrices whose product tells what the device can do."""
    return 8192 if on_gpu() else 2048


def product_step(dtype):
    """A run of products of normal numbers: a GPU multiplies ones faster than it does a network's values."""
    a = jax.random.normal(jax.random.key(0), (product_size(),) * 2, dtype)
    return repeated(jnp.matmul, a, a)


def sum_macs(name, classes, side):
    """Multiply-adds of a network on one image."""
    return 1e6 * networks.describe(name, classes, side).mmacs


def in_a_process(name, pair):
    """Start-up and memory of a side in a process of its own; wall seconds from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.train_step", "--alone", name, "--pairs", pair]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1]) | {"process_seconds": round(time.perf_counter() - start, 1)}


def alone(name, pair):
    """One side's first step and five more; prints JSON."""
    start = time.perf_counter()
    run = Ours(pair).stepper() if name == "rkd_jax" else torch_step(pair)
    run(1)
    first = time.perf_counter() - start
    for _ in range(5):
        run(1)  # not run(5), which may be another program
    found = {
        "until_first_step_seconds": round(first, 1),
        "peak_resident_mb": peak_resident() >> 10,
    }
    if on_gpu():
        found["peak_device_mb"] = (peak_device() if name == "rkd_jax" else torch.cuda.max_memory_allocated()) >> 20
    print(json.dumps(found))


def peak_device():
    """Bytes of the GPU's memory that jax's arrays and programs took at most."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def peak_resident():
    """KiB; getrusage would count the parent's too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def table(found):
    """The pairs' whole steps as a Markdown table."""
    rows = {pair: row["whole"] for pair, row in found.items() if "whole" in row}
    columns = [
        (kind, name)
        for kind in ("images_per_second", "ratio")
        for name in dict.fromkeys(name for row in rows.values() for name in row[kind])
    ]
    heads = [name if kind == "ratio" else f"{name}, images/s" for kind, name in columns]
    lines = ["| pair | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    lines += [
        f"| {pair} | " + " | ".join(str(row[kind].get(name, "")) for kind, name in columns) + " |"
        for pair, row in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
