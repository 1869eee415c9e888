"""Each loss against a plain NumPy version in float64, its values and its gradients; stability; precision."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAST_COMPILE
from sklearn.isotonic import isotonic_regression

from rkd_jax import losses

RNG = np.random.default_rng(0)
BATCH, CLASSES = 5, 7
S, T = 3 * RNG.normal(size=(2, BATCH, CLASSES))
Y = np.array([0, CLASSES - 1, 3, 3, 1])
KEPT = RNG.random((BATCH, CLASSES)) < 0.6
KEPT[0] = False


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rows(function):
    """A loss of one example's rows, for a batch of them."""
    return lambda *arrays: np.array([function(*row) for row in zip(*arrays, strict=True)])


def kl(p, q):
    return np.sum(p * np.log(p / q))


def soft_rank(z, eps):
    """Descending, by scikit-learn's isotonic regression."""
    order = np.argsort(-z)
    t = z[order] / eps
    u = isotonic_regression(t + np.arange(1, len(t) + 1), increasing=False)
    rank = np.empty_like(z)
    rank[order] = u - t
    return rank


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1]


def label_kl(s, t, y, top):
    p, q = softmax(t)[top], softmax(s)[y]
    return kl(np.array([p, 1 - p]), np.array([q, 1 - q]))


def kept_kl(s, t, kept):
    return kl(softmax(t[kept] / 2), softmax(s[kept] / 2)) * 4 if kept.any() else 0.0


def kept_soft_cross_entropy(s, t, kept):
    return -4 * np.sum(softmax(t[kept] / 2) * np.log(softmax(s[kept] / 2))) if kept.any() else 0.0


def label_first(z, y):
    others = [i for i in np.argsort(-z) if i != y]
    new = np.empty_like(z)
    new[[y, *others]] = np.sort(z)[::-1]
    return new


# name -> (loss of s and t, the same in NumPy)
CASES = {
    "cross_entropy": (lambda s, t: losses.cross_entropy(s, Y), rows(lambda s, t, y: -np.log(softmax(s)[y]))),
    "soft_cross_entropy": (
        lambda s, t: losses.soft_cross_entropy(s, t, 2.0, where=KEPT),
        lambda s, t, y: rows(kept_soft_cross_entropy)(s, t, KEPT),
    ),
    "kl": (lambda s, t: losses.kl(s, t), rows(lambda s, t, y: kl(softmax(t), softmax(s)))),
    "kl at 4": (lambda s, t: losses.kl(s, t, 4.0), rows(lambda s, t, y: 16 * kl(softmax(t / 4), softmax(s / 4)))),
    "kl of some": (lambda s, t: losses.kl(s, t, 2.0, where=KEPT), lambda s, t, y: rows(kept_kl)(s, t, KEPT)),
    "label_kl": (
        lambda s, t: losses.label_kl(s, t, Y, t.argmax(-1)),
        lambda s, t, y: rows(label_kl)(s, t, y, t.argmax(-1)),
    ),
    "pearson": (losses.pearson, rows(lambda s, t, y: pearson(s, t))),
    "standardize": (
        lambda s, t: jnp.sum(losses.standardize(s) * t, axis=-1),
        rows(lambda s, t, y: np.sum((s - s.mean()) / (s.std(ddof=1) + 1e-7) * t)),
    ),
    "label_first": (
        lambda s, t: jnp.sum(losses.label_first(s, Y) * t, axis=-1),
        rows(lambda s, t, y: np.sum(label_first(s, y) * t)),
    ),
    "norm": (
        lambda s, t: losses.norm(s) * losses.norm(t),
        rows(lambda s, t, y: np.linalg.norm(s) * np.linalg.norm(t)),
    ),
} | {
    f"ranking_alignment {kind} {eps}": (
        lambda s, t, kind=kind, eps=eps: losses.ranking_alignment(s, t, eps, kind),
        rows(lambda s, t, y, distance=distance, eps=eps: distance(soft_rank(s, eps), soft_rank(t, eps))),
    )
    for kind, eps, distance in (
        ("l2", 20.0, lambda a, b: np.mean((a - b) ** 2)),
        ("l2", 1.0, lambda a, b: np.mean((a - b) ** 2)),
        ("l2", 0.1, lambda a, b: np.mean((a - b) ** 2)),
        ("l1", 0.5, lambda a, b: np.mean(np.abs(a - b))),
        ("spearman", 0.5, lambda a, b: 1 - pearson(a, b)),
    )
}  # fmt: skip


@functools.cache
def compiled(name):
    """(s, t) -> the loss of each example, and the gradients of their sum."""
    loss, _ = CASES[name]
    gradients = jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1))
    return jax.jit(lambda s, t: (loss(s, t), gradients(s, t)), compiler_options=FAST_COMPILE)


