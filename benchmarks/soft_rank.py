"""Speed of the soft-ranking operator beside its peers, all in one run.

    python -m benchmarks.soft_rank --output results/soft_rank_cpu.json

Peers: torchsort (on the device of JAX; one thread on a CPU), softjax (its fast_soft_sort with L2 regularisation), and a
plain vmapped while loop (below). A peer that is not installed is skipped, by name. All of them compute the same ranks,
which is checked, of normal logits of standard deviation 3 and the gradient of the mean squared rank. Every repetition
times each contender once, in turn, so that a busy machine slows all of them; a time is the median, and a ratio the
median over the repetitions of peer / ours. Everything runs on one CPU thread: pin the process to one core.
torchsort builds for a CPU where nvcc is not on the PATH: pip install --no-build-isolation torchsort.
"""

import argparse
import importlib.util
import os
import sys
import time
from importlib import metadata
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import _files, _flags, provenance, ranking

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((64, 100), (128, 200), (1024, 100), (256, 1000))
STRENGTHS = (1.0, 0.1, 0.01)
TOLERANCE = 1e-5  # of n: how far a peer's float32 ranks may be from ours for it to count as the same operator


def main():
    """Time every contender at every shape and strength; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=_flags.positive, default=60, help="repetitions of everything fast")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="limit for one shape and strength; 3 repetitions at least"
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="the first shape alone, three repetitions")
    flags = parser.parse_args()
    if flags.quick:
        flags.repeats = 3
    peers = [name for name in flags.peers if available(name)]
    rows = []
    for shape in SHAPES[: 1 if flags.quick else None]:
        for eps in STRENGTHS:
            for backward in (False, True):
                row = compare(peers, shape, eps, backward, flags)
                rows.append(row)
                print(describe(row), flush=True)
                if flags.output:
                    flags.output.parent.mkdir(parents=True, exist_ok=True)
                    _files.write_json(flags.output, {**conditions(flags, peers), "rows": rows})


def compare(peers, shape, eps, backward, flags):
    """Median microseconds of each contender, and peer / ours."""
    values = 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    contenders = {"rkd_jax": on_jax(ranking.soft_rank, values, eps, backward)}
    expected = contenders["rkd_jax"]()
    for name in peers:
        call = PEERS[name](values, eps, backward)
        try:
            found = call()
        except Exception as error:  # torchsort built without nvcc on a GPU, say
            print(f"note: {name} fails at {shape}, eps={eps}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        contenders[name] = call
        for ours, theirs in zip(expected, found, strict=True):
            theirs = theirs.cpu() if hasattr(theirs, "cpu") else theirs
            error = np.max(np.abs(np.asarray(theirs) - np.asarray(ours)))
            scale = shape[1] if ours is expected[0] else np.max(np.abs(np.asarray(ours))) * 100
            if not error <= TOLERANCE * scale:
                print(f"note: {name} differs by {error:.2g} at {shape}, eps={eps}", file=sys.stderr)
    seconds = {name: [] for name in contenders}
    start = time.perf_counter()
    for repeat in range(flags.repeats):
        if repeat >= 3 and time.perf_counter() - start > flags.seconds:
            break
        for name, call in contenders.items():
            before = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - before)
    others = [name for name in contenders if name != "rkd_jax"]
    return {
        "batch": shape[0],
        "classes": shape[1],
        "eps": eps,
        "pass": "forward+backward" if backward else "forward",
        "repeats": len(seconds["rkd_jax"]),
        "microseconds": {name: round(float(np.median(s)) * 1e6, 1) for name, s in seconds.items()},
        "ratio": {name: round(float(np.median(np.divide(seconds[name], seconds["rkd_jax"]))), 2) for name in others},
    }


def on_jax(operator, values, eps, backward):
    """A call that returns (ranks,) or (ranks, gradient), compiled and waited for."""

    def loss(x):
        rank = operator(x, regularization_strength=eps)
        return jnp.mean(rank**2), rank

    def both(x):
        (_, rank), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return rank, gradient

    function = jax.jit(both if backward else lambda x: (operator(x, regularization_strength=eps),))
    values = jax.device_put(values)
    return lambda: jax.block_until_ready(function(values))


def torchsort_peer(values, eps, backward):
    """torchsort's CPU form on one thread, or its CUDA form where JAX runs on a GPU."""
    import torch
    import torchsort

    torch.set_num_threads(1)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    x = torch.tensor(values, device=device, requires_grad=backward)

    def call():
        rank = torchsort.soft_rank(x, regularization_strength=eps)
        results = (rank,)
        if backward:
            results += torch.autograd.grad(rank.square().mean(), x)
        if device == "cuda":
            torch.cuda.synchronize()
        return [result.detach() for result in results]

    return call


