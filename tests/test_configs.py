"""Every config builds its networks and method, and trains and evaluates, at smoke size."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, SLOW

from configs import default
from rkd_jax import experiment, methods, steps, train

# The steps of the others are traced with -m slow.
TRACED = ("default", "digits", "cifar100_res32x4_res8x4", "cifar100_resnet20")
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trace_step(run, rng, state):
    """Traces one whole step, forward and backward, at smoke size, without compiling it; returns its metrics' shapes."""
    mesh = steps.data_mesh(run.recipe.batch_size)
    step = steps.make_train_step([run.learner], run.teacher, run.recipe, mesh)
    inputs = steps.Inputs(rng, (rng,), *run.splits.train, run.teacher_variables)
    order = np.zeros(len(run.splits.train.labels), np.int32)
    (after,), (metrics,) = jax.eval_shape(step, (state,), inputs, order)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    return metrics


def names(paths):
    return [str(path.relative_to(ROOT / "configs")) for path in paths]


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_config_builds(path):
    module = load(path)
    config = module.get_config()
    config.smoke = True
    run = experiment.build(config)
    assert run.recipe.num_steps == experiment.SMOKE["num_steps"]
    assert run.method == methods.resolve(config.method, {}, config.dataset, config.teacher, config.student)
    if path.stem != "default":
        text = module.__doc__
        assert "python main.py" in text
        if path.stem != "digits":
            assert f"--config configs/{path.relative_to(ROOT / 'configs')}" in text


def test_pairs_take_the_teacher_that_the_repository_has():
    for path in (ROOT / "configs").glob("cifar100_*.py"):
        config = load(path).get_config()
        folder = ROOT / "teachers" / config.teacher
        assert Path(config.teacher_checkpoint).resolve() == folder if folder.exists() else not config.teacher_checkpoint
    assert (ROOT / "teachers" / "resnet32x4").is_dir()


@pytest.mark.parametrize("path", [path if path.stem in TRACED else SLOW(path) for path in CONFIGS], ids=names(CONFIGS))
def test_config_has_a_step(path):
    config = load(path).get_config()
    config.smoke = True
    run, rng = experiment.build(config), jax.random.key(0)
    state = jax.eval_shape(lambda: run.create_state(rng))
    assert trace_step(run, rng, state)["loss"].shape == ()


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    ("devices", "given", "batch_size", "num_train"), [(1, 64, 8, 32), (1, 4, 4, 32), (6, 64, 12, 32), (48, 96, 48, 48)]
)
def test_smokes_batch_divides_among_the_devices(devices, given, batch_size, num_train, monkeypatch):
    config = default.get_config()
    config.update(smoke=True, batch_size=given)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    values = experiment.shrink(config)
    assert (values["batch_size"], values["num_train"]) == (batch_size, num_train)


def test_smoke_hides_no_wrong_value():
    for name in ("batch_size", "num_train", "num_test", "num_steps", "log_every", "eval_batch_size"):
        config = default.get_config()
        config.update({"smoke": True, "student": "resnet8", "teacher": "resnet8", "dataset": "digits", name: 0})
        with pytest.raises(ValueError, match=f"config.{name}=0 is "):
            experiment.build(config)


def test_smoke_run_trains_and_evaluates(tmp_path):
    config = load(ROOT / "configs" / "cifar100_res56_res20.py").get_config()
    config.update(dict.fromkeys(("student", "teacher"), "small_network:create"), smoke=True)
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["last"]["step"] == 4
    config.update(num_steps=2, batch_size=4)  # smaller than smoke's own
    recipe = experiment.build(config).recipe
    assert (recipe.num_steps, recipe.batch_size) == (2, 4)


def test_default_has_every_field_of_every_method_unset():
    config = default.get_config()
    for name in methods.fields():
        assert config[name] is None
