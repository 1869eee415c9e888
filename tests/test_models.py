"""Every network against a PyTorch one of the same weights, and against the published figures."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAST_COMPILE, SLOW
from flax import traverse_util
from jax.test_util import check_grads

from rkd_jax import checkpoint, convert, experiment, models, steps
from rkd_jax.models import __main__ as table
from rkd_jax.models import _conv, layers
from rkd_jax.report import figures

try:
    import torch
    import torch_networks
except ImportError:  # then torch_network skips the tests that compare with it
    torch = None

RESNET = (64, "16@32 16@32 32@16 64@8")
VGG = (512, "64@32 128@16 256@8 512@4 512@4")
PUBLISHED = {  # parameters at 100 classes, MMACs at 32x32, embedding, features
    "resnet8": (83_892, 12.5, *RESNET),
    "resnet14": (181_108, 26.7, *RESNET),
    "resnet20": (278_324, 40.8, *RESNET),
    "resnet32": (472_756, 69.1, *RESNET),
    "resnet44": (667_188, 97.4, *RESNET),
    "resnet56": (861_620, 125.8, *RESNET),
    "resnet110": (1_736_564, 253.2, *RESNET),
    "resnet8x4": (1_233_540, 177.1, 256, "32@32 64@32 128@16 256@8"),
    "resnet32x4": (7_433_860, 1083.0, 256, "32@32 64@32 128@16 256@8"),
    "wrn_16_1": (180_916, 26.7, *RESNET),
    "wrn_16_2": (703_284, 101.1, 128, "16@32 32@32 64@16 128@8"),
    "wrn_40_1": (569_780, 83.3, *RESNET),
    "wrn_40_2": (2_255_156, 327.6, 128, "16@32 32@32 64@16 128@8"),
    "vgg8": (3_965_028, 96.2, *VGG),
    "vgg11": (9_277_284, 209.4, *VGG),
    "vgg13": (9_462_180, 284.9, *VGG),
    "vgg16": (14_774_436, 398.2, *VGG),
    "vgg19": (20_086_692, 511.4, *VGG),
    "ResNet18": (11_220_132, 555.5, 512, "64@32 64@32 128@16 256@8 512@4"),
    "ResNet50": (23_705_252, 1298.0, 2048, "64@32 256@32 512@16 1024@8 2048@4"),
    "MobileNetV2": (812_836, 6.5, 1280, "16@16 12@16 16@8 48@4 160@2"),
    "ShuffleV1": (949_258, 38.7, 960, "24@32 240@16 480@8 960@4"),
    "ShuffleV2": (1_355_528, 44.5, 1024, "24@32 116@16 232@8 464@4"),
}
# Every kind of block of every family; the other networks repeat them, under the same keys (tests/test_convert.py).
INFERENCE = ("resnet8x4", "ResNet50", "wrn_16_2", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2")
# What one network of every kind shows of the others, but for their numbers of blocks and channels.
EVERY_KIND = {"resnet8", "wrn_16_2", "vgg8", "ResNet50", "MobileNetV2", "MobileNetV2_64x64", "ShuffleV1", "ShuffleV2"}
TRAINED = ("resnet8", "vgg8", "wrn_16_1", "MobileNetV2", "MobileNetV2_64x64", "ShuffleV1", "ShuffleV2")


def short(name):
    """A network in float64, with fewer of the blocks that it repeats."""
    network = models.create(name, 10, jnp.float64)
    return network.clone(blocks=(1, 2, 1)) if name.startswith("Shuffle") else network


def images_for(name, count, side=None, channels=3):
    side = side or (64 if name.endswith("64x64") else 32)
    return np.random.default_rng(0).normal(size=(count, side, side, channels)).astype(np.float32)


def torch_network(name, scale=1.0):
    """A PyTorch network of 10 classes, with batch statistics, scales and biases that show when they are mixed up."""
    pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch_networks.create(name, 10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, scale, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def in_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def assert_outputs_close(outputs, theirs, tolerance):
    """Every output within a tolerance of its largest value."""
    logits, features, embedding, preactivations = theirs
    pairs = {"logits": (outputs.logits, logits), "embedding": (outputs.embedding, embedding)}
    for kind, reference in (("features", features), ("preactivations", preactivations)):
        for stage, (our, their) in enumerate(zip(getattr(outputs, kind), reference, strict=True)):
            pairs[f"{kind}[{stage}]"] = our, their.permute(0, 2, 3, 1)
    for what, (our, their) in pairs.items():
        their = their.detach().numpy()
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance * np.abs(their).max(), err_msg=what)
    logits, average = np.asarray(outputs.logits), np.asarray(outputs.class_maps).mean((1, 2))
    np.testing.assert_allclose(average, logits, rtol=0, atol=10 * tolerance * np.abs(logits).max())
    average = np.asarray(outputs.last_map).mean((1, 2))
    np.testing.assert_allclose(average, outputs.embedding, rtol=0, atol=1e-5 * np.abs(average).max())


@pytest.mark.parametrize(
    "name",
    [name if name in {*INFERENCE, "resnet8", "resnet32x4", "ResNet18", "vgg8"} else SLOW(name) for name in PUBLISHED],
)
def test_figures_are_the_published(name):
    parameters, mmacs, embedding, features = PUBLISHED[name]
    row = table.describe(name.upper())
    assert (row.name, row.parameters, row.embedding) == (name, parameters, embedding)
    assert " ".join(row.features) == features
    assert round(row.mmacs, 1) == mmacs
    # XLA does not count the products with padding (a quarter of vgg's, on 4x4 maps), but activations.
    assert 0.75 * mmacs < row.xla < 1.06 * mmacs


@pytest.mark.parametrize(
    ("name", "found", "parameters"),
    [
        ("ResNet18", "ResNet18", 11_271_432),
        ("MobileNetV2", "MobileNetV2_64x64", 2_497_480),
        SLOW("ShuffleV2", "ShuffleV2", 1_458_028),
    ],
)
def test_figures_at_64_are_the_published(name, found, parameters):
    row = table.describe(name, num_classes=200, image_size=64)
    assert (row.name, row.parameters) == (found, parameters)


@pytest.mark.parametrize(
    ("name", "side"), [*((name, None) for name in INFERENCE), ("vgg8", 64), SLOW("MobileNetV2_64x64", None)]
)
def test_inference_equals_pytorch(name, side):
    network, images = torch_network(name).eval(), images_for(name, 2, side)
    variables = convert.from_torch(network.state_dict(), name, 10)
    model = models.create(name, 10)
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=FAST_COMPILE)(variables, images)
    with torch.no_grad():
        assert_outputs_close(outputs, network(in_torch(images)), tolerance=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", *map(SLOW, TRAINED[2:])])
def test_training_equals_pytorch(name):
    """Outputs, loss, every gradient and every running average; in float64, where rounding flips no ReLU."""
    network = torch_network(name, 3.0 if name.endswith("64x64") else 1.0).double().train()  # beyond its ReLUs' 6
    variables = convert.from_torch(network.state_dict(), name, 10)
    images, labels = images_for(name, 4, side=16).astype(np.float64), np.arange(4)
    theirs = network(in_torch(images))
    their_loss = torch.nn.functional.cross_entropy(theirs[0], torch.from_numpy(labels))
    their_loss.backward()
    with jax.enable_x64(True):
        params, stats = (jax.tree.map(np.float64, variables[kind]) for kind in ("params", "batch_stats"))
        model = models.create(name, 10, dtype=jnp.float64)

        def loss(params, stats, images):
            outputs, updates = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
            return losses.mean(), (outputs, updates)

        (our_loss, (outputs, updates)), grads = jax.jit(
            jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE
        )(params, stats, images)
        ours = convert.to_torch({"params": grads, "batch_stats": updates["batch_stats"]}, name, 10)
    assert_outputs_close(outputs, theirs, tolerance=1e-6)
    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-6)
    largest = max(parameter.grad.abs().max().item() for parameter in network.parameters())
    for key, parameter in network.named_parameters():
        gradient = parameter.grad.numpy()
        # The gradient of a bias before a batch normalisation is rounding alone: hence the second tolerance.
        atol = max(1e-6 * np.abs(gradient).max(), 1e-10 * largest)
        np.testing.assert_allclose(ours[key], gradient, rtol=0, atol=atol, err_msg=key)
    for key, average in network.named_buffers():
        if "running" in key:
            np.testing.assert_allclose(ours[key], average.numpy(), rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", [name if name in EVERY_KIND else SLOW(name) for name in models.names()])
def test_takes_small_grey_images_and_computes_in_its_dtype(name):
    model = models.create(name, 10, jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    inits, dtypes = [], []

    def record(call, args, kwargs, context):
        made = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            inits.append(context.module.kernel_init)
            dtypes.append(made.dtype)
        return made

    with nn.intercept_methods(record):
        outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0], images)
    assert inits  # the convolutions are seen
    at_64 = name.endswith("64x64")  # whose classifier is a convolution
    assert dtypes == [jnp.bfloat16] * (len(dtypes) - at_64) + [jnp.float32] * at_64
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.float32)}
    expected = layers.torch_default if at_64 or name.startswith("Shuffle") else layers.kaiming_normal
    assert all(init is expected for init in inits)
    assert outputs.logits.shape == (2, 10)
    assert all(feature.shape[0] == 2 and feature.size > 0 for feature in outputs.features)
    assert [feature.shape for feature in outputs.features] == [x.shape for x in outputs.preactivations]


def he(shape):
    return (2 / (np.prod(shape[:-2]) * shape[-1])) ** 0.5


def torch_default(shape):
    return (1 / (3 * np.prod(shape[:-1]))) ** 0.5  # the standard deviation of U(-1/sqrt(fan_in), 1/sqrt(fan_in))


def hundredth(shape):
    return 0.01


@pytest.mark.parametrize(
    ("name", "convolutions", "linear"),
    [
        ("resnet8", he, torch_default),
        SLOW("wrn_16_1", he, torch_default),
        ("vgg8", he, hundredth),
        SLOW("MobileNetV2", he, hundredth),
        SLOW("MobileNetV2_64x64", torch_default, torch_default),
        SLOW("ShuffleV2", torch_default, torch_default),
    ],
)
def test_initialisation(name, convolutions, linear):
    """Every kernel's spread, and what the other parameters start at."""
    model, images = models.create(name, 100), images_for(name, 1)
    init = jax.jit(lambda key: model.init(key, images, train=False), compiler_options=FAST_COMPILE)
    variables = init(jax.random.key(0, impl="unsafe_rbg"))  # compiles twice as fast
    flat = traverse_util.flatten_dict(jax.device_get(variables))
    for (*module, leaf), values in flat.items():
        where = (*module, leaf)
        kind = linear if values.shape[-1] == 100 else convolutions
        kernel = flat.get((*module, "kernel"))
        if leaf == "kernel":
            error = 5 * (1 / (2 * values.size)) ** 0.5  # five standard errors of a standard deviation
            assert values.std() == pytest.approx(kind(values.shape), rel=error), where
        if name.startswith("wrn") and where[-2:] == ("fc", "bias"):
            assert not values.any()
        elif kernel is not None and kind is torch_default:
            bound = np.prod(kernel.shape[:-1]) ** -0.5
            assert 0.5 * bound < np.abs(values).max() <= bound, where
        elif leaf in ("scale", "var"):
            assert (values == 1).all(), where
        elif leaf != "kernel":
            assert not values.any(), where


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    images = images_for("resnet8", 2, side=16)
    full, half = models.create("resnet8", 10), models.create("resnet8", 10, dtype=jnp.bfloat16)
    variables = convert.from_torch(torch_network("resnet8").state_dict(), "resnet8", 10)
    initial = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}
    exact, rounded = full.apply(variables, images), half.apply(variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.float32)}
    difference = np.abs(exact.logits - rounded.logits).max() / np.abs(exact.logits).max()
    assert 1e-5 < difference < 0.05
    program = str(jax.make_jaxpr(half.apply)(variables, images))
    convolutions = re.findall(r"(\w+)\[[\d,]+\] = (?:rkd_conv|conv_general_dilated)\b", program)
    assert len(convolutions) == 9
    assert set(convolutions) == {"bf16"}