def softjax_peer(values, eps, backward):
    """softjax ranks (1, ..., n) / (n - 1), hence the scale of its softness."""
    import softjax

    def operator(x, regularization_strength):
        softness = regularization_strength * (x.shape[-1] - 1)
        settings = {"mode": "c0", "method": "fast_soft_sort", "standardize": False, "descending": False}
        return softjax.rank(x, axis=-1, softness=softness, **settings)

    return on_jax(operator, values, eps, backward)


def while_loop_peer(values, eps, backward):
    """What one writes first: argsort, a while loop of pool adjacent violators, vmap."""

    @jax.custom_vjp
    def rank(x):
        return forward(x)[0]

    def forward(x):
        n = x.shape[0]
        order = jnp.argsort(-x)
        t = x[order] / eps
        mean, count, blocks = pool(t + jnp.arange(1, n + 1, dtype=x.dtype))
        ends = jnp.cumsum(jnp.where(jnp.arange(n) < blocks, count, 0))
        block = jnp.searchsorted(ends, jnp.arange(n, dtype=x.dtype), side="right")
        ranks = jnp.zeros_like(x).at[order].set(mean[block] - t)
        return n + 1 - ranks, (order, block)

    def backward_rule(saved, g):
        order, block = saved
        sorted_g = g[order]
        total, size = (jax.ops.segment_sum(v, block, g.shape[0]) for v in (sorted_g, jnp.ones_like(g)))
        centred = sorted_g - total[block] / size[block]
        return (jnp.zeros_like(g).at[order].set(centred) / eps,)

    def pool(y):
        def body(state):
            next_one, top, mean, count = state
            left = jnp.maximum(top - 1, 0)
            merge = (top > 0) & (mean[left] <= mean[top])
            total = count[left] + count[top]
            merged = (mean[left] * count[left] + mean[top] * count[top]) / total
            arriving = y[jnp.minimum(next_one, y.shape[0] - 1)]
            at = jnp.where(merge, left, top + 1)
            mean = mean.at[at].set(jnp.where(merge, merged, arriving), mode="drop")
            count = count.at[at].set(jnp.where(merge, total, 1.0), mode="drop")
            return next_one + ~merge, at, mean, count

        def unfinished(state):
            return state[0] <= y.shape[0]

        first = (jnp.int32(1), jnp.int32(0), jnp.zeros_like(y).at[0].set(y[0]), jnp.zeros_like(y).at[0].set(1.0))
        _, top, mean, count = jax.lax.while_loop(unfinished, body, first)
        return mean, count, top

    rank.defvjp(forward, backward_rule)
    return on_jax(lambda x, regularization_strength: jax.vmap(rank)(x), values, eps, backward)


PEERS = {"torchsort": torchsort_peer, "softjax": softjax_peer, "while_loop": while_loop_peer}


def available(name):
    """Whether a peer can run; says so where it cannot."""
    if name == "while_loop" or importlib.util.find_spec(name):
        return True
    print(f"{name} is not installed: skipped", file=sys.stderr)
    return False


def conditions(flags, peers):
    """What a reader needs to repeat the run."""
    record, packages = provenance.record(), {"torchsort": ("torch", "torchsort"), "softjax": ("softjax",)}
    record["versions"] |= {name: metadata.version(name) for peer in peers for name in packages.get(peer, ())}
    return record | {
        "config": {"repeats": flags.repeats, "seconds": flags.seconds, "threads": 1},
        "seed": 0,
        "units": "microseconds: median of the repetitions; ratio: median of peer / rkd_jax",
    }


def describe(row):
    """One line of the table."""
    head = f"({row['batch']}, {row['classes']}) eps {row['eps']:<5} {row['pass']:<17}"
    ratios = "  ".join(f"{name} x{ratio}" for name, ratio in row["ratio"].items())
    return f"{head} {row['microseconds']['rkd_jax']:>9} us   {ratios}"


if __name__ == "__main__":
    main()
