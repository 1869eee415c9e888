"""What each call of the training step reads, whether the set lies on the device or with the host."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rkd_jax import steps
from rkd_jax.data import Split


class Call(NamedTuple):
    """One call of the training step."""

    step: int  # of its first step
    count: int  # of its steps
    source: jax.Array | steps.Batches | None = None  # what `steps.make_train_step`'s step reads


def calls(start: int, num_steps: int, steps_per_epoch: int, steps_per_call: int, *every: int) -> Iterator[Call]:
    """The calls from step `start` to the end: none crosses the end of an epoch, or a multiple of one of `every`.

    Each does `steps_per_call` steps where so many are left until then, and otherwise one: two programs to compile. What
    follows a step depends on that step alone, so that a run that goes on makes the calls that it would have made.
    """
    while start < num_steps:
        stop = min([num_steps, *((start // each + 1) * each for each in (steps_per_epoch, *every))])
        count = steps_per_call if stop - start >= steps_per_call else 1
        yield Call(start, count)
        start += count


def streams(wanted: bool | None, split: Split) -> bool:
    """Whether batches come from the host: as wanted, or (None) where the set would fill half of a device's memory."""
    if wanted is not None:
        return wanted
    memory = jax.local_devices()[0].memory_stats() or {}
    return split.images.nbytes > memory.get("bytes_limit", np.inf) / 2


def resident(plan: Iterable[Call], rng: jax.Array, steps_per_epoch: int, split: Split, mesh: Mesh) -> Iterator[Call]:
    """The calls with the order of their epoch, for a set that lies on the device."""
    epoch, order = None, None
    for call in plan:
        if epoch != call.step // steps_per_epoch:
            epoch = call.step // steps_per_epoch
            order = steps.replicate(steps.epoch_order(rng, epoch, len(split.labels)), mesh)
        yield call._replace(source=order)


def streamed(
    plan: Iterable[Call], rng: jax.Array, steps_per_epoch: int, split: Split, mesh: Mesh, batch_size: int
) -> Iterator[Call]:
    """The calls with their batches, the same images in the same order, two read ahead of need by a thread of their own.

    Each process reads the rows that its devices take.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))

    @functools.lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.asarray(steps.epoch_order(rng, epoch, len(split.labels)))

    def read(call: Call) -> Call:
        first = call.step % steps_per_epoch * batch_size
        chosen = order(call.step // steps_per_epoch)[first : first + call.count * batch_size]
        index = chosen.reshape(call.count, batch_size)

        def put(form: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
            shape = index.shape + form.shape[1:]
            return jax.make_array_from_callback(shape, sharding, lambda where: np.asarray(rows(index[where[:2]])))

        images = put(split.images, lambda index: split.images[index])
        labels = put(split.labels, lambda index: split.labels[index])
        return call._replace(source=steps.Batches(images, labels, put(split.labels, lambda index: index)))

    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        try:
            for call in plan:
                pending.append(pool.submit(read, call))
                if len(pending) > 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()