@pytest.mark.parametrize(("name", "side"), [("resnet8", 32), ("MobileNetV2", 32), SLOW("MobileNetV2", 64)])
def test_logits_have_every_digit_on_any_device(name, side):
    """A GPU's TF32 and a TPU's bfloat16 are asked away, forward and backward; of the convolutions only in tests."""
    model, images = models.create(name, 10, image_size=side), np.zeros((2, side, side, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def logits(params, stats):
        outputs = model.apply({"params": params, "batch_stats": stats}, images)
        return outputs.logits.sum() + outputs.class_maps.sum()

    gradient = jax.make_jaxpr(jax.grad(logits))
    test = jax.make_jaxpr(steps.make_eval_step(model, steps.Normalization((0.5,) * 3, (0.5,) * 3), steps.local_mesh()))
    with _conv.xla_alone():  # as on a GPU
        training = str(gradient(variables["params"], variables["batch_stats"]))
        testing = str(test(variables, np.zeros(images.shape, np.uint8), np.zeros(2, np.int32)))
    assert training.count("precision=(Precision.HIGHEST") == 6  # logits and class maps, and both gradients of each
    assert "precision=None" in training
    assert "precision=(Precision.HIGHEST" in testing
    assert "precision=None" not in testing


def test_running_variance_is_unbiased_as_pytorch_has_it():
    """Flax's own batch normalisation averages the biased one."""
    x = np.random.default_rng(0).normal(3, 2, size=(2, 2, 2, 5)).astype(np.float32)
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    _, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = 0.9 + 0.1 * x.reshape(-1, 5).var(axis=0, ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"], expected, rtol=1e-6)


def test_batch_statistics_survive_a_large_mean():
    """One pass over the data, but shifted by the running mean: 1e4 times the deviation costs no digits."""
    x = (1e4 + np.random.default_rng(0).normal(size=(8, 8, 8, 3))).astype(np.float32)
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    variables["batch_stats"]["mean"] = np.full(3, 1e4, np.float32)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + layers.EPSILON)
    np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-3)


def test_channels_that_do_not_vary_stay_finite():
    """Far from the running mean, rounding leaves them variances of -1 to 0.5."""
    x = np.broadcast_to(np.random.default_rng(0).normal(0, 1e3, 64), (8, 4, 4, 64)).astype(np.float32)
    norm = layers.BatchNorm()
    y, updates = norm.apply(norm.init(jax.random.key(0), x, train=False), x, train=True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    assert (updates["batch_stats"]["var"] >= 0.9).all()


def test_gradient_of_batch_statistics_is_the_numeric_one_in_float64():
    """Of the output, the mean and the variance, in x, scale and bias; float32 is within rounding of it."""
    rng = np.random.default_rng(0)
    x, around, weights = rng.normal(3, 2, size=(4, 3, 3, 5)), rng.normal(3, 1, size=5), rng.normal(size=(4, 3, 3, 5))
    scale, bias = rng.normal(size=5), rng.normal(size=5)

    def loss(x, scale, bias):
        y, mean, var = layers._normalize(x, scale, bias, around=around.astype(x.dtype))
        return (weights.astype(x.dtype) * y**2).sum() + (mean**3).sum() + jnp.sin(var).sum()

    single = jax.grad(loss, (0, 1, 2))(*(value.astype(np.float32) for value in (x, scale, bias)))
    with jax.enable_x64(True):
        check_grads(loss, (x, scale, bias), order=1, modes=["rev"], rtol=1e-6, eps=1e-5)
        for ours, exact in zip(single, jax.grad(loss, (0, 1, 2))(x, scale, bias), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=0, atol=3e-6 * np.abs(exact).max())


@pytest.mark.parametrize("name", [SLOW("resnet8"), "wrn_16_1", "vgg8", SLOW("MobileNetV2_64x64")])
def test_folded_network_is_the_same_function(name):
    variables, images = convert.from_torch(torch_network(name).state_dict(), name, 10), images_for(name, 2, side=16)
    model = models.create(name, 10)
    folded = models.fold(model, variables, images)
    assert not folded["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype("float32")}
    assert jax.tree.structure(variables["params"]) != jax.tree.structure(folded["params"])
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=FAST_COMPILE)
    for ours, reference in zip(
        jax.tree.leaves(apply(folded, images)), jax.tree.leaves(apply(variables, images)), strict=True
    ):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    cost = [apply.lower(v, images).cost_analysis()["flops"] for v in (folded, variables)]
    assert cost[0] < cost[1]


@pytest.mark.parametrize("name", ["resnet8", *map(SLOW, TRAINED[1:])])
def test_batches_side_by_side_are_batches_in_turn(name):
    """One call with an axis of batches, each normalised by its own statistics; float64, for rounding flips ReLUs."""
    model, images = short(name), images_for(name, 4, side=16)
    stacked = np.stack([images, 2 * images + 1])
    with jax.enable_x64(True):
        variables = jax.tree.map(np.float64, experiment.untrained(model, stacked.shape[2:]))

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def train(params, stats, images):
            inputs = {"params": params, "batch_stats": stats}
            outputs, updated = model.apply(inputs, images, train=True, mutable=["batch_stats"])
            return outputs.logits, updated["batch_stats"]

        params, stats = variables["params"], variables["batch_stats"]
        before, stacked = stats, stacked.astype(np.float64)
        logits, after = jax.vmap(train, (None, None, 0))(params, stats, stacked)
        for i, images in enumerate(stacked):
            expected, stats = train(params, stats, images)
            np.testing.assert_allclose(logits[i], expected, rtol=0, atol=1e-9 * np.abs(expected).max())
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), models.in_turn(before, after), stats
        )


