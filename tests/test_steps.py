"""The training step and the evaluation step, apart from the loop."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SLOW
from flax import linen as nn
from jax import export

from rkd_jax import experiment, losses, steps
from rkd_jax.data import augment
from rkd_jax.methods import base, dot
from rkd_jax.models import _conv

RNG = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Probe(base.Distiller):
    """Says what a method is given."""

    def loss(self, params, state, student, teacher, batch, context):
        return (
            {"label": student.logits.mean() * 0 + 1.0, "rest": 2.0 * context.epoch},
            state,
            {"teacher": teacher.logits.mean(), "progress": context.progress, "index": batch["index"].sum()},
        )


@dataclasses.dataclass(frozen=True)
class Resumer(base.Distiller):
    """Learns from what the student makes of a map of ones alone."""

    resumes_teacher = True

    def loss(self, params, state, student, teacher, batch, context):
        again = context.resume_student(0, student.cuts.maps[0]).logits
        taught = context.resume_teacher(0, teacher.cuts.maps[0]).logits
        ones = context.resume_student(1, jnp.ones_like(student.cuts.maps[1]) * batch["label"][:, None, None, None])
        gaps = {"student_gap": again - student.logits, "teacher_gap": taught - teacher.logits}
        return {"label": ones.logits.var()}, state, {name: jnp.abs(gap).max() for name, gap in gaps.items()}


def prepare(config, method=None, **recipe):
    """A run of one student: (experiment, state, inputs, step)."""
    run = experiment.build(config)
    if method:
        run = run._replace(method=method, tx=method.wrap_optimizer(run.tx))
    run = run._replace(recipe=run.recipe._replace(**recipe))
    mesh = steps.data_mesh(run.recipe.batch_size)
    inputs = steps.Inputs(RNG, (RNG,), *run.splits.train, run.teacher_variables)
    together = steps.make_train_step([run.learner], run.teacher, run.recipe, mesh)

    def step(state, inputs, source, count=1):
        """The step of a program with one student."""
        (state,), (metrics,) = together((state,), inputs, source, count)
        return state, metrics

    step.compilations = together._cache_size
    return run, steps.replicate(steps.run_once(run.create_state, RNG), mesh), steps.replicate(inputs, mesh), step


def test_step_compiles_once_and_counts(tiny):
    run, state, inputs, step = prepare(tiny(batch_size=8))
    for i in range(10):  # over the end of an epoch
        order = steps.epoch_order(RNG, i // run.recipe.steps_per_epoch, 64)
        state, metrics = step(state, inputs, order)
        assert np.isfinite(metrics["loss"])
    assert int(state.step) == 10
    assert step.compilations() == 1


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.slow
@pytest.mark.parametrize("one_batch", [False, True])
def test_a_method_resumes_the_networks_of_this_step(two_stages, monkeypatch, one_batch):
    """From its own map the student makes the same logits, by the same batch statistics, which it leaves alone; the
    teacher's running averages are not those of the batch; a gradient reaches what lies behind the map."""
    create = experiment.create_learner
    monkeypatch.setattr(
        experiment, "create_learner", lambda *args: create(*args)._replace(views_in_one_batch=one_batch)
    )
    if one_batch:  # as on a GPU
        monkeypatch.setattr(_conv, "available", lambda: False)
    config = two_stages(views="both", weight_decay=0.0)
    states = {}
    for method in (Resumer(), experiment.methods.create("cross_entropy")):
        _, before, inputs, step = prepare(config, method)
        before = jax.device_get(before)
        states[type(method)], metrics = jax.device_get(step(before, inputs, steps.epoch_order(RNG, 0, 64)))
        if isinstance(method, Resumer):
            assert metrics["student_gap"] < 1e-4
            assert metrics["teacher_gap"] > 1e-2
            changed = jax.tree.map(lambda a, b: (a != b).any(), before.params, states[Resumer].params)["student"]
    assert {name for name, leaves in changed.items() if any(jax.tree.leaves(leaves))} == {"layer2_0", "fc"}
    resumed, plain = (state.batch_stats for state in states.values())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), resumed, plain)


