"""Schedules and optimizers against PyTorch's, and what of them the user chooses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rkd_jax import experiment, optim, runs

STEPS = {"num_steps": 3000, "steps_per_epoch": 10}


def rates(name, steps, learning_rate=0.025, **options):
    schedule = optim.create_schedule(name, learning_rate, **STEPS | options)
    return [float(schedule(step)) for step in steps]


def test_schedule_is_the_papers():
    found = rates("step", (0, 1499, 1500, 1799, 1800, 2099, 2100, 2999), decay_epochs=(150, 180, 210))
    np.testing.assert_allclose(found, [0.025, 0.025, 2.5e-3, 2.5e-3, 2.5e-4, 2.5e-4, 2.5e-5, 2.5e-5], rtol=1e-6)


def test_epochs_that_fall_into_one_step_both_count():
    np.testing.assert_allclose(rates("step", (9, 10, 11), decay_epochs=(1.0, 1.02, 1.1)), [0.025, 2.5e-4, 2.5e-5])
    assert 4.35 * 100 < 435  # as floats are: rounded, not cut off
    np.testing.assert_allclose(rates("step", (434, 435), decay_epochs=(4.35,), steps_per_epoch=100), [0.025, 2.5e-3])


def test_cosine_is_pytorchs():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    theirs = []
    for _ in range(40):
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates("cosine", range(40), 0.3, num_steps=40), theirs, rtol=1e-5, atol=1e-7)


def test_rate_that_falls_behind_what_can_be_counted_does_not_fall():
    assert rates("step", (2998, 2999), decay_epochs=(300, 10**12)) == [np.float32(0.025)] * 2
    jax.jit(optim.create_schedule("step", 0.1, decay_epochs=(10**9,), **STEPS))(jnp.int32(0))  # nor overflows


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_warm_up_rises_to_the_schedule(name):
    plain = np.array(rates(name, range(30), decay_epochs=(1,)))
    share = np.minimum(np.arange(1, 31) / 15, 1)
    np.testing.assert_allclose(rates(name, range(30), decay_epochs=(1,), warmup_epochs=1.5), plain * share, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("sgd", "SGD", {"momentum": 0.9, "nesterov": False}),
        ("sgd", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("sgd", "SGD", {"momentum": 0.0, "nesterov": False}),
        ("optax:adamw", "AdamW", {}),
    ],
)
def test_optimizer_equals_torchs(name, theirs, options):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, targets = rng.normal(size=5), rng.normal(size=(6, 5))
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = getattr(torch.optim, theirs)([parameter], lr=0.1, weight_decay=0.05, **options)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], 0.1)
    schedule = optim.create_schedule("step", 0.1, num_steps=6, steps_per_epoch=1, decay_epochs=(3,), decay_factor=0.1)
    tx = optim.create_optimizer(name, schedule, weight_decay=0.05, **options)
    ours = jnp.asarray(start, "float32")
    state = tx.init(ours)
    for target in targets:
        optimizer.zero_grad()
        ((parameter - torch.tensor(target, dtype=torch.float32)) ** 4).sum().backward()
        optimizer.step()
        scheduler.step()
        grads = jax.grad(lambda p, t=target: ((p - t.astype("float32")) ** 4).sum())(ours)
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=2e-5)


def clipped(learning_rate, momentum):
    """An optimizer of one's own."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate, momentum))


def no_optimizer(learning_rate, weight_decay):
    return weight_decay


def with_decay_alone(weight_decay):
    return optax.add_decayed_weights(weight_decay)


def by_groups(learning_rate):
    """Other rates for other layers, by the names in their paths."""

    def label(path, _):
        return "head" if "linear" in [key.key for key in path] else "rest"

    groups = {"head": optax.sgd(learning_rate), "rest": optax.sgd(lambda step: learning_rate(step) / 10)}
    return optax.multi_transform(groups, lambda params: jax.tree_util.tree_map_with_path(label, params))


def noisy(learning_rate):
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(learning_rate))


def two_traces(learning_rate, momentum):
    return optax.chain(optax.trace(momentum), optax.sgd(learning_rate, momentum))


def summed(learning_rate):
    """Its updates have no shape, and would be broadcast."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: -learning_rate(0) * x.sum(), updates))


def astray(learning_rate):
    """Asks the parameters for what they are not."""
    return optax.lookahead(optax.sgd(learning_rate), 5, 0.5)


def every_second(learning_rate):
    return optax.MultiSteps(optax.sgd(learning_rate), 2)


def test_another_schedule_is_named():
    mend = "write one of them, or my_module:factory"
    with pytest.raises(ValueError, match=rf"config\.schedule='steps' is none of 'step', 'cosine'; {mend}"):
        optim.create_schedule("steps", 0.1, num_steps=6, steps_per_epoch=1)


def triangle(learning_rate, num_steps, decay_factor):
    """A schedule of one's own: up to the middle, and down."""
    return lambda step: decay_factor * learning_rate * (1 - abs(2 * step / num_steps - 1))


