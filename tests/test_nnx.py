"""Networks of the user's own in Flax NNX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rkd_jax import _own, convert, experiment, models, runs, train
from rkd_jax.models import __main__ as table

pytestmark = pytest.mark.usefixtures("fast_compile")
CHANNELS = 4


class Net(nnx.Module):
    """In NNX's way: train() and eval() set the mode."""

    def __init__(self, num_classes, *, rngs, channels_in=1, dropout=0.0):
        self.stem = nnx.Conv(channels_in, CHANNELS, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(CHANNELS, num_classes, rngs=rngs)

    def __call__(self, images):
        features = jax.nn.relu(self.norm(self.stem(images)))
        embedding = features.mean((1, 2))
        return models.Outputs(self.head(self.drop(embedding)), (features,), embedding)


class Explicit(Net):
    """With the mode as an argument, and logits alone."""

    def __call__(self, images, train):
        assert self.drop.deterministic is not train
        return super().__call__(images).logits


class Listed(Net):
    """With layers in a list, whose names in paths are numbers."""

    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(CHANNELS, CHANNELS, rngs=rngs) for _ in range(2)])

    def __call__(self, images):
        x = super().__call__(images).embedding
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


class Linen(nn.Module):
    """The same network in Linen."""

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.Conv(CHANNELS, (3, 3), name="stem")(images)
        features = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(features))
        return nn.Dense(10, name="head")(features.mean((1, 2)))


class Noisy(Net):
    """Draws of another stream than "dropout", and of none by name."""

    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.constant = np.ones(10, np.float32)
        self.rngs = rngs

    def __call__(self, images):
        logits = super().__call__(images).logits
        self.seen = nnx.Intermediate((logits,))
        return logits + self.constant * (jax.random.normal(self.rngs.noise()) + jax.random.normal(self.rngs()))


class Passing(Net):
    """What it is made with goes on to the class above."""

    def __init__(self, num_classes, **rest):
        super().__init__(num_classes, **rest)


class Constant(Net):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.scales = jax.random.normal(rngs.params(), (3,))


class Constants(Net):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.more = nnx.Dict(scales=nnx.data(jax.random.normal(rngs.params(), (3,))))


class Params(Net):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.params = nnx.Param(jnp.ones(3))


class Late(Net):
    """Statistics that are not there from the start."""

    def __call__(self, images):
        self.late = nnx.BatchStat(images.mean())
        return super().__call__(images)


dropping_by_half = functools.partial(Net, dropout=0.5)


class Counts(nnx.Variable):
    """A variable of a kind of its own."""


class Counting(Net):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.calls = Counts(jnp.zeros(()))


def dropping(num_classes, rngs):
    return Net(num_classes, rngs=rngs, dropout=0.5)


def of_colour(num_classes, rngs, dtype):
    net = Net(num_classes, rngs=rngs, channels_in=3)
    net.head.dtype = dtype
    return net


def without_rngs(num_classes):
    return Net(num_classes, rngs=nnx.Rngs(0))


def without_classes(rngs):
    return Net(10, rngs=rngs)


def no_module(num_classes, rngs):
    return rngs


@pytest.fixture
def digits():
    return jax.random.normal(jax.random.key(1), (6, 8, 8, 1))


@pytest.mark.parametrize("name", ["Net", "Explicit"])
def test_it_is_the_same_network_in_linen(digits, name):
    model = models.create(f"test_nnx:{name}", 10)
    variables = jax.jit(model.init)(jax.random.key(0), digits)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, Linen().init(jax.random.key(0), digits))

    def loss(params, model):
        outputs, updated = model.apply(variables | {"params": params}, digits, train=True, mutable=["batch_stats"])
        logits = outputs.logits if isinstance(outputs, models.Outputs) else outputs
        return jnp.square(logits - jnp.arange(10)).mean(), (logits, updated)

    ours, linens = (
        jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(variables["params"], m) for m in (model, Linen())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, linens)
    assert np.abs(ours[1][1]["batch_stats"]["norm"]["mean"]).max() > 1e-3  # updated
    trained = variables | ours[1][1]
    np.testing.assert_allclose(
        model.apply(trained, digits).logits, Linen().apply(trained, digits), rtol=1e-5, atol=1e-6
    )


def test_its_outputs_are_all_there(digits):
    model = models.create("test_nnx:Net", 10)
    outputs = model.apply(experiment.untrained(model, digits.shape[1:]), digits)
    assert (outputs.features[0].shape, outputs.embedding.shape) == ((6, 8, 8, CHANNELS), (6, CHANNELS))