def test_a_gpus_program_has_nothing_of_a_cpus(resnets, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_conv, "available", _conv.available.__wrapped__)  # asked anew
    run, state, inputs, step = prepare(resnets(method="ranking_alignment", log_every=50))
    assert run.loop.steps_per_call == 8  # an epoch
    assert run.learner.views_in_one_batch
    own = experiment.build(resnets(student="small_network:create"))
    assert not own.learner.views_in_one_batch  # it may not bear that
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        assert not run.learner.views_in_one_batch  # they would exchange activations
    assert not run.teacher_variables["batch_stats"]  # folded
    program = jax.jit(functools.partial(step, count=2))
    text = export.export(program, platforms=("cuda",))(state, inputs, steps.epoch_order(RNG, 0, 64)).mlir_module()
    assert "custom_call" not in text
    assert "f64" not in text
    scans = r"func.func private @chlo.scan.impl.*?\n  }"  # what newer jax gives XLA to fall back to for a cumsum
    assert re.sub(scans, "", text, flags=re.DOTALL).count("stablehlo.while") == 1  # over the steps alone


def test_epoch_visits_every_example_once(tiny):
    _, state, inputs, step = prepare(tiny(), Probe())
    order = steps.epoch_order(RNG, 0, 64)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != steps.epoch_order(RNG, 1, 64).tolist()
    seen = 0
    for _ in range(8):
        state, metrics = step(state, inputs, order)
        seen += int(metrics["index"])
    assert seen == sum(range(64))


def test_method_is_given_its_place_in_the_run(tiny):
    _, state, inputs, step = prepare(tiny(num_steps=16), Probe())
    order = steps.epoch_order(RNG, 0, 64)
    state, first = step(state, inputs, order)
    _, second = step(state, inputs, order)
    assert float(first["progress"]) == 0
    assert float(second["progress"]) == 1 / 16
    assert float(second["rest"]) == 2 * 1 / 8  # an epoch has 8 steps
    assert float(second["loss"]) == 1 + 2 / 8


def test_teacher_sees_the_same_view_with_its_own_normalisation(tiny):
    other = steps.Normalization((0.1,), (0.7,))
    run, state, inputs, step = prepare(tiny(crop_padding=0), Probe(), teacher_normalization=other)
    order = steps.epoch_order(RNG, 0, 64)
    _, metrics = step(state, inputs, order)
    images = augment.normalize(inputs.images[order[:8]], *other)
    expected = run.teacher.apply(run.teacher_variables, images, train=False).logits.mean()
    np.testing.assert_allclose(metrics["teacher"], expected, rtol=1e-5)


@pytest.mark.usefixtures("fast_compile", "mirrored")
def test_terms_are_summed_or_averaged_over_the_views(tiny):
    found = {}
    for reduction in ("sum", "mean"):
        _, state, inputs, step = prepare(tiny(views="both", view_reduction=reduction))
        _, metrics = step(state, inputs, steps.epoch_order(RNG, 0, 64))
        found[reduction] = jax.device_get(metrics)
    for name in ("loss", "label", "distill"):
        np.testing.assert_allclose(found["sum"][name], 2 * found["mean"][name], rtol=1e-5)
    np.testing.assert_allclose(found["sum"]["top1"], found["mean"]["top1"])