@pytest.mark.slow
def test_folded_in_bfloat16_is_as_near_as_unfolded():
    """Kernels and what is added to a convolution in bfloat16, the classifier in float32."""
    variables, images = (
        convert.from_torch(torch_network("resnet8x4").state_dict(), "resnet8x4", 10),
        images_for("resnet8x4", 4),
    )
    model, exact = models.create("resnet8x4", 10, jnp.bfloat16), models.create("resnet8x4", 10)
    folded = models.fold(model, variables, images)
    assert folded["params"]["conv1"]["kernel"].dtype == folded["params"]["bn1"]["bias"].dtype == jnp.bfloat16
    assert folded["params"]["fc"]["kernel"].dtype == jnp.float32
    reference = exact.apply(variables, images, train=False).logits
    errors = [jnp.abs(model.apply(v, images, train=False).logits - reference).mean() for v in (folded, variables)]
    assert errors[0] < 2 * errors[1] < 0.05 * jnp.abs(reference).mean()


def test_folding_leaves_a_residual_that_reads_the_convolution_alone():
    """wrn_16_1's stem feeds a batch normalisation and the sum: its kernel must stay."""
    variables = convert.from_torch(torch_network("wrn_16_1").state_dict(), "wrn_16_1", 10)
    folded = models.fold(models.create("wrn_16_1", 10), variables, images_for("wrn_16_1", 1))
    np.testing.assert_array_equal(folded["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"])