def test_layers_of_a_list_have_the_names_that_they_have_on_disk(digits):
    variables = jax.eval_shape(models.create("test_nnx:Listed", 10).init, jax.random.key(0), digits)
    assert variables["params"]["layers"].keys() == {"0", "1"}


def test_initialisations_differ_by_their_key(digits):
    model = models.create("test_nnx:dropping", 10)
    kernels = [model.init(jax.random.key(i), digits)["params"]["stem"]["kernel"] for i in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0.1


@pytest.mark.parametrize("name", ["dropping", "dropping_by_half", "Noisy"])
def test_what_is_drawn_is_of_the_steps_key(digits, name):
    model = models.create(f"test_nnx:{name}", 10)
    variables = experiment.untrained(model, digits.shape[1:])

    def logits(key):
        return model.apply(variables, digits, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0].logits

    one, again, other = (logits(jax.random.key(i)) for i in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(*(model.apply(variables, digits).logits for _ in range(2)))


def test_class_that_passes_its_rngs_on(digits):
    model = models.create("test_nnx:Passing", 10)
    assert model.apply(experiment.untrained(model, digits.shape[1:]), digits).logits.shape == (6, 10)
    assert "dropout" in _own.parameters(Passing)
    assert _own.parameters(Listed) == {"self", "num_classes", "rngs"}  # which passes nothing on


@pytest.mark.slow
def test_teacher_and_student_train_and_go_on(tiny, tmp_path, stopped):
    alone = {"method": "cross_entropy", "teacher": "", "teacher_checkpoint": ""}
    runs.distil(tiny(student="test_nnx:Listed", num_steps=2, **alone), tmp_path / "teacher")
    pair = {"teacher": "test_nnx:Listed", "teacher_checkpoint": str(tmp_path / "teacher" / "best")}
    config = tiny(student="test_nnx:dropping", num_steps=6, checkpoint_seconds=0.0, fold_teacher=True, **pair)
    whole = runs.distil(config, tmp_path / "whole")
    assert whole["parameters"] == 9 * CHANNELS + 3 * CHANNELS + 10 * CHANNELS + 10
    stopped(config, tmp_path / "run", 3)
    assert runs.distil(config, tmp_path / "run")["last"] == whole["last"]


def test_it_is_given_the_dtype(digits):
    images = jnp.repeat(digits, 3, axis=-1)
    full, half = (models.create("test_nnx:of_colour", 10, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = full.init(jax.random.key(0), images)
    full, half = (model.apply(variables, images).logits for model in (full, half))
    assert half.dtype == jnp.float32  # as all outputs
    assert 0 < np.abs(full - half).max() < 0.1


def test_it_is_listed_without_the_count_of_linens_layers():
    row = table.describe("test_nnx:of_colour", num_classes=10, image_size=8)
    assert (row.mmacs, row.parameters) == (None, 27 * CHANNELS + 3 * CHANNELS + 10 * CHANNELS + 10)
    assert row.xla > 0
    assert str(row).split()[1:3] == [str(row.parameters), "-"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("without_rngs", "returned a Net; return a flax.linen.Module, or a flax.nnx.Module made with `rngs`"),
        ("without_classes", r"it is called as factory\(num_classes=10, rngs=rngs\)"),
        ("no_module", "returned a Rngs; return a flax.linen.Module"),
        ("Constant", r"its array scales is no nnx\.Variable, .*; make it an nnx\.Param, an nnx\.BatchStat"),
        ("Constants", r"its array more\.scales is no nnx\.Variable"),
        ("Params", "its attribute 'params' has the name of a collection of Linen's; rename it"),
        ("CHANNELS", "is a int, which cannot be called; write it as my_module:factory"),
    ],
)
def test_what_cannot_be_used_is_named(name, complaint):
    with pytest.raises(ValueError, match=f"^config.student='test_nnx:{name}'.*{complaint}"):
        models.create(f"test_nnx:{name}", 10)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("Counting", "has variables 'Counts', and none but 'params' and 'batch_stats'"),
        (
            "Late",
            r"returned batch statistics with late as float32\[\] in place of nothing; return the same names",
        ),
    ],
)
def test_variables_that_would_not_be_kept_are_named(tiny, tmp_path, name, complaint):
    with pytest.raises(ValueError, match=f"^config.student {complaint}"):
        train.train_and_evaluate(tiny(student=f"test_nnx:{name}"), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_it_has_no_file_for_pytorch(digits):
    variables = jax.jit(models.create("test_nnx:Net", 10).init)(jax.random.key(0), digits[:1])
    with pytest.raises(
        ValueError, match=r"^test_nnx:Net is a network of Flax NNX, and PyTorch's files are read and wri"
    ):
        convert.to_torch(variables, "test_nnx:Net", 10)
