"""What every test shares: where real data may lie, a compilation cache, and a run small enough for a test."""

import functools
import gc
import importlib.metadata
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

# Before jax is imported: the tests, their workers and child processes compile the same small programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"rkd_jax_tests_{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where each operation arose: an eighth of the time
# XLA compiles in half the time and runs slower. XLA_FLAGS="" in the environment: its default, as users have it.
# From JAX 0.11 on, there are fusion emitters alone, and no flag for them. Tests run on every core: a program that is
# split, to be compiled on several, takes a tenth longer.
EMITTERS = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11)
FAST_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + (
    EMITTERS * " --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("XLA_FLAGS", FAST_FLAGS)
os.environ["PYTHONPATH"] = os.pathsep.join(  # child processes find tests/small_network.py too
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)

import jax
import jax.numpy as jnp
import pytest

from configs import default
from rkd_jax import checkpoint, data, models, steps, train

ROOT = Path(__file__).resolve().parents[1]


# Of jax.jit, for programs that run once or twice. With the first, what two programs both compute has the same bits in
# both; with the second, it has where they are one program.
SAME_BITS, FAST_COMPILE = (
    {"xla_backend_optimization_level": 0} | ({"xla_cpu_use_fusion_emitters": used} if EMITTERS else {})
    for used in (True, False)
)
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # of a test that other cases run too: `pytest -m slow`
REAL = ROOT.parent / "shared" / "data"  # real data, where this machine has it


def pytest_collection_finish():
    """Python looks for garbage less often: tracing makes many objects and no garbage, and took a quarter longer."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


@pytest.fixture
def offline(monkeypatch):
    """No download succeeds, on whatever machine."""

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.fixture(scope="session")
def real():
    """The folder of real data; skips where there is none."""
    if not REAL.is_dir():
        pytest.skip(f"no real data at {REAL}")
    return REAL


def untrained(name, path):
    """Makes the folder of an untrained network for the digits."""
    splits = data.load("digits")
    network = models.create(name, 10)
    variables = jax.jit(network.init, compiler_options=FAST_COMPILE)(jax.random.key(7), jnp.zeros((1, 8, 8, 1)))
    checkpoint.save_network(
        path, variables, {"network": name, "num_classes": 10, "mean": splits.mean, "std": splits.std}
    )
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of an untrained resnet8 for the digits."""
    return untrained("resnet8", tmp_path_factory.mktemp("teacher") / "resnet8")


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    """The folder of an untrained network of one block for the digits."""
    return untrained("small_network:create", tmp_path_factory.mktemp("teacher") / "small")


@pytest.fixture
def fast_compile(monkeypatch):
    """What jax.jit is given from here on, in child processes too, compiles in half the time and runs slower."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    jax.devices()  # XLA reads its flags once: this process has its own
    monkeypatch.setenv("XLA_FLAGS", FAST_FLAGS)


@pytest.fixture
def mirrored(monkeypatch):
    """Views that compile at once: the images as they are for "weak", and mirrored for "strong"."""
    views = {"weak": lambda x: x, "strong": lambda x: x[:, :, ::-1]}
    monkeypatch.setattr(steps.augment, "view", lambda name, rng, images, **options: views[name](images))


@pytest.fixture
def same_bits(fast_compile, monkeypatch):
    """In place of fast_compile, a little slower: for runs by different programs that have to agree to the bit."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=SAME_BITS))


@pytest.fixture
def stopped(monkeypatch):
    """Runs a config in a folder until it has logged a step, and stops it there, as Ctrl-C would."""

    def run(config, workdir, step):
        log = train.Student.log

        def stop(self, done, totals, speed):
            log(self, done, totals, speed)
            if done == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train.Student, "log", stop)
            with pytest.raises(KeyboardInterrupt):
                train.train_and_evaluate(config, workdir)

    return run


@pytest.fixture
def tiny(small_teacher):
    """Makes configs of a run of seconds: one block > one block on 64 digits, 12 steps of 8 (8 steps an epoch).

    By kd, whose step compiles in half the time of ranking_alignment's.
    """

    def make(**fields):
        config = default.get_config()
        config.update(
            dataset="digits", method="kd", student="small_network:create", teacher="small_network:create",
            teacher_checkpoint=str(small_teacher), views="weak", crop_padding=1, flip=False, num_train=64, num_test=40,
            batch_size=8, num_steps=12, log_every=3, eval_batch_size=32, learning_rate=0.01,
        )  # fmt: skip
        config.update(fields)
        return config

    return make


@pytest.fixture
def resnets(tiny, teacher):
    """Makes the configs of `tiny` for resnet8 > resnet8."""
    pair = {"student": "resnet8", "teacher": "resnet8", "teacher_checkpoint": str(teacher)}
    return lambda **fields: tiny(**pair | fields)


@pytest.fixture(scope="session")
def two_stages_teacher(tmp_path_factory):
    """The folder of an untrained network of two stages for the digits."""
    return untrained("small_network:two_stages", tmp_path_factory.mktemp("teacher") / "two_stages")


@pytest.fixture
def two_stages(tiny, two_stages_teacher):
    """Makes the configs of `tiny` for networks of two stages."""
    pair = dict.fromkeys(("student", "teacher"), "small_network:two_stages")
    return lambda **fields: tiny(**pair | {"teacher_checkpoint": str(two_stages_teacher)} | fields)
