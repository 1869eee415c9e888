"""What JAX's devices can fail at, as an error of one sentence: to be there, and to have memory enough."""

import contextlib
import os
from collections.abc import Iterator

import jax


def start(platform: str | None = None) -> jax.Device:
    """Starts JAX's devices, and returns the first; OSError where it cannot, so that nothing else is blamed for it."""
    try:
        device = jax.local_devices(backend=platform)[0]
        jax.block_until_ready(jax.device_put(0.0, device) + 1)  # a GPU's libraries start with the first program
        return device
    except (RuntimeError, AssertionError) as error:  # the second where a named platform's package is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        said = _first_line(error).partition(" (set JAX_PLATFORMS=")[0] or f"it has none of JAX_PLATFORMS={platforms}"
        mend = "unset JAX_PLATFORMS to take what is there, or " if platforms else ""
        raise OSError(
            f"JAX can start no device: {said.rstrip('.')}; {mend}see that "
            "jax is installed for it, its driver works, and no other process holds its memory"
        ) from error


@contextlib.contextmanager
def memory(mend: str) -> Iterator[None]:
    """MemoryError that ends with `mend` where a device's memory does not suffice for what is done inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")):
            raise
        said = _first_line(error).partition(": ")[2]
        raise MemoryError(f"the device's memory does not suffice ({said.rstrip('.')}); {mend}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()
