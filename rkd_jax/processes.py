"""Several processes, one a host: who decides, and how the others hear of it.

Every process runs the same program on its share of each batch. What only one may do, or what could come out differently
in each (the files, the clock, a signal), process 0 does, and tells the others.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

WAIT = 300.0  # seconds for the other processes to come
LOST = re.compile("gloo|nccl|connection|heartbeat|coordination", re.IGNORECASE)  # in what JAX says of one that is gone


def initialize(where: str) -> None:
    """Joins the other processes; before anything else of JAX. Where they do not come within WAIT, the process ends.

    `where` is "auto", where the cluster says all there is to know (TPU pods, SLURM, Open MPI, Kubernetes), or
    "HOST:PORT,INDEX,COUNT": the address of process 0, this process's number, and how many there are.
    """
    if where == "auto":
        try:
            with _waiting("--distributed=auto: this process"):
                jax.distributed.initialize(initialization_timeout=2 * int(WAIT))
        except ValueError as error:
            raise ValueError(
                f"--distributed=auto: no cluster was found ({error}); give --distributed=HOST:PORT,INDEX,COUNT"
            ) from error
        return
    address, *numbers = where.split(",")
    port = address.rpartition(":")[2]
    if ":" not in address or len(numbers) != 2 or not all(number.strip().isdecimal() for number in (port, *numbers)):
        raise ValueError(f"--distributed={where!r} is neither 'auto' nor HOST:PORT,INDEX,COUNT")
    index, count = map(int, numbers)
    if index >= count:
        raise ValueError(f"--distributed={where!r}: INDEX counts from 0 and is below COUNT")
    if index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise OSError(
                f"--distributed={where}: nothing can listen at PORT {port} ({error}); take a free one"
            ) from error
    with _waiting(f"--distributed={where}: process {index} of {count} (from 0) at {address}"):
        jax.distributed.initialize(address, num_processes=count, process_id=index, initialization_timeout=2 * int(WAIT))


@contextlib.contextmanager
def _waiting(who: str) -> Iterator[None]:
    """Says that it waits, and ends the process in one sentence after WAIT; JAX would abort it with a C++ trace."""

    def give_up() -> None:
        print(
            f"Error: {who} did not find all the others within {WAIT:.0f} s; start every process, each with an INDEX "
            "of its own, the same COUNT, and a HOST:PORT that all of them reach",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    print(f"{who} waits for the others", file=sys.stderr, flush=True)
    timer = threading.Timer(WAIT, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_if_lost(error: Exception) -> None:
    """Ends this process in one sentence where an error says that another is gone; JAX would wait for it, and abort."""
    told = isinstance(error, ValueError | jax.errors.JaxRuntimeError) and LOST.search(str(error))
    if told and jax.process_count() > 1:
        what = str(error).partition(": [")[0]
        print(
            f"Error: another process of this run is gone ({what}); start all of them again, and it goes on from its "
            "last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(1)


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
    """Process 0's tree of arrays, of the same types and shapes in every process, to the bit."""
    if jax.process_count() == 1:
        return tree
    leaves, form = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # As bytes: the others' zeros are added, which would take the sign of a zero, and numbers too small for the adder.
    sent = multihost_utils.broadcast_one_to_all([np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves])
    found = (np.asarray(each, np.uint8).tobytes() for each in sent)
    return form.unflatten(
        [np.frombuffer(each, leaf.dtype).reshape(leaf.shape) for each, leaf in zip(found, leaves, strict=True)]
    )


def meet() -> None:
    """Waits until all processes are here; the first time, no longer than half a minute: so meet before long work."""
    agree(None)


def in_lead(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0, and returns its result, plain JSON, in all; what it raises, all raise."""
    if jax.process_count() == 1:
        return function()
    outcome, error = {}, None
    if leads():
        try:
            outcome = {"value": function()}
        except Exception as raised:
            outcome, error = {"error": _said(raised)}, raised
    outcome = agree(outcome)
    if error is not None:
        raise error
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def everywhere(function: Callable[[], Any]) -> Any:
    """Calls `function` in every process, and returns its result; what one of them raises, all raise."""
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    said = _gather("" if error is None else _said(error))
    if error is not None:
        raise error
    if failed := [f"process {index} (from 0): {text}" for index, text in enumerate(said) if text]:
        raise ValueError(failed[0])
    return result


def _said(error: Exception) -> str:
    """An error in words, for those in whom it was not raised."""
    foreseen = isinstance(error, ValueError | OSError) and str(error)
    return foreseen or f"{type(error).__name__}: {error}"


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    rows = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) + 1 - len(mine))))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_alike(facts: Mapping[str, Any]) -> None:
    """ValueError, in every process, where the facts of one (JSON values by name) differ from those of process 0."""

    def check() -> None:
        for name, there in theirs.items():
            if (here := mine.get(name)) != there:
                raise ValueError(f"{name} is {here!r} here and {there!r} in process 0; give all processes the same")

    mine = json.loads(json.dumps(facts))
    theirs = agree(mine)
    everywhere(check)


def anywhere(claim: bool) -> bool:
    """Whether the claim holds in any process; all have to ask."""
    return claim if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(claim)).any())
