"""Where a result comes from: command, commit, versions, device, date."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from rkd_jax.models import _conv


def device_name() -> str:
    """The devices of all processes, in words: "2 x NVIDIA H100"."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return kind if count == 1 else f"{count} x {kind}"


def processor() -> str:
    """The processor, as Linux names it, the widest vectors that it has, and how many cores this process may use."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    name = found[1] if found else platform.processor() or platform.machine()
    vectors = [kind for kind in ("avx512f", "avx2") if re.search(rf"\b{kind}\b", text)][:1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([name, *vectors, f"{cores} core" + "s" * (cores != 1)])


def record() -> dict[str, Any]:
    """What a result must name: command, commit, versions, device, whose convolutions, XLA's flags if any, date."""
    module = sys.modules["__main__"].__spec__  # None for a script
    script = ["-m", module.name] if module else [os.path.relpath(path) for path in sys.argv[:1] if path]  # "": a prompt
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
        "device": device_name() + (f" ({processor()})" if jax.default_backend() == "cpu" else ""),
        "convolutions": "rkd_jax" if _conv.available() else "XLA",
        **({"XLA_FLAGS": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of this source tree; where git has none, or has it changed since, $RKD_JAX_COMMIT, or "+" after it.

    A tree that was copied over another's history is not what git there takes it for.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    named = os.environ.get("RKD_JAX_COMMIT")
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails where git does not track this file
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return (named or f"{head}+") if changed else head
    except (OSError, subprocess.CalledProcessError):
        return named