def test_own_schedule_is_given_what_it_takes():
    found = rates("test_optim:triangle", (0, 750, 1500, 2250), 0.2, decay_factor=0.5, warmup_epochs=100)
    np.testing.assert_allclose(found, [0.0, 0.05 * 751 / 1000, 0.1, 0.05], rtol=1e-6)
    assert optim.schedule_takes("test_optim:triangle") == ("decay_factor",)
    assert optim.schedule_takes("step") == ("decay_epochs", "decay_factor")
    assert optim.schedule_takes("cosine") == ()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("optax:cosine_decay_schedule", r".*; it is called as factory\(learning_rate=..., num_steps=...\)"),
        ("test_optim:triangles", r"cannot be imported: module 'test_optim' has no attribute 'triangles'"),
        ("test_optim:no_schedule", "returned a float; return a function of the step"),
        ("test_optim:two_rates", r"returned a function whose value is ShapeDtypeStruct\(shape=\(2,\).* one float"),
        ("test_optim:no_rate", "returned a function whose value is None; it has to be one float, the rate"),
    ],
)
def test_schedule_that_cannot_be_used_is_named(name, complaint):
    with pytest.raises(ValueError, match=rf"^config\.schedule='{name}':? {complaint}"):
        optim.create_schedule(name, 0.1, **STEPS)


def no_schedule(learning_rate):
    return learning_rate


def two_rates(learning_rate):
    return lambda step: learning_rate * jnp.ones(2)


def no_rate(learning_rate):
    return lambda step: None


