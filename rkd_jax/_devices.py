"""What JAX's devices can fail at, as an error of one sentence: to be there, and to have memory enough."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

NO_MEMORY = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")  # in XLA's errors


def cache_programs(folder: Path) -> None:
    """Keeps compiled programs in `folder`, by host name, for programs for one CPU may not run on another.

    Where $JAX_COMPILATION_CACHE_DIR is set, there; empty, nowhere.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((folder / platform.node()).absolute()))


def start(kind: str | None = None) -> jax.Device:
    """Starts JAX's devices, and returns the first of that platform, or any; OSError where it cannot.

    Called first, so that a lack of devices is not reported as something else. The default one has to compute, too.
    """
    try:
        device = jax.local_devices(backend=kind)[0]
        # A GPU's libraries start with the first program.
        jax.block_until_ready(jax.device_put(0.0, kind and device) + 1)
        return device
    except (RuntimeError, AssertionError) as error:  # the second where a named platform's package is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        said = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS=")[0]
        said = said or f"it has none of JAX_PLATFORMS={platforms}"
        mend = "unset JAX_PLATFORMS to take what is there, or " if platforms else ""
        mend += "see that jax is installed for it, its driver works, and no other process holds its memory"
        if "gloo" in said:  # by which the CPUs of several processes add up
            mend = f"see that this machine's name, {platform.node()!r}, has an address, in /etc/hosts, say"
        raise OSError(f"JAX can start no device: {said.rstrip('.')}; {mend}") from error


@contextlib.contextmanager
def memory(mend: str) -> Iterator[None]:
    """MemoryError that ends with `mend` where a device's memory does not suffice for what is done inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in NO_MEMORY):
            raise
        said = str(error).partition("\n")[0].partition(": ")[2]
        raise MemoryError(f"the device's memory does not suffice ({said.rstrip('.')}); {mend}") from error