@pytest.mark.parametrize("name", ["resnet8", *map(SLOW, TRAINED[1:])])
def test_resumed_network_is_the_rest_of_it(name):
    """From its own maps, what it makes itself; from others, other maps behind them."""
    model, images = short(name), images_for(name, 2, side=16)
    with jax.enable_x64(True):
        variables = jax.tree.map(np.float64, experiment.untrained(model, images.shape[1:]))

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def both(variables, images):
            outputs = model.apply(variables, images)
            maps = {**dict(enumerate(outputs.cuts.maps)), models.LAST: outputs.last_map}
            images = jnp.concatenate([0 * images] * 2)
            return outputs, {
                stage: models.resume(model, variables, stage, jnp.concatenate([x, jnp.sin(x)]), images=images)
                for stage, x in maps.items()
            }

        expected, found = jax.device_get(both(variables, images.astype(np.float64)))
    count = len(expected.cuts.maps)
    assert {*found} == {models.LAST, *range(count)}
    for stage, resumed in found.items():
        pairs = [(getattr(resumed, part), getattr(expected, part)) for part in ("logits", "last_map", "class_maps")]
        if stage != models.LAST:
            pairs += list(zip(resumed.cuts.maps[stage:], expected.cuts.maps[stage:], strict=True))
        for (own, other), want in ((np.split(x, 2), want) for x, want in pairs):
            np.testing.assert_allclose(own, want, rtol=0, atol=1e-9 * np.abs(want).max())
            assert np.abs(other - want).max() > 1e-3 * np.abs(want).max()
    last = expected.cuts.maps[-1]
    assert expected.cuts.activated == (last.min() >= 0)
    np.testing.assert_array_equal(expected.last_map, np.clip(last, 0, 6 if name.endswith("64x64") else None))


