"""Every config builds its networks and method, and trains and evaluates, at smoke size."""

import importlib.util

import pytest
from conftest import ROOT

from configs import default
from rkd_jax import experiment, methods, train

CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_builds(path):
    module = load(path)
    config = module.get_config()
    config.smoke = True
    run = experiment.build(config)
    assert run.loop.num_steps == experiment.SMOKE["num_steps"]
    assert run.method == methods.resolve(config.method, {}, config.dataset, config.teacher, config.student)
    if path.stem not in ("default", "cross_entropy"):
        text = module.__doc__
        assert "python main.py" in text
        if path.stem != "digits":
            assert f"--config configs/{path.relative_to(ROOT / 'configs')}" in text


def test_smoke_run_trains_and_evaluates(tmp_path):
    config = load(ROOT / "configs" / "cifar100_res56_res20.py").get_config()
    config.update(student="resnet8", teacher="resnet8", smoke=True)  # small, for the compiler's sake
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["last"]["step"] == 4


def test_default_has_every_field_of_every_method_unset():
    config = default.get_config()
    for name in methods.fields():
        assert config[name] is None
