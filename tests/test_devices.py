"""What the user reads where the device is not there, or too small."""

import os
import platform
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, SLOW

from rkd_jax import _devices, evaluate, steps, train
from rkd_jax.methods import cross_entropy
from rkd_jax.report import run

pytestmark = pytest.mark.usefixtures("fast_compile")

HUGE = 1 << 46  # bytes that no machine has
SAID = f"the device's memory does not suffice (Out of memory allocating {HUGE} bytes); "


def start(*command, **environment):
    """Runs a command of python's, with these variables too."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


class Greedy(cross_entropy.Method):
    """cross_entropy, and far more memory than there is."""

    def loss(self, params, state, student, teacher, batch, context):
        terms, state, metrics = super().loss(params, state, student, teacher, batch, context)
        waste = jnp.cumsum(jnp.full((HUGE // 4,), student.logits.mean()))[-1]
        return terms | {"waste": jax.lax.stop_gradient(waste)}, state, metrics


def test_too_large_for_the_device():
    with pytest.raises(MemoryError) as error, _devices.memory("buy more"):
        jnp.zeros(HUGE, jnp.uint8)
    assert str(error.value) == f"{SAID}buy more"


def test_table_runs_keep_compiled_programs_by_host(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept, before = [], jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(run, "execute", lambda *_: kept.append(jax.config.jax_compilation_cache_dir) or {})
    command = ["--table", "4", "--scale", "smoke", "--results", str(tmp_path), "--workdir", str(tmp_path / "runs")]
    try:
        run.main(command)
        jax.config.update("jax_compilation_cache_dir", None)
        run.main(command)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert kept == [before, str(tmp_path / "rkd_jax" / platform.node())]


MAIN = """
import runpy, sys
import jax
from rkd_jax import runs
runs.run = lambda *_: print(jax.config.jax_compilation_cache_dir)
sys.argv = ["main.py"]
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("told", [None, SLOW("elsewhere"), SLOW("")])
def test_main_keeps_compiled_programs_by_host(monkeypatch, tmp_path, told):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    environment = {} if told is None else {"JAX_COMPILATION_CACHE_DIR": told}
    ran = start("-c", MAIN, XDG_CACHE_HOME=str(tmp_path), **environment)
    assert ran.stdout == f"{tmp_path / 'rkd_jax' / platform.node() if told is None else told}\n", ran.stderr


def test_other_errors_of_the_device_pass():
    said = "INTERNAL: the device is on fire"
    with pytest.raises(jax.errors.JaxRuntimeError, match=said), _devices.memory("buy more"):
        raise jax.errors.JaxRuntimeError(said)


def test_step_too_large_for_the_device(tiny, tmp_path):
    config = tiny(method="test_devices:Greedy", data_seed=0)
    with pytest.raises(MemoryError) as error:
        train.train_together([(config, tmp_path / "a"), (config, tmp_path / "b")])
    assert "does not suffice" in str(error.value)
    assert str(error.value).endswith(
        "lower config.batch_size, or train fewer students together, or take config.dtype=bfloat16, or keep the "
        "training set off the device by config.stream=True"
    )
    # Nothing was saved, so that the folder takes a smaller run.
    config = tiny(num_steps=1, batch_size=4, dtype="bfloat16", stream=True)
    train.train_and_evaluate(config, tmp_path / "a")
    config.method = "test_devices:Greedy"
    with pytest.raises(MemoryError, match=r"\); lower config.batch_size$"):
        train.train_and_evaluate(config, tmp_path / "c")


def test_run_that_no_longer_fits_is_kept(tiny, tmp_path, monkeypatch):
    train.train_and_evaluate(tiny(num_steps=1), tmp_path)
    (tmp_path / "summary.json").unlink()  # as if it had been interrupted
    monkeypatch.setattr(steps, "make_train_step", lambda *args: jnp.zeros(HUGE, jnp.uint8))
    with pytest.raises(MemoryError, match=rf"; {tmp_path} holds the run so far, and another batch size or dtype needs"):
        train.train_and_evaluate(tiny(num_steps=1), tmp_path)
    assert (tmp_path / "checkpoints" / "1").is_dir()


@pytest.mark.slow
def test_command_says_what_is_too_large(tmp_path):
    fields = {"method": "test_devices:Greedy", "student": "small_network:create", "compare": False}
    ran = start("main.py", *(f"--config.{name}={value}" for name, value in fields.items()), f"--workdir={tmp_path}")
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: the device's memory does not suffice (Out of memory allocating")


def test_test_batch_too_large_for_the_device(tiny, small_teacher, monkeypatch):
    monkeypatch.setattr(steps, "make_eval_step", lambda *args: lambda *args: jnp.zeros(HUGE, jnp.uint8))
    with pytest.raises(MemoryError) as error:
        evaluate.evaluate(tiny(), small_teacher)
    assert str(error.value) == f"{SAID}lower config.eval_batch_size"


@pytest.mark.parametrize(
    "command",
    [
        ["main.py", "--config.compare=False", "--config.teacher_checkpoint=TEACHER", "--workdir=OUT"],
        SLOW(["main.py", "--mode=eval", "--workdir=TEACHER"]),
        SLOW(["-m", "rkd_jax.convert", "--checkpoint", "TEACHER", "--output", "OUT"]),
        SLOW(["-m", "rkd_jax.export", "TEACHER", "--output", "OUT"]),
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_no_device(command, teacher, tmp_path):
    words = [word.replace("TEACHER", str(teacher)).replace("OUT", str(tmp_path / "out")) for word in command]
    ran = start(*words, JAX_PLATFORMS="abacus")
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: JAX can start no device: Unable to initialize backend 'abacus'")
    assert "unset JAX_PLATFORMS" in line
    assert not (tmp_path / "out").exists()


def test_machine_whose_name_has_no_address(monkeypatch):
    """As in a container without an /etc/hosts of its own: --distributed on CPUs fails so."""

    def local_devices(backend):
        raise RuntimeError("Unable to initialize 'cpu': [enforce fail at gloo/transport/tcp/device.cc:99] rv == 0")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(OSError, match=rf"gloo/.* see that this machine's name, '{platform.node()}', has an address"):
        _devices.start()


@pytest.mark.parametrize(
    "command",
    [
        "rkd_jax.methods kd dkd",
        SLOW("rkd_jax.report.run --table 4 --dry_run"),
        "main --mode=eval --workdir TEACHER --config.num_test=8",
    ],
)
def test_reader_that_has_seen_enough_is_no_error(command, teacher):
    """As `| head` does: the pipe is closed before the command writes."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", *command.replace("TEACHER", str(teacher)).split()]
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