def test_resumed_network_normalises_by_the_batch_in_training():
    model, images = models.create("resnet8", 10), images_for("resnet8", 4)
    variables = experiment.untrained(model, images.shape[1:])
    outputs, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    resumed, still = (
        models.resume(model, variables, 1, outputs.cuts.maps[1], images=images, train=t) for t in (True, False)
    )
    np.testing.assert_allclose(resumed.logits, outputs.logits, rtol=0, atol=1e-4 * np.abs(outputs.logits).max())
    assert np.abs(still.logits - outputs.logits).max() > 0.1 * np.abs(outputs.logits).max()


def test_resumed_network_keeps_its_dtype_and_its_gradient():
    model, images = models.create("resnet8", 10, jnp.bfloat16), images_for("resnet8", 2)
    variables = experiment.untrained(model, images.shape[1:])

    def loss(params, x):
        outputs = models.resume(model, variables | {"params": params}, 2, x, images=images, train=True)
        assert outputs.logits.dtype == x.dtype == jnp.float32
        return (outputs.logits**2).sum()

    x = np.random.default_rng(0).normal(size=(2, 16, 16, 32)).astype(np.float32)
    params, of_x = jax.jit(jax.grad(loss, (0, 1)), compiler_options=FAST_COMPILE)(variables["params"], x)
    assert np.abs(of_x).max() > 0
    reached = {
        name for name, leaves in params.items() if any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(leaves))
    }
    assert reached == {"layer3_0", "fc"}