class Drawn(nn.Module):
    """A student whose logits, in training, are what it draws."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        key = self.make_rng("dropout") if train else jax.random.key(0)
        return bias + jax.random.normal(key, (len(images), self.num_classes))


@dataclasses.dataclass(frozen=True)
class Keys(base.Distiller):
    """Keeps, of the last two views, what tells the keys of the image, of the student and of the method."""

    def init(self, rng, student, teacher, num_examples):
        return {}, jnp.zeros((2, 3))

    def loss(self, params, state, student, teacher, batch, context):
        seen = jnp.stack([teacher.logits.mean(), student.logits.mean(), jax.random.uniform(context.rng)])
        return {"label": 0 * student.logits.sum()}, jnp.stack([state[1], seen]), {}


@pytest.mark.usefixtures("fast_compile")
def test_each_step_and_view_draws_anew_the_images_by_the_datas_key_and_the_rest_by_the_students(tiny, monkeypatch):
    def noise(name, rng, images, **options):
        return jax.random.bits(rng, images.shape, jnp.uint8)

    monkeypatch.setattr(steps.augment, "view", noise)
    _, state, inputs, step = prepare(tiny(views="both", student="test_steps:Drawn"), Keys())
    first, order, mesh = jax.device_get(state), steps.epoch_order(RNG, 0, 64), steps.data_mesh(8)

    def draw(state, **keys):
        state, _ = step(*steps.replicate((state, inputs._replace(**keys)), mesh), order)
        return state, np.array(state.method_state)  # [view, what]

    state, one = draw(first)
    _, two = draw(state)
    for values in np.concatenate([one, two]).T:
        assert len({*values}) == 4
    (_, other_data), (_, other_student) = draw(first, rng=jax.random.key(1)), draw(first, rngs=(jax.random.key(1),))
    assert (other_data == one).all(0).tolist() == [False, True, True]
    assert (other_student == one).all(0).tolist() == [True, False, False]


@dataclasses.dataclass(frozen=True)
class Counting(base.Distiller):
    """Trains a number, and counts the views."""

    def init(self, rng, student, teacher, num_examples):
        return {"w": jnp.float32(2)}, jnp.float32(0)

    def loss(self, params, state, student, teacher, batch, context):
        return {"label": 0 * student.logits.sum(), "rest": 3 * params["w"]}, state + 1, {"before": state}


@pytest.mark.usefixtures("fast_compile")
def test_method_is_trained_by_all_views_and_carries_its_state_from_one_to_the_next(tiny):
    config = tiny(views="both", learning_rate=0.1, weight_decay=0.01)
    _, state, inputs, step = prepare(config, Counting())
    state, metrics = step(state, inputs, steps.epoch_order(RNG, 0, 64))
    assert float(state.params["method"]["w"]) == pytest.approx(2 - 0.1 * (2 * 3 + 0.01 * 2))
    assert float(state.method_state) == 2
    assert float(metrics["before"]) == 0.5  # the mean of 0 and 1


def test_accuracy_in_training_is_of_the_student_and_in_percent(tiny):
    _, state, inputs, step = prepare(tiny(student="test_steps:Drawn", method="cross_entropy"))
    state = state._replace(params=state.params | {"student": {"bias": 100 * jax.nn.one_hot(3, 10)}})  # says 3 of all
    order = jnp.argsort(inputs.labels != 3)  # the threes first
    _, metrics = step(state, inputs, order)
    threes = float((inputs.labels[order[:8]] == 3).mean())
    assert 0 < threes < 1
    assert float(metrics["top1"]) == 100 * threes


@pytest.mark.parametrize("steps_per_epoch", [1, 41, 61, 97, 781, 80_000])
def test_an_epoch_begins_with_its_first_step(steps_per_epoch):
    epochs = np.arange(300)
    for part in {0, 1 % steps_per_epoch, steps_per_epoch - 1}:
        found = jax.jit(steps.epoch_of, static_argnums=1)(jnp.int32(epochs * steps_per_epoch + part), steps_per_epoch)
        np.testing.assert_array_equal(np.floor(found), epochs)
        np.testing.assert_allclose(found, epochs + part / steps_per_epoch, rtol=1e-6)


@pytest.mark.usefixtures("fast_compile", "mirrored")
def test_student_updates_its_batch_statistics_by_one_view_then_the_other(tiny):
    """And normalises both its own way, whatever its teacher's."""
    teachers = steps.Normalization((0.1,), (0.7,))
    run, state, inputs, step = prepare(tiny(views="both"), teacher_normalization=teachers)
    order = steps.epoch_order(RNG, 0, 64)
    images = augment.normalize(run.splits.train.images[order[:8]], *run.recipe.student_normalization)
    expected = {"params": state.params["student"], "batch_stats": state.batch_stats}
    for view in (images, images[:, :, ::-1]):
        expected |= run.student.apply(expected, view, train=True, mutable=["batch_stats"])[1]
    expected = jax.device_get(expected["batch_stats"])
    after, _ = step(state, inputs, order)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.batch_stats, expected)