def numerical_gradient(function, x, h=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (function(up) - function(down)) / (2 * h)
    return gradient


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_numpys(name):
    _, reference = CASES[name]
    with jax.enable_x64(True):
        value, gradients = compiled(name)(S, T)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, reference(S, T, Y), rtol=1e-9, atol=1e-9)
    expected = (
        numerical_gradient(lambda s: reference(s, T, Y).sum(), S),
        numerical_gradient(lambda t: reference(S, t, Y).sum(), T),
    )
    for gradient, numerical in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-6)


def test_per_example_under_any_leading_axes():
    for name in CASES:
        assert jax.eval_shape(compiled(name), S, T)[0].shape == (BATCH,), name

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def of_all(s, t, y):
        found = {name: getattr(losses, name)(s, t) for name in ("kl", "soft_cross_entropy", "pearson")}
        found |= {kind: losses.ranking_alignment(s, t, 0.5, kind) for kind in ("l2", "l1", "spearman")}
        found |= {name: getattr(losses, name)(s, y) for name in ("cross_entropy", "pick", "label_first")}
        return found | {"label_kl": losses.label_kl(s, t, y, t.argmax(-1)), "standardize": losses.standardize(s)}

    s, t, y = np.stack([S, T]), np.stack([T, S]), np.stack([Y, Y])
    with jax.enable_x64(True):
        stacked, *single = of_all(s, t, y), of_all(S, T, Y), of_all(T, S, Y)
    for i, found in enumerate(single):
        for name, expected in found.items():
            assert expected.dtype == jnp.float64
            np.testing.assert_allclose(stacked[name][i], expected, rtol=1e-9, err_msg=name)