@pytest.mark.parametrize("name", [name if name in EVERY_KIND else SLOW(name) for name in PUBLISHED])
def test_classifier_makes_the_logits_of_the_average(name):
    model, images = models.create(name, 10), images_for(name, 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    path = models.classifier(model, variables, images)
    layer = functools.reduce(lambda tree, key: tree[key], path, variables["params"])
    assert (layer["kernel"].shape[-1], *layer["bias"].shape) == (10, 10)
    assert layer["kernel"].shape[-2] == PUBLISHED[name][2]


def test_resumed_network_drops_what_it_dropped():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = models.Cut(1)(nn.relu(nn.Conv(4, (3, 3))(images)))
            return models.Outputs(nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x).mean((1, 2))), last_map=x)

    images, options = images_for("resnet8", 2, side=8), {"train": True, "rngs": {"dropout": jax.random.key(1)}}
    variables = Net().init(jax.random.key(0), images)
    outputs, other = (Net().apply(variables, images, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    resumed = models.resume(Net(), variables, 1, outputs.last_map, images=images, **options)
    np.testing.assert_array_equal(resumed.logits, outputs.logits)
    assert np.abs(other.logits - outputs.logits).max() > 0.01


def test_a_map_of_another_shape_is_named():
    model, images = models.create("resnet8", 10), images_for("resnet8", 2)
    variables = experiment.untrained(model, images.shape[1:])
    with pytest.raises(ValueError, match=r"'ResNet' was given a map of shape \(2, 3\) at Cut\(1\), where its own has"):
        models.resume(model, variables, 1, jnp.zeros((2, 3)), images=images)


def test_networks_without_a_cut_say_so(own):
    images = jnp.ones((2, 8, 8, 1))
    model = models.create("own_networks:outputs", 7)
    variables = model.init(jax.random.key(0), images)
    with pytest.raises(
        ValueError, match=r"network 'own_networks:outputs' has no rkd_jax\.models\.Cut\(1\); put one there"
    ):
        models.resume(model, variables, 1, images, images=images)
    with pytest.raises(ValueError, match=r"does not end with rkd_jax\.models\.Cut\(LAST\), the average over positions"):
        models.classifier(model, variables, images)


def test_names_are_case_insensitive_and_sized():
    assert models.resolve("SHUFFLEV2") == models.resolve("shufflev2", image_size=64) == "ShuffleV2"
    assert models.resolve("mobilenetv2", image_size=64) == "MobileNetV2_64x64"
    assert models.resolve("mobilenetv2", image_size=32) == "MobileNetV2"


@pytest.mark.parametrize(("name", "nearest"), [("resnet8x5", "resnet8x4"), ("wrn-40-2", "wrn_40_2"), ("vgg9", "vgg19")])
def test_unknown_network_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"config.student='{name}' is no network; did you mean '{nearest}'"):
        models.create(name, 10)


def test_vgg_names_the_size_that_it_takes():
    with pytest.raises(ValueError, match="4 pixels are too few, it takes 8"):
        models.create("vgg8", 10).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


OWN = """
import flax.linen as nn
from rkd_jax.models import Outputs

class Net(nn.Module):
    num_classes: int
    full: bool = False
    classes_too_many: int = 0

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.relu(nn.Conv(4, (3, 3), name="stem")(images))
        embedding = features.mean((1, 2))
        logits = nn.Dense(self.num_classes + self.classes_too_many, name="head")(embedding)
        cuts = (features,) if self.full == "cuts" else None
        return Outputs(logits, (features,), embedding, cuts=cuts) if self.full else logits

class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return images

class Pair(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return images, {}

class Signs(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images.mean((1, 2))) > 0

def logits(num_classes): return Net(num_classes)
def signs(num_classes): return Signs(num_classes)
def outputs(num_classes, dtype): return Net(num_classes, full=True)
def bare_cuts(num_classes): return Net(num_classes, full="cuts")
def no_train(num_classes): return NoTrain()
def wrong_classes(num_classes): return Net(num_classes, classes_too_many=1)
def pair(num_classes): return Pair()
def no_module(num_classes): return 3
def no_classes(): return Net(3)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("factory", "features"), [("logits", 0), ("outputs", 1)])
def test_own_network(own, factory, features):
    model = models.create(f"own_networks:{factory}", 7)
    variables = model.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)), train=False)
    assert variables["params"].keys() == {"stem", "head"}  # as the network alone has them
    outputs = model.apply(variables, jnp.ones((2, 8, 8, 1)), train=False)
    assert outputs.logits.shape == (2, 7)
    assert len(outputs.features) == features
    assert outputs.embedding.shape == (2, 4) if features else outputs.embedding is None


def test_outputs_need_but_logits():
    logits = jnp.ones((2, 7), jnp.bfloat16)
    assert models.Outputs(logits) == (logits, (), None, (), None, None, None)
    found = models.Outputs.of(logits)
    assert found.logits.dtype == jnp.float32
    assert found[1:] == ((), None, (), None, None, None)


def test_own_network_that_bfloat16_would_not_reach(own):
    with pytest.raises(ValueError, match=r"config.student='own_networks:logits' takes no dtype, and config.dtype=bfl"):
        models.create("own_networks:logits", 7, dtype=jnp.bfloat16)
    assert models.create("own_networks:outputs", 7, dtype="bfloat16")  # which takes one
    assert models.create("own_networks:logits", 7, dtype="float32")


def test_own_network_without_embedding_is_listed(own):
    assert str(table.describe("own_networks:logits", image_size=8)).split()[-1] == "-"


def test_own_network_without_embedding_has_no_tsne(own, tmp_path):
    variables = models.create("own_networks:logits", 10).init(jax.random.key(0), jnp.ones((2, 8, 8, 1)), train=False)
    metadata = {"network": "own_networks:logits", "num_classes": 10, "mean": (0.5,), "std": (0.5,)}
    checkpoint.save_network(tmp_path / "net", variables, metadata)
    with pytest.raises(SystemExit, match=r"--networks: 'N' has no embedding; return it in rkd_jax\.models\.Outputs"):
        figures.main(["tsne", "--networks", f"N={tmp_path / 'net'}", "--dataset", "digits", "--num_images", "20"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_such_module:factory", "config.teacher='no_such_module:factory' cannot be imported"),
        ("own_networks:no_such", "cannot be imported: module 'own_networks' has no attribute 'no_such'"),
        ("own_networks:no_train", r"its __call__ lacks `train`; define __call__\(self, images, train=False\)"),
        ("own_networks:no_module", "returned a int; return a flax.linen.Module"),
        ("own_networks:no_classes", r"it is called as factory\(num_classes=7\)"),
        ("own_networks:wrong_classes", r"logits of shape \(2, 7\)"),
        ("own_networks:signs", "returned logits of bool, which have no gradient; return floats"),
        ("own_networks:bare_cuts", r"returned a tuple as cuts; return rkd_jax\.models\.Cuts\(maps"),
        ("own_networks:pair", r"returned a tuple for 2 images of 7 classes; return rkd_jax.models.Outputs"),
    ],
)
def test_own_network_that_cannot_be_used(own, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        models.create(name, 7, field="config.teacher").init(jax.random.key(0), jnp.ones((2, 8, 8, 1)), train=False)


def test_command_prints_the_table(capsys):
    table.main(["resnet8", "MobileNetV2", "--image_size", "64", "--num_classes", "200"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["network", "resnet8", "MobileNetV2_64x64"]
    assert lines[2].split()[1] == "2,497,480"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no_module:net"], "NAME='no_module:net' cannot be imported"),
        (["resnet8", "--image_size", "0"], "--image_size: '0' is not a whole number of 1 or more"),
        (["resnet8", "--num_classes", "-1"], "--num_classes: '-1' is not a whole number of 1 or more"),
    ],
)
def test_command_says_what_is_wrong(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        table.main(arguments)
    printed = capsys.readouterr()
    assert complaint in f"{stop.value} {printed.err}"
    assert not printed.out