@pytest.mark.usefixtures("fast_compile", "mirrored")
@pytest.mark.parametrize("method", ["ranking_alignment", SLOW("crld"), SLOW("crd")])  # crd has parameters and a state
def test_views_in_one_batch_are_views_in_turn(tiny, method):
    config = tiny(views="both", method=method)
    run, found = experiment.build(config), []
    mesh = steps.data_mesh(run.recipe.batch_size)
    inputs = steps.replicate(steps.Inputs(RNG, (RNG,), *run.splits.train, run.teacher_variables), mesh)
    assert not run.learner.views_in_one_batch  # on a CPU
    for one_batch in (False, True):
        learner = run.learner._replace(views_in_one_batch=one_batch)
        step = steps.make_train_step([learner], run.teacher, run.recipe, mesh)
        state = steps.replicate(steps.run_once(run.create_state, RNG), mesh)
        with _conv.xla_alone():  # as on a GPU
            (state,), (metrics,) = step((state,), inputs, steps.epoch_order(RNG, 0, 64))
        found.append(jax.device_get((metrics, state.params, state.batch_stats, state.method_state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *found)


@dataclasses.dataclass(frozen=True)
class PerTerm(Probe):
    """Leaves the student still, and hands the gradients per term to the optimizer, which keeps them."""

    per_term_gradients = True

    def loss(self, params, state, student, teacher, batch, context):
        return {"label": student.logits.sum(), "a": 3 * student.logits.sum(), "b": student.embedding.sum()}, state, {}

    def wrap_optimizer(self, tx):
        import optax

        def update(grads, state, params, *, term_grads):
            total = jax.tree.map(jnp.add, term_grads["label"], term_grads["distill"])
            return jax.tree.map(lambda g, t: jnp.abs(g - t).max() * jnp.ones_like(g), grads, total), term_grads

        return optax.GradientTransformationExtraArgs(lambda params: {"label": params, "distill": params}, update)


@pytest.mark.usefixtures("fast_compile")
def test_gradients_per_term(tiny):
    _, state, inputs, step = prepare(tiny(), PerTerm())
    before = jax.device_get(state.params)
    after, _ = step(state, inputs, steps.epoch_order(RNG, 0, 64))
    jax.tree.map(np.testing.assert_array_equal, before, after.params)  # label and distill sum to the whole
    label, distill = (after.opt_state[name]["student"] for name in ("label", "distill"))
    # The classifier's bias: sums of logits of 8 images, once in the label term, three times in the others.
    bias = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(label) if leaf.shape == (10,)]
    np.testing.assert_allclose(bias[0], np.full(10, 8.0), rtol=1e-6)
    bias = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(distill) if leaf.shape == (10,)]
    np.testing.assert_allclose(bias[0], np.full(10, 24.0), rtol=1e-6)


@pytest.mark.usefixtures("fast_compile")
def test_dot_knows_what_each_gradient_reaches(tiny):
    _, state, inputs, step = prepare(tiny(method="dot", inner="vid"))
    state, _ = step(state, inputs, steps.epoch_order(RNG, 0, 64))
    label, distill = state.opt_state.reached["label"], state.opt_state.reached["distill"]
    assert all(jax.tree.leaves(label["student"]))
    assert not any(jax.tree.leaves(label["method"]))
    assert all(jax.tree.leaves(distill["method"]))
    by_layer = {layer: {bool(x) for x in jax.tree.leaves(tree)} for layer, tree in distill["student"].items()}
    assert by_layer.pop("fc") == {False}
    assert set.union(*by_layer.values()) == {True}