def test_own_optimizer_is_given_what_it_takes():
    with pytest.raises(TypeError, match="b1"):
        optim.create_optimizer("optax:adamw", lambda step: 0.5, b1=0.5)
    tx = optim.create_optimizer("test_optim:clipped", lambda step: 0.5, momentum=0.9)
    updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-6)
    assert optim.taken("test_optim:clipped") == ("momentum",)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("adamw", "is not one of this package, which has 'sgd'; write 'optax:adamw'"),
        ("AdamW", "is not one of this package, which has 'sgd'; write 'optax:adamw', or my_module:factory"),
        ("SGD", "is not one of this package, which has 'sgd'; write that, or my_module:factory"),
        ("optax:adamv", "cannot be imported: module 'optax' has no attribute 'adamv'; write it as my_module:factory"),
        ("optax:clip", r".*; it is called as factory\(learning_rate=schedule, ...\)"),
        ("optax:adam", "takes no weight_decay; set config.weight_decay=0, or take another"),
        ("optax.contrib:schedule_free_adamw", "is tested at averaged parameters, which this loop does not do"),
        ("optax:__version__", "is a str, which cannot be called"),
        (":adam", "is no name; write it as my_module:factory"),
        ("test_optim:with_decay_alone", r".*; it is called as factory\(learning_rate=schedule, ...\)"),
        ("optax:contrib.muon", r".*; write it as optax.contrib:muon"),
        ("test_optim:every_second", r"returned a MultiSteps; .*; its .gradient_transformation\(\) is one"),
        ("test_optim:no_optimizer", "returned a float; return an optax.GradientTransformation"),
    ],
)
def test_optimizer_that_cannot_be_used_is_named(name, complaint):
    with pytest.raises(ValueError, match=rf"^config\.optimizer='{name}':? {complaint}"):
        optim.create_optimizer(name, lambda step: 0.1, weight_decay=0.1)


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.slow
def test_run_by_another_optimizer_goes_on(tiny, tmp_path, stopped, capsys):
    config = tiny(optimizer="optax:adamw", schedule="cosine", lr_warmup_epochs=0.5, checkpoint_seconds=0.0)
    whole = runs.distil(config, tmp_path / "whole")
    said = "| optimizer optax:adamw (learning_rate=0.01, nesterov=False, weight_decay=0.0005) | schedule cosine\n"
    assert said in capsys.readouterr().out
    stopped(config, tmp_path / "run", 6)
    assert runs.distil(config, tmp_path / "run")["last"] == whole["last"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["learning_rate"] for line in lines if line["kind"] == "train"]  # of the steps before 3, 6, 9, 12
    turned = np.pi * np.array([2, 5, 8, 11]) / 12
    np.testing.assert_allclose(found, 0.01 * (1 + np.cos(turned)) / 2 * [0.75, 1, 1, 1], rtol=1e-5)
    used = json.loads((tmp_path / "run" / "config.json").read_text())
    names = ("optimizer", "weight_decay", "nesterov", "momentum", "decay_epochs", "decay_factor")
    assert [used[name] for name in names] == ["optax:adamw", 5e-4, False, None, None, None]
    assert experiment.build(ConfigDict(used)).config == used  # a run's own record is its config again


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schedule": "cosin"}, r"config\.schedule='cosin' is none of 'step', 'cosine'"),
        (
            {"optimizer": "test_optim:astray", "weight_decay": 0.0},
            r"config\.optimizer cannot be used here: AttributeError: 'dict' object has no attribute 'fast'\. It is",
        ),
        ({"lr_warmup_epochs": 301.0}, r"config\.lr_warmup_epochs=301.0 is too high; take 300 or less"),
        (
            {"optimizer": "optax:adamw", "method": "dot"},
            r"config\.method='dot' splits the momentum of SGD, and there is none; set config\.momentum=0\.9 and "
            r"config\.optimizer='sgd'",
        ),
        *(
            (
                {"optimizer": f"test_optim:{name}", "method": "dot", "weight_decay": 0.0},
                r"config\.method='dot' splits the momentum of plain SGD, .*; set config\.optimizer='sgd'",
            )
            for name in ("clipped", "two_traces")
        ),
        (
            {"optimizer": "optax:lbfgs", "weight_decay": 0.0},
            r"config\.optimizer cannot be used here: .*'value'.* It is given the gradients",
        ),
        (
            {"optimizer": "test_optim:summed", "weight_decay": 0.0},
            r"config\.optimizer cannot be used here: its update of \S+ has the shape \(\), where the parameter has \(",
        ),
        ({"optimizer": "test_optim:noisy", "weight_decay": 0.0}, r"config\.optimizer keeps a jax\.random\.key in its"),
    ],
)
def test_config_that_cannot_be(tiny, tmp_path, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        runs.distil(tiny(**fields), tmp_path)


@pytest.mark.parametrize(
    ("fields", "given", "named", "owner"),
    [
        ({"optimizer": "optax:adamw"}, ["momentum"], "momentum=0.9", "optimizer"),
        ({"schedule": "cosine"}, ["decay_epochs"], r"decay_epochs=\(.*\)", "schedule"),
        ({"schedule": "test_optim:triangle"}, ["decay_epochs"], r"decay_epochs=\(.*\)", "schedule"),
        ({"method": "cross_entropy"}, ["teacher_checkpoint"], "teacher_checkpoint='.*'", "method"),
        ({"method": "cross_entropy", "fold_teacher": True}, ["fold_teacher"], "fold_teacher=True", "method"),
        ({"views": "test_train:cropped"}, ["crop_padding"], "crop_padding=1", "views"),
        ({"view_reduction": "mean"}, ["view_reduction"], "view_reduction='mean'", "views"),
        ({"sweep": "schedule=cosine decay_factor=0.1,0.2"}, [], "decay_factor=0.1", "schedule"),
        ({"sweep": "schedule=cosine seed=0,1"}, ["decay_factor"], "decay_factor=0.1", "schedule"),
    ],
)
def test_field_that_does_nothing_is_an_error_where_it_was_set_by_hand(tiny, tmp_path, fields, given, named, owner):
    with pytest.raises(ValueError, match=rf"config\.{named} does nothing with config\.{owner}='.*'; leave it out"):
        runs.run(tiny(**fields), tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


def test_nesterov_without_momentum_does_nothing(tiny):
    message = r"config\.nesterov=True does nothing with config\.momentum=0\.0; leave it out"
    with pytest.raises(ValueError, match=message):
        experiment.check_used([tiny(nesterov=True, momentum=0.0)], ["nesterov"])
    with pytest.raises(ValueError, match=message):
        runs.expand(tiny(sweep="nesterov=True,False", momentum=0.0))
    experiment.check_used([tiny(nesterov=False, momentum=0.0)], ["nesterov"])
    experiment.check_used(
        [member for _, member in runs.expand(tiny(nesterov=True, sweep="momentum=0.0,0.9"))], ["nesterov"]
    )


def test_field_that_does_something_in_one_of_a_sweep_or_is_off_may_be_set(tiny):
    experiment.check_used([tiny(method="cross_entropy", fold_teacher=False)], ["fold_teacher"])
    experiment.check_used([tiny(schedule="cosine"), tiny()], ["decay_factor"])
    experiment.check_used([tiny(optimizer="optax:adamw", momentum=0.0)], ["momentum"])
    experiment.check_used([tiny(method="cross_entropy", teacher="")], ["teacher"])
    experiment.check_used([tiny(views="weak+test_train:cropped")], ["crop_padding"])
    experiment.check_used([tiny(view_reduction="mean"), tiny(view_reduction="mean", views="both")], ["view_reduction"])


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.slow
def test_optimizers_side_by_side(tiny, tmp_path):
    fields = {"sweep": "optimizer=sgd,test_optim:by_groups schedule=step,cosine", "weight_decay": 0.0, "num_steps": 3}
    rows = runs.sweep(tiny(**fields), tmp_path)
    assert len({row["last"]["loss"] for row in rows}) == 4
