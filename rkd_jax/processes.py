"""Several processes, one a host: who decides, and how the others hear of it.

Every process runs the same program on its share of each batch. What only one may do, or what could come out differently
in each (the files, the clock, a signal), process 0 does, and tells the others.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(where: str) -> None:
    """Joins the other processes; before anything else of JAX.

    `where` is "auto", where the cluster says all there is to know (TPU pods, SLURM, Open MPI, Kubernetes), or
    "HOST:PORT,INDEX,COUNT": the address of process 0, this process's number, and how many there are.
    """
    if where == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--distributed=auto: no cluster was found ({error}); give --distributed=HOST:PORT,INDEX,COUNT"
            ) from error
        return
    address, *numbers = where.split(",")
    if ":" not in address or len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"--distributed={where!r} is neither 'auto' nor HOST:PORT,INDEX,COUNT")
    index, count = map(int, numbers)
    if index >= count:
        raise ValueError(f"--distributed={where!r}: INDEX counts from 0 and is below COUNT")
    jax.distributed.initialize(address, num_processes=count, process_id=index)


def leads() -> bool:
    """Whether this process is the one that writes and decides."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """Process 0's value, plain JSON, in every process."""
    if jax.process_count() == 1:
        return value
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    buffer = np.resize(mine, size) if leads() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8).tobytes())


def agree_arrays(tree: Any) -> Any:
    """Process 0's tree of arrays, of the same shapes in every process."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def in_lead(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0, and returns its result (plain JSON), or raises its error, in every process."""
    outcome: dict[str, Any] = {}
    if leads():
        try:
            outcome = {"value": function()}
        except (ValueError, OSError) as error:
            if jax.process_count() == 1:
                raise
            outcome = {"error": str(error)}
    outcome = agree(outcome)
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def anywhere(claim: bool) -> bool:
    """Whether the claim holds in any process; all have to ask."""
    return claim if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(claim)).any())