@dataclasses.dataclass(frozen=True)
class Returns(base.Distiller):
    """Returns what it is told to make of the cross-entropy of each example."""

    make: Callable = None

    def loss(self, params, state, student, teacher, batch, context):
        return self.make(losses.cross_entropy(student.logits, batch["label"]))


@pytest.mark.usefixtures("mirrored")
@pytest.mark.parametrize("one_batch", [SLOW(False), True])
def test_what_a_loss_cannot_return_is_named(tiny, one_batch):
    run, state, inputs, _ = prepare(tiny(views="both"))
    order, mesh = steps.epoch_order(RNG, 0, 64), steps.data_mesh(8)

    def traced(make, inner=False):
        method = dot.Method(Returns(make=make)) if inner else Returns(make=make)
        learner = run.learner._replace(method=method, views_in_one_batch=one_batch)
        step = steps.make_train_step([learner], run.teacher, run.recipe, mesh)
        with _conv.xla_alone():  # as on a GPU
            return jax.eval_shape(step, (state,), inputs, order)[1][0]

    for make, complaint in (
        (lambda ce: ({"label": ce}, {}, {}), "the term 'label' of shape (8,); return a scalar, e.g. its .mean()"),
        (lambda ce: ({"label": ce.mean()}, {}, {"a": ce}), "the metric 'a' of shape (8,); return a scalar, e.g. its"),
        (lambda ce: ({"label": None}, {}, {}), "the term 'label' as a NoneType; return a scalar"),
        (lambda ce: (ce.mean(), {}, {}), "for its terms; return a dict of named scalars"),
        (lambda ce: ({"label": ce.mean()}, {}, None), "a NoneType for its metrics; return a dict of named scalars"),
        (
            lambda ce: ({"a": ce.mean(), "b": ce.mean()}, {}, {}),
            "no term 'label', but 'a', 'b'; name the",
        ),
        (lambda ce: ({}, {}, {}), "no term 'label', but none; name the cross-entropy"),
        (lambda ce: ({"label": ce.mean(), "loss": ce.mean()}, {}, {}), "the term 'loss', a name that the log has"),
        (lambda ce: ({"label": ce.mean(), "top1": ce.mean()}, {}, {}), "the term 'top1', a name that the log has"),
        (lambda ce: ({"label": ce.mean()}, {}, {"step": ce.mean()}), "the metric 'step', a name that the log has"),
        (lambda ce: ({"label": ce.mean()}, {}, {"label": 1.0}), "the metric 'label', a name that the log has"),
        (lambda ce: {"label": ce.mean()}, "a dict; return three: the terms, the next state, and the metrics, {} for"),
        (lambda ce: ({"label": ce.mean()}, {}), "2 values; return three: the terms, the next state, and the metrics"),
    ):
        with pytest.raises(ValueError, match=r"^test_steps:Returns\.loss returned .*" + re.escape(complaint)):
            traced(make)
    with pytest.raises(ValueError, match=r"^dot of test_steps:Returns\.loss returned the term 'label'"):
        traced(lambda ce: ({"label": ce}, {}, {}), inner=True)
    assert traced(lambda ce: [{"label": ce.mean(), "zero": 0.0}, {}, {"one": 1}])["one"].shape == ()
    with pytest.raises(ValueError, match=r"^test_steps:Returns\.loss returned the state with n as float32\[8\]"):
        traced(lambda ce: ({"label": ce.mean()}, {"n": ce}, {}))