def test_temperature_is_1_unless_it_is_given():
    for loss in (losses.kl, losses.soft_cross_entropy):
        np.testing.assert_array_equal(loss(S, T), loss(S, T, 1.0))


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name):
    s, t = jnp.bfloat16(S), jnp.bfloat16(T)
    half = jax.jit(CASES[name][0], compiler_options=FAST_COMPILE)(s, t)
    gradients = jax.eval_shape(compiled(name), s, t)[1]
    full, _ = compiled(name)(s.astype(jnp.float32), t.astype(jnp.float32))
    assert half.dtype == jnp.float32
    assert gradients[0].dtype == gradients[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(half, full, rtol=1e-5, atol=1e-6)


ONE_HOT = 1e4 * np.eye(CLASSES)[:BATCH]
EXTREMES = {
    "confident": (ONE_HOT, ONE_HOT),
    "confidently apart": (ONE_HOT, np.roll(ONE_HOT, 1, axis=-1)),
    "large": (1e4 * np.sign(S), 1e4 * np.sign(T)),
    "very large": (1e4 * S, -1e4 * S),
    "constant": (np.full_like(S, 1e4), np.full_like(S, -1e4)),
    "zero": (np.zeros_like(S), T),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", CASES)
def test_finite_at_extreme_logits(name, extreme):
    value, gradients = compiled(name)(*map(jnp.float32, EXTREMES[extreme]))
    assert np.isfinite(value).all()
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_labels_that_are_no_class_make_their_rows_nan(dtype):
    s, y = jnp.float32(S), jnp.array([-1, *Y[1:-1], CLASSES], dtype)
    value = losses.cross_entropy(s, y)
    gradient = jax.grad(lambda s: losses.cross_entropy(s, y).sum())(s)
    assert np.isnan(value[jnp.array([0, -1])]).all()
    assert np.isnan(gradient[jnp.array([0, -1])]).all()
    expected, slope = compiled("cross_entropy")(s, s)
    np.testing.assert_allclose(value[1:-1], expected[1:-1], rtol=1e-6)
    np.testing.assert_allclose(gradient[1:-1], slope[0][1:-1], rtol=1e-6, atol=1e-7)
    assert losses.cross_entropy(jnp.zeros((1, 1000)), jnp.array([5], dtype)) == pytest.approx(np.log(1000))


def test_labels_that_cannot_be_are_named():
    with pytest.raises(TypeError, match=r"labels has dtype float32; give each row's class as an integer, e\.g\. int32"):
        losses.cross_entropy(S, jnp.float32(Y))
    of_labels = (losses.cross_entropy, losses.pick, losses.label_against_rest, losses.label_first)
    for loss in (*of_labels, lambda s, y: losses.label_kl(s, T, y, Y), lambda s, y: losses.label_kl(T, s, Y, y)):
        for labels in (Y[:, None], Y[:1], Y[0]):
            with pytest.raises(ValueError, match=r"labels has shape \(.*\), and logits \(5, 7\); give .* shape \(5,\)"):
                loss(jnp.float32(S), jnp.int32(labels))


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy", "label_kl", "ranking_alignment", "pearson"])
def test_sides_of_other_shapes_are_named(name):
    loss = functools.partial(losses.label_kl, student_labels=Y, teacher_labels=Y) if name == "label_kl" else None
    ours, theirs = ("a", "b") if name == "pearson" else ("student_logits", "teacher_logits")
    for other in (T[:1], T[:, :-1], T[0]):
        with pytest.raises(ValueError, match=re.escape(f"{ours} has shape (5, 7) and {theirs} {other.shape}; give")):
            (loss or getattr(losses, name))(S, other)


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy"])
def test_a_temperature_an_example_is_vmaps_business(name):
    loss, temperatures = getattr(losses, name), jnp.arange(1.0, 6.0)
    for shaped in (temperatures, temperatures[:, None]):
        with pytest.raises(
            ValueError, match=re.escape(f"temperature has shape {shaped.shape}; give a scalar, or use jax.vmap")
        ):
            loss(S, T, shaped)
    expected = [loss(s, t, float(temperature)) for s, t, temperature in zip(S, T, temperatures, strict=True)]
    np.testing.assert_allclose(jax.vmap(loss)(S, T, temperatures), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy"])
def test_a_temperature_is_positive_and_may_be_an_array(name):
    loss = getattr(losses, name)
    for temperature in (0, -1.0, jnp.float32(0), float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^temperature=.* must be positive and finite"):
            jax.jit(lambda s, t, T=temperature: loss(s, t, T))(S, T)
    for temperature in (4, np.float32(4), jnp.float32(4)):
        given = jax.jit(lambda s, t, T=temperature: loss(s, t, T))(S, T)
        np.testing.assert_allclose(given, loss(S, T, 4.0), rtol=1e-5)


def test_kl_at_extreme_logits_is_exact():
    s, t = jnp.float32([[1e4, 0.0, 0.0]]), jnp.float32([[0.0, 1e4, 0.0]])
    np.testing.assert_allclose(losses.kl(s, t), [1e4])
    np.testing.assert_allclose(losses.label_kl(s, t, jnp.array([0]), jnp.array([0])), [1e4], rtol=1e-4)


def test_what_is_left_out_does_not_count_however_large_it_is():
    s, t = (jnp.float32(np.where(KEPT, x - 1e4, 1e4)) for x in (S, T))
    for loss in (losses.kl, losses.soft_cross_entropy):
        np.testing.assert_allclose(loss(s, t, where=KEPT), loss(S, T, where=KEPT), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(losses.label_kl(S - 1e4, T - 1e4, Y, Y), losses.label_kl(S, T, Y, Y), rtol=1e-2)


@pytest.mark.parametrize("value", [0.1, -3.3, 1e4])
@pytest.mark.parametrize("classes", [1, 6, 7, 100])
def test_constant_rows_leave_no_rounding_to_be_scaled_up(classes, value):
    constant, other = jnp.full(classes, value), jnp.linspace(-2, 3, classes)
    np.testing.assert_array_equal(losses.standardize(constant), np.zeros(classes))
    assert losses.pearson(constant, constant) == losses.pearson(constant, other) == 0
    of_constant, of_other = jax.grad(losses.pearson, (0, 1))(constant, other)
    np.testing.assert_allclose(of_constant, other - other.mean(), atol=1e-6)
    np.testing.assert_array_equal(of_other, np.zeros(classes))


def test_pearson_is_0_where_a_side_is_constant_and_invariant_to_affine_maps():
    np.testing.assert_array_equal(losses.pearson(jnp.ones((1, 4)), jnp.arange(4.0)[None]), [0.0])
    np.testing.assert_allclose(losses.pearson(3 * S + 2, T / 7 - 1), losses.pearson(S, T), atol=1e-6)
    s, t = (x - x.mean(-1, keepdims=True) for x in (S, T))
    scale = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(losses.pearson(S, T, epsilon=2.0), (s * t).sum(-1) / (scale + 2), atol=1e-6)
    np.testing.assert_allclose(losses.pearson(jnp.float32(S) * 1e-6, jnp.float32(T), epsilon=1.0), 0.0, atol=1e-3)


def test_standardize_of_two_classes():
    np.testing.assert_allclose(losses.standardize(S[:, :2]).std(-1, ddof=1), 1, rtol=1e-5)


def test_label_first_keeps_a_right_teachers_logits_and_the_others_order():
    np.testing.assert_array_equal(losses.label_first(jnp.float32(T), T.argmax(-1)), jnp.float32(T))
    np.testing.assert_array_equal(losses.label_first(jnp.array([[5.0, 3.0, 4.0, 1.0]]), jnp.array([3])), [[4, 1, 3, 5]])


def test_ranking_alignment_is_centred_logits_where_nothing_is_ranked():
    centred = (S - T) - (S - T).mean(-1, keepdims=True)
    loss = losses.ranking_alignment(jnp.float32(S), jnp.float32(T), eps=100.0) * 100.0**2
    np.testing.assert_allclose(loss, np.mean(centred**2, axis=-1), rtol=1e-3)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"^kind='l3' is none of 'l2', 'l1', 'spearman'"):
        losses.ranking_alignment(S, T, kind="l3")
