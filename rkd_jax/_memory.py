"""Memory of a CPU process: kept rather than given back to the system and asked for again in every step.

XLA:CPU takes a step's temporary memory, hundreds of megabytes, from malloc and frees it at the step's end. glibc then
returns it to the system, and the next step pays for every page anew: a third of a small network's step on two cores.
What is kept must not be many steps' memory, so that a step is not begun before the one before it has ended; on a CPU
nothing is lost by that. Beside an accelerator malloc stays as it is: no step's memory comes from it, and the many
threads that compile would wait for each other at the one arena.
"""

import ctypes
import importlib.util
import sys

import jax

PLUGINS = ("jax_plugins", "libtpu")  # packages that bring jax to GPUs and TPUs
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of glibc's mallopt


def keep() -> None:
    """Makes malloc keep what is freed, where it is glibc's; call it before jax starts its threads."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    if jax.config.jax_platforms != "cpu" and any(map(importlib.util.find_spec, PLUGINS)):
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)