@dataclasses.dataclass(frozen=True)
class Own(Probe):
    """Trains and deploys what it is told to."""

    initial: Any = ({}, {})
    deployed: Callable = lambda variables: variables

    def init(self, *_):
        return self.initial

    def deploy(self, network, images, variables, params, state):
        return self.deployed(variables)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"initial": {"w": 1.0}}, "init returned a dict; return two: what it trains, and the state that"),
        ({"initial": ({}, {}, {})}, "init returned 3 values; return two"),
        ({"initial": ({"w": np.arange(3)}, {})}, r"init returned the parameter w of dtype int\d+, which cannot"),
        (
            {"deployed": lambda v: v["params"]},
            r"deploy returned .* with batch_stats.* as nothing in place of float32",
        ),
        ({"deployed": lambda v: None}, "deploy returned .* as nothing in place of"),
        (
            {"deployed": lambda v: v | {"more": np.float32(1)}},
            r"deploy returned .* with more as float32\[\] in place",
        ),
    ],
)
def test_what_init_and_deploy_cannot_return_is_named(tiny, fields, complaint):
    with pytest.raises(ValueError, match=rf"^test_steps:Own\.{complaint}"):
        prepare(tiny(), Own(**fields))


def test_a_method_that_resumes_the_teacher_says_so(two_stages):
    @dataclasses.dataclass(frozen=True)
    class Silent(Resumer):
        resumes_teacher: ClassVar[bool] = False

    run, state, inputs, _ = prepare(two_stages(), Resumer())
    learner = run.learner._replace(method=Silent())
    step = steps.make_train_step([learner], run.teacher, run.recipe, steps.data_mesh(8))
    with pytest.raises(ValueError, match=r"Silent\.loss resumes the teacher, .*; set resumes_teacher = True"):
        jax.eval_shape(step, (state,), inputs, steps.epoch_order(RNG, 0, 64))


def test_first_bad_step_is_kept(tiny):
    @dataclasses.dataclass(frozen=True)
    class Bad(base.Distiller):
        def loss(self, params, state, student, teacher, batch, context):
            return {"label": jnp.where(context.step >= 2, jnp.nan, 1.0) + 0 * student.logits.sum()}, state, {}

    _, state, inputs, step = prepare(tiny(), Bad())
    order = steps.epoch_order(RNG, 0, 64)
    for _ in range(5):
        state, _ = step(state, inputs, order)
    assert int(state.bad_step) == 2


@pytest.mark.parametrize("method", ["crd", "mlkd", "norm", *map(SLOW, ("fcfd", "fitnets", "ickd", "reviewkd"))])
def test_state_stays_float32_where_jax_has_float64_on(resnets, method):
    run = experiment.build(resnets(method=method, views="both"))
    with jax.enable_x64(True):
        state = jax.eval_shape(run.create_state, jax.random.key(0))
        step = steps.make_train_step([run.learner], run.teacher, run.recipe, steps.data_mesh(8))
        inputs = steps.Inputs(RNG, (RNG,), *run.splits.train, run.teacher_variables)
        order = steps.epoch_order(RNG, 0, 64)
        ((after,), _) = jax.eval_shape(lambda state: step(state, inputs, order, 1), (state,))
    for tree in (state, after):
        assert {x.dtype for x in jax.tree.leaves(tree)} <= {np.dtype(kind) for kind in ("float32", "int32", "bool")}


@pytest.mark.parametrize("batch_size", [7, 40, 1000])
def test_evaluation_equals_numpy(tiny, batch_size):
    run = experiment.build(tiny(num_test=90))
    variables = run.teacher_variables
    normalization = run.recipe.student_normalization
    eval_step = steps.make_eval_step(run.teacher, normalization, steps.local_mesh())
    result = steps.evaluate(eval_step, variables, *run.splits.test, batch_size)
    sums = steps.total(eval_step, variables, *run.splits.test, batch_size)
    images = augment.normalize(jnp.asarray(run.splits.test.images), *normalization)
    logits = np.asarray(run.teacher.apply(variables, images, train=False).logits, np.float64)
    labels = run.splits.test.labels
    order = np.argsort(-logits, axis=1)
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).mean())
    assert [*sums["count_of_class"]] == [(labels == i).sum() for i in range(10)]
    assert [*sums["top1_of_class"]] == [((order[:, 0] == i) & (labels == i)).sum() for i in range(10)]
    assert result["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).mean())
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert result["loss"] == pytest.approx(-log_p[np.arange(90), labels].mean(), rel=1e-5)
