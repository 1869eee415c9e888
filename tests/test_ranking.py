"""The soft-ranking operator, in both its forms, against scikit-learn's isotonic regression in float64."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAST_FLAGS, SLOW
from jax.test_util import check_grads
from sklearn.isotonic import isotonic_regression

from rkd_jax import losses, methods, ranking

SIZES = (0, 1, 2, 5, 100, 200, 1000)
STRENGTHS = (1e-6, 1e-4, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0, 1e3, 1e6)
KINDS = ("random", "teacher", "ties", "constant", "infinities", "offset")


def patched(**changes):
    """A copy of the operator's module with changes: no trace of the original's is reused, and none left behind."""
    spec = importlib.util.find_spec("rkd_jax.ranking")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(changes)
    return module


# The form for a CPU, and the one for accelerators and sharded batches, on this CPU.
hull = patched(_by_platform=lambda loops, hull, *args: hull(*args))
FORMS = {"loops": ranking, "hull": hull}
both_forms = pytest.mark.parametrize("ranking", FORMS.values(), ids=FORMS)


def rows(n, dtype=np.float64):
    """One row of each kind, [len(KINDS), n]."""
    rng = np.random.default_rng(n)
    random = 3 * rng.normal(size=n)
    infinite = random.copy()
    infinite[rng.random(n) < 0.1] = np.inf
    infinite[rng.random(n) < 0.1] = -np.inf
    teacher = rng.normal(size=n)
    teacher[n // 3 : n // 3 + 1] += 20
    return np.stack([random, teacher, np.round(random), np.full(n, -1.5), infinite, random + 1000]).astype(dtype)


def expected(x, eps, g=None):
    """Descending soft ranks of one row by scikit-learn, the blocks in its order, and the gradient of <g, ranks>."""
    x, n = np.asarray(x, np.float64), len(x)
    order = np.argsort(-x, kind="stable")
    above, below = x[order][:-1], x[order][1:]
    with np.errstate(invalid="ignore"):
        gaps = np.clip(np.where(above == below, 0, (above - below) / eps), 0, n)
    y = np.arange(1, n + 1) - np.concatenate([[0], np.cumsum(gaps)])[:n]
    fit = isotonic_regression(y, increasing=False) if n else y
    block = np.empty(n, int)
    block[order] = np.cumsum(np.diff(fit, prepend=fit[:1]) != 0)
    rank = np.empty(n)
    rank[order] = fit - y + np.arange(1, n + 1)
    if g is None:
        return rank, block
    mean = np.bincount(block, g)[block] / np.bincount(block)[block] if n else g
    return rank, block, -(g - mean) / eps


def value_and_vjp(ranking):
    """Jitted (x, eps, g) -> (descending ranks, gradient of <g, ranks>)."""

    def ranks(x, eps):
        return ranking.soft_rank(x, "DESCENDING", eps)

    @jax.jit
    def run(x, eps, g):
        rank, pull = jax.vjp(lambda x: ranks(x, eps), x)
        return rank, pull(g)[0]

    return run


@both_forms
@pytest.mark.parametrize("n", [SLOW(n) if n == 1000 else n for n in SIZES])
def test_values_and_gradients_are_scikit_learns_in_float64(ranking, n):
    x = rows(n)
    g = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(True):
        run = value_and_vjp(ranking)
        for eps in STRENGTHS:
            found, gradient = run(x, eps, g)
            assert found.dtype == gradient.dtype == jnp.float64
            for kind, row, *pair in zip(KINDS, x, found, gradient, g, strict=True):
                rank, _, slope = expected(row, eps, pair[2])
                np.testing.assert_allclose(pair[0], rank, rtol=0, atol=1e-9, err_msg=f"{kind} {eps}")
                np.testing.assert_allclose(pair[1] * eps, slope * eps, rtol=0, atol=1e-9, err_msg=f"{kind} {eps}")


@pytest.mark.parametrize(
    ("n", "ranking"),
    [
        (SLOW if n == 4096 or (n, form) == (1000, "hull") else pytest.param)(n, FORMS[form], id=f"{n}-{form}")
        for n in (5, 100, 1000, 4096)
        for form in FORMS
    ],
)
def test_float32_ranks_are_within_5e_7_n_and_long_ones_within_half(n, ranking):
    x = rows(n, np.float32)
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    run, tolerance = value_and_vjp(ranking), (5e-7 if n <= 100 else 2.5e-7) * n
    for eps in STRENGTHS if n < 4096 else (1e-4, 0.01, 1.0):
        found, gradient = run(x, eps, g)
        assert found.dtype == gradient.dtype == jnp.float32
        for kind, row, *pair in zip(KINDS, x, found, gradient, g, strict=True):
            # The gradient is that of the ranks up to a choice at ties of block means: there, both sides are right.
            rank, _, slope = expected(row, np.float32(eps), pair[2])
            np.testing.assert_allclose(pair[0], rank, rtol=0, atol=tolerance, err_msg=f"{kind} {eps}")
            agree = np.isclose(pair[1] * eps, slope * eps, rtol=0, atol=1e-4)
            assert agree.mean() >= (1.0 if n <= 200 else 0.98), f"{kind} {eps}: {1 - agree.mean():.3f} differ"


@both_forms
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_a_thousand_nearly_hard_float32_ranks_do_not_drift(ranking, eps):
    x = (np.random.default_rng(5).normal(size=(4, 1000)) * 3).astype(np.float32)
    found = ranking.soft_rank(x, "DESCENDING", eps)
    np.testing.assert_allclose(found, [expected(row, eps)[0] for row in x], rtol=0, atol=1e-3)


@both_forms
@pytest.mark.parametrize("eps", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("n", [5, 100])
def test_number_of_blocks(ranking, n, eps):
    x = rows(n, np.float32)[:3]
    blocks = [len(set(expected(row, eps)[1])) for row in x]
    np.testing.assert_array_equal(ranking.num_blocks(x, eps), blocks)


@both_forms
@pytest.mark.parametrize("operator", ["soft_rank", SLOW("soft_sort")])
def test_gradients_are_finite_differences(ranking, operator):
    x = np.random.default_rng(3).normal(size=(3, 7))
    first = jax.jit(lambda x, eps: getattr(ranking, operator)(x, "ASCENDING", eps))
    second = jax.jit(jax.grad(lambda x, eps: jnp.sum(first(x, eps) ** 3), (0, 1)))
    with jax.enable_x64(True):
        for eps in (0.05, 0.4, 20.0):
            check_grads(first, (x, eps), order=1, modes=("fwd", "rev"), eps=1e-6)
            check_grads(second, (x, eps), order=1, modes=("fwd", "rev"), eps=1e-6)


@both_forms
def test_gradients_of_isotonic_l2_are_finite_differences(ranking):
    x = np.random.default_rng(3).normal(size=(3, 7))
    with jax.enable_x64(True):
        check_grads(jax.jit(ranking.isotonic_l2), (x,), order=1, modes=("fwd", "rev"), eps=1e-6)


@pytest.mark.usefixtures("fast_compile")
@both_forms
def test_the_hessian_of_squared_ranks_is_twice_jacobian_squared(ranking):
    x = np.random.default_rng(4).normal(size=9)

    def ranks(x, eps):
        return ranking.soft_rank(x, regularization_strength=eps)

    def squares(x, eps):
        return jnp.sum(ranks(x, eps) ** 2)

    with jax.enable_x64(True):
        jacobians = [jax.jit(of(ranks)) for of in (jax.jacrev, jax.jacfwd)]
        hessians = [jax.jit(of(inner(squares))) for of in (jax.jacrev, jax.jacfwd) for inner in (jax.grad, jax.jacfwd)]
        for eps in (0.05, 0.4, 20.0):
            jacobian, forward = (np.asarray(f(x, eps)) for f in jacobians)
            assert np.abs(jacobian).max() > 0.01
            np.testing.assert_allclose(forward, jacobian, atol=1e-12)
            for hessian in hessians:
                np.testing.assert_allclose(hessian(x, eps), 2 * jacobian.T @ jacobian, atol=1e-10)


@pytest.mark.usefixtures("fast_compile")
@both_forms
def test_vmap_of_values_strengths_and_gradients(ranking):
    x = rows(8, np.float32)[:3].reshape(3, 2, 4)
    strengths = jnp.float32([0.02, 0.5, 9.0])

    def ranks(x, eps):
        return ranking.soft_rank(x, regularization_strength=eps)

    gradient = jax.grad(lambda x, eps: jnp.sum(ranks(x, eps) ** 2))
    one, one_gradient = jax.jit(ranks), jax.jit(gradient)
    found = jax.jit(jax.vmap(jax.vmap(ranks, (0, None)), (None, 0)))(x, strengths)
    for eps, every in zip(strengths, found, strict=True):
        np.testing.assert_allclose(every, one(x, eps), atol=1e-5)
    by_row = jax.jit(jax.vmap(gradient))(x, strengths)
    np.testing.assert_allclose(by_row, [one_gradient(*pair) for pair in zip(x, strengths, strict=True)], atol=1e-4)
    by_batch = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(ranks)(x, strengths) ** 2)))(x)
    np.testing.assert_allclose(by_batch, by_row, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.vmap(ranking.isotonic_l2))(x), jax.jit(ranking.isotonic_l2)(x), atol=1e-6)


@pytest.mark.usefixtures("fast_compile")
@both_forms
@pytest.mark.parametrize("operator", ["soft_rank", SLOW("soft_sort"), "isotonic_l2"])
def test_derivatives_of_a_vmap_are_those_of_the_batch(ranking, operator):
    operator = getattr(ranking, operator)
    x = rows(6, np.float32)[:3]
    tangent = x[::-1]

    def batch(x):
        return jnp.sum(operator(x) ** 3)

    def each(x):
        return jnp.sum(jax.vmap(operator)(x) ** 3)

    for derivative in (jax.grad, lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (tangent,))[1]):
        found, expected = jax.jit(derivative(each))(x), jax.jit(derivative(batch))(x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert np.abs(expected).max() > 0


@both_forms
@pytest.mark.parametrize("operator", ["soft_rank", "soft_sort", "isotonic_l2"])
def test_what_is_kept_for_the_gradient_grows_with_the_row(ranking, operator):
    x = rows(50, np.float32)[:3]
    _, pullback = jax.vjp(jax.jit(getattr(ranking, operator)), x)
    kept = [leaf.size for leaf in jax.tree.leaves(pullback)]
    assert 0 < max(kept) <= x.size
    assert len(kept) < 6


@pytest.mark.usefixtures("fast_compile")
@both_forms
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), SLOW((2, 1)), (2, 3, 4)])
def test_leading_shapes_and_empty_batches(ranking, shape):
    x = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    for operator in (ranking.soft_rank, ranking.soft_sort, ranking.isotonic_l2):
        value, gradient = jax.jit(jax.value_and_grad(lambda x, f=operator: (f(x).sum(), f(x)), has_aux=True))(x)
        assert value[1].shape == gradient.shape == shape
    assert ranking.num_blocks(x).shape == shape[:-1]
    if shape[-1] == 1:
        np.testing.assert_array_equal(ranking.soft_rank(x), np.ones(shape))
        np.testing.assert_array_equal(ranking.soft_sort(x), x)


@both_forms
def test_directions(ranking):
    x = np.float32([3.0, 1.0, 2.0])
    np.testing.assert_allclose(ranking.soft_rank(x, "ASCENDING", 1e-3), [3, 1, 2])
    np.testing.assert_allclose(ranking.soft_rank(x, "DESCENDING", 1e-3), [1, 3, 2])
    np.testing.assert_allclose(ranking.soft_rank(x, regularization_strength=1e-3), [3, 1, 2])
    np.testing.assert_allclose(ranking.soft_sort(x, regularization_strength=1e-3), [1, 2, 3])
    np.testing.assert_allclose(ranking.soft_sort(x, "ASCENDING", 1e-3), [1, 2, 3])
    np.testing.assert_allclose(ranking.soft_sort(x, "DESCENDING", 1e-3), [3, 2, 1])
    np.testing.assert_allclose(ranking.soft_sort(x, "ASCENDING", 1e6), [2, 2, 2], atol=1e-5)


@both_forms
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5, 50.0])
def test_soft_sort_is_a_projection(ranking, eps):
    x = np.random.default_rng(7).normal(size=(4, 30))
    z, w = np.arange(30, 0, -1) / eps, -np.sort(-x)
    fit = np.stack([z - isotonic_regression(z - row, increasing=False) for row in w])
    with jax.enable_x64(True):
        np.testing.assert_allclose(ranking.soft_sort(x, "DESCENDING", eps), fit, atol=1e-9)


@both_forms
def test_isotonic_l2_is_scikit_learns(ranking):
    y = np.random.default_rng(8).normal(size=(4, 60)) - np.arange(60) / 30
    fit = np.stack([isotonic_regression(row, increasing=False) for row in y])
    with jax.enable_x64(True):
        np.testing.assert_allclose(ranking.isotonic_l2(y), fit, atol=1e-12)
    np.testing.assert_allclose(ranking.isotonic_l2(y.astype(np.float32)), fit, atol=2e-6)


@both_forms
def test_nan_poisons_its_own_row_and_its_gradient(ranking):
    x = rows(12, np.float32)[:3]
    x[1, 4] = np.nan
    run, count = value_and_vjp(ranking), jax.jit(ranking.num_blocks)
    for eps in (0.01, 1.0, 1e3):
        for found in (*run(x, eps, np.ones_like(x)), count(x, eps)[:, None]):
            assert np.isnan(found[1]).all()
            assert np.isfinite(found[::2]).all()


@both_forms
@pytest.mark.parametrize("eps", [0.0, -1.0, np.nan])
def test_a_traced_strength_that_is_not_positive_makes_all_nan(ranking, eps):
    x = rows(12, np.float32)[:3]
    sort = jax.jit(ranking.soft_sort)
    for found in (*value_and_vjp(ranking)(x, eps, np.ones_like(x)), sort(x, regularization_strength=eps)):
        assert np.isnan(found).all()


@both_forms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_float32_ranks_and_gradients_in_its_own_dtype(ranking, dtype):
    x = jnp.asarray(rows(300)[:2], dtype)
    rank = ranking.soft_rank(x, "DESCENDING", 1e-3)
    assert rank.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(rank, [expected(row, np.float32(1e-3))[0] for row in wide], atol=1e-3)
    assert jax.grad(lambda x: ranking.soft_rank(x).sum())(x).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0], "UP"), ValueError, "direction='UP' is none of"),
        (([1.0, 2.0], "ASCENDING", 0.0), ValueError, "regularization_strength=0.0 must be positive"),
        (([1.0, 2.0], "ASCENDING", -1), ValueError, "regularization_strength=-1 must be positive"),
        (([1.0, 2.0], "ASCENDING", float("nan")), ValueError, "must be positive"),
        (([1.0, 2.0], "ASCENDING", 1e-39), ValueError, "=1e-39 must be positive, and normal in float32"),
        (([1.0, 2.0], "ASCENDING", np.ones(2)), ValueError, r"shape \(2,\); give a scalar, or use jax.vmap"),
        (([1, 2],), TypeError, "dtype int32; convert it first"),
        ((1.0,), ValueError, "values is a scalar"),
    ],
)
@pytest.mark.parametrize("operator", ["soft_rank", "soft_sort"])
def test_errors_name_the_argument_and_the_mend(operator, arguments, error, message):
    values, *rest = arguments
    with pytest.raises(error, match=message):
        getattr(ranking, operator)(jnp.asarray(values), *rest)


@both_forms
def test_strength_that_is_an_array_is_closed_over(ranking):
    eps, x = jnp.float32(0.1), jnp.asarray(rows(5, np.float32)[0])
    ranks = ranking.soft_rank(x, "DESCENDING", 0.1)
    np.testing.assert_allclose(jax.jit(lambda x: ranking.soft_rank(x, "DESCENDING", eps))(x), ranks, rtol=1e-6)
    assert jax.jit(lambda x: ranking.num_blocks(x, eps))(x) == ranking.num_blocks(x, 0.1)


@pytest.mark.parametrize("n", [1000, 20_000])
def test_outliers_cost_a_long_row_no_precision(n):
    x = np.linspace(0, 1e-3, n, dtype=np.float32)
    x[:2] = 0.45 * n, -n
    ranks, _ = expected(x, 1.0)
    np.testing.assert_allclose(ranking.soft_rank(x, "DESCENDING"), ranks, rtol=0, atol=3e-7 * n)


@pytest.mark.parametrize(("direction", "last"), [("ASCENDING", np.inf), ("DESCENDING", -np.inf)])
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_an_infinity_that_comes_last_is_a_mask(direction, last, eps):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)

    def ranks(values, masked):
        filled = jnp.pad(values, ((0, 0), (0, masked)), constant_values=last)
        return ranking.soft_rank(filled, direction, eps)[:, :7]

    (found, back), (expected, theirs) = (jax.vjp(lambda x, n=n: ranks(x, n), values) for n in (4, 0))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(back(expected)[0], theirs(expected)[0], atol=2e-5)


def test_an_infinite_strength_gives_the_mean():
    np.testing.assert_array_equal(ranking.soft_rank(jnp.array([3.0, 1.0, 2.0]), "ASCENDING", jnp.inf), [2.0] * 3)
    np.testing.assert_array_equal(ranking.soft_sort(jnp.array([3.0, 1.0, 2.0, 2.0]), "ASCENDING", jnp.inf), [2.0] * 4)


# The one-block fast path.


def test_common_offset_does_not_make_a_row_one_block():
    x = np.full(50, -1e7, np.float32)
    x[0] += 51
    np.testing.assert_array_equal(ranking.soft_rank(x, "ASCENDING", 2.0)[:2], [50, 25])
    assert ranking.num_blocks(x, 2.0) == 2


def test_one_block_rows_skip_sorting_and_pooling():
    x = np.random.default_rng(9).normal(size=(4, 50)).astype(np.float32)
    affine = 25.5 + (x - x.mean(-1, keepdims=True)) / 1.0
    sentinel = jnp.full_like(x, -7.0)
    ranking = patched(_rank_by_pooling=lambda x, eps: (sentinel, x.astype(int), x.astype(int)))
    np.testing.assert_allclose(ranking.soft_rank(x), affine, atol=1e-5)
    x[2, 0] = 500.0  # one ranked row, and the batch takes the other path
    np.testing.assert_array_equal(ranking.soft_rank(x, "DESCENDING"), sentinel)


@pytest.mark.parametrize("n", [2, 3, 10, 100, 200])
def test_the_one_block_test_claims_no_row_that_is_ranked(n):
    rng = np.random.default_rng(10)
    x = rng.normal(size=(4000, n)) * np.exp(rng.normal(size=(4000, 1)))
    x[:2000, 0] += rng.exponential(n / 4, size=2000)
    spread = x / x.std(-1, keepdims=True) * np.exp(rng.uniform(np.log(n**0.5 / 8), np.log(n), size=(4000, 1)))
    ordered = -np.sort(-(spread - spread.mean(-1, keepdims=True)))
    k = np.arange(1, n)
    truth = np.all(np.cumsum(ordered, -1)[:, :-1] <= k * (n - k) / 2, axis=-1)
    with jax.enable_x64(True):
        claimed = np.asarray(ranking._is_one_block(jnp.asarray(spread), jnp.ones((1, 1))))
    assert truth.any()
    assert (~truth).any()
    assert not (claimed & ~truth).any()
    assert claimed.sum() > truth.sum() / 4


# Where it runs.


def lowered(platform, *functions):
    """What jax gives the compiler for that platform, which need not be here."""
    x = jnp.ones((8, 10))
    return [jax.jit(f).trace(x).lower(lowering_platforms=(platform,)).as_text() for f in functions]


def squared(x):
    return jnp.sum(ranking.soft_rank(x, regularization_strength=0.1) ** 2)


def alignment(x):
    return losses.ranking_alignment(x, x[::-1], 0.1).sum()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_the_accelerators_program_has_no_loop_and_no_scatter(platform):
    programs = lowered(platform, ranking.soft_rank, jax.grad(squared), jax.grad(alignment), ranking.num_blocks)
    for program in programs:
        assert "sort" in program
        for operation in ("stablehlo.while", "stablehlo.scatter", "custom_call"):
            assert operation not in program


def test_the_cpus_program_has_the_fast_path_and_the_loop():
    (program,) = lowered("cpu", jax.grad(squared))
    assert "stablehlo.while" in program
    assert "stablehlo.case" in program or "stablehlo.if" in program


SHARDED = """
    import contextlib, json, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from rkd_jax import losses, ranking

    assert jax.device_count() == 2
    x = jnp.float32(np.random.default_rng(0).normal(size=(4, 12)) * 3)
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(ranking.soft_rank(x, regularization_strength=0.3) ** 2))(x)
    def loss(x):
        return losses.ranking_alignment(x, -x, 0.3)
    functions = dict(gradient=gradient, loss=loss, sort=ranking.soft_sort, blocks=ranking.num_blocks)
    auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    split = NamedSharding(auto, P("data"))
    found = {}
    for name, f in functions.items():
        alone = np.asarray(jax.jit(f)(x))
        ways = {
            "auto": (jax.jit(f, in_shardings=split, out_shardings=split), x),
            "explicit": (jax.jit(f), jax.device_put(x, NamedSharding(explicit, P("data")))),
            "set_mesh": (jax.jit(f), jax.device_put(x, NamedSharding(explicit, P("data")))),
            "shard_map": (jax.jit(jax.shard_map(f, mesh=auto, in_specs=P("data"), out_specs=P("data"))), x),
            "pmap": (jax.pmap(f), x.reshape(2, 2, 12)),
        }
        for way, (run, value) in ways.items():
            with jax.set_mesh(explicit) if way == "set_mesh" else contextlib.nullcontext():
                program = run.lower(value).compile().as_text()
                result = run(value)
            found[f"{way} {name}"] = {
                "collectives": sorted(set(re.findall(r"all-\\w+|reduce-scatter|collective-\\w+", program))),
                "shards": len(result.addressable_shards) if not result.is_fully_replicated else 1,
                "error": float(jnp.max(jnp.abs(np.asarray(result).reshape(alone.shape) - alone))),
            }
    # The same search finds the communication of what does communicate.
    program = jax.jit(lambda x: x.sum(), in_shardings=split).lower(x).compile().as_text()
    found["control"] = re.findall(r"all-\\w+|reduce-scatter|collective-\\w+", program)
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_sharded_batch_costs_no_communication():
    """In a child process with two CPU devices."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{FAST_FLAGS} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    sharded = json.loads(child.stdout.splitlines()[-1])
    assert sharded.pop("control")
    ways = ("auto", "explicit", "set_mesh", "shard_map", "pmap")
    functions = ("gradient", "loss", "sort", "blocks")
    assert {*sharded} == {f"{way} {function}" for way in ways for function in functions}
    for name, found in sharded.items():
        assert (found["collectives"], found["shards"]) == ([], 2), name
        assert found["error"] < 1e-5, name


# The statements of docs/soft_ranking.md, on a trained resnet56's logits of 64 CIFAR-100 test images.


@pytest.fixture(scope="module")
def teacher_logits():
    return np.load(Path(__file__).parent / "data" / "resnet56_logits.npz")["logits"]


def test_at_the_papers_strength_ranks_are_centred_logits(teacher_logits):
    x, n = teacher_logits, teacher_logits.shape[-1]
    assert (ranking.num_blocks(x, 1.0) == 1).all()
    np.testing.assert_allclose(ranking.soft_rank(x), (n + 1) / 2 + x - x.mean(-1, keepdims=True), atol=2e-5)


def test_at_the_papers_strength_l2_is_centred_mse_and_spearman_is_pearson(teacher_logits):
    t = teacher_logits
    s = 0.7 * t + np.random.default_rng(0).normal(size=t.shape).astype(np.float32)
    d = (s - s.mean(-1, keepdims=True)) - (t - t.mean(-1, keepdims=True))
    np.testing.assert_allclose(losses.ranking_alignment(s, t), np.mean(d**2, -1), rtol=1e-4)
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)]
    np.testing.assert_allclose(losses.ranking_alignment(s, t, kind="spearman"), 1 - np.asarray(correlation), atol=1e-5)
    ranked = losses.ranking_alignment(s, t, 0.1) * 0.1**2  # where something is ranked, it is another loss
    assert np.mean(ranked) < 0.8 * np.mean(d**2)


def test_every_teacher_row_passes_the_sort_free_test_at_the_papers_strength(teacher_logits):
    assert ranking._is_one_block(jnp.asarray(teacher_logits), jnp.ones((1, 1))).all()


@pytest.mark.parametrize(
    ("eps", "low", "high"), [(1.0, 1, 1), (0.3, 1, 3), (0.1, 10, 25), (0.01, 85, 96), (0.001, 97, 100)]
)
def test_ranking_begins_near_a_tenth(teacher_logits, eps, low, high):
    assert low <= ranking.num_blocks(teacher_logits, eps).mean() <= high


def test_where_a_row_begins_to_be_ranked(teacher_logits):
    ordered = -np.sort(-(teacher_logits - teacher_logits.mean(-1, keepdims=True)).astype(np.float64))
    k, n = np.arange(1, 100), 100
    onset = np.max(2 * np.cumsum(ordered, -1)[:, :-1] / (k * (n - k)), -1)
    count = jax.vmap(ranking.num_blocks)
    assert (count(teacher_logits, np.float32(onset * 1.001)) == 1).all()
    assert (count(teacher_logits, np.float32(onset * 0.999)) > 1).all()
    norm = np.linalg.norm(ordered, axis=-1)
    assert (onset <= norm / (np.sqrt(n * (n - 1)) / 2) + 1e-9).all()  # the inradius of the permutahedron


def test_the_documents_table_is_what_was_measured():
    docs = Path(__file__).resolve().parents[1] / "docs"
    found = json.loads((docs / "images" / "soft_ranking.json").read_text())
    text = " ".join((docs / "soft_ranking.md").read_text().split())
    for eps, row in found["by_eps"].items():
        percentiles = f"{row['p05_blocks']:.0f} to {row['p95_blocks']:.0f}"
        assert f"| {eps} | {row['mean_blocks']} | {percentiles} | {100 * row['one_block_fraction']:.2f} % |" in text
    onset = found["ranking_begins_at_eps"]
    assert f"{onset['p50']} for the median image, {onset['p1']} and {onset['p99']} at" in text
    assert f"{100 * found['top1']:.2f} % top-1" in text
    found = json.loads((docs / "images" / "soft_ranking_resnet32x4.json").read_text())
    begins, onset, blocks = onset, found["ranking_begins_at_eps"], found["by_eps"]
    readme = " ".join((docs.parent / "README.md").read_text().split())
    assert f"below eps = {begins['p50']}, the headline's teacher's below {onset['p50']}." in readme
    assert f"({100 * found['top1']:.2f} % top-1), " in text
    assert f"it is {onset['p50']}, {onset['p1']} and {onset['p99']:.3f}: at eps = 1 all of its rows are one" in text
    assert blocks["1.0"]["one_block_fraction"] == 1
    assert f"at 0.1 it has {blocks['0.1']['mean_blocks']} blocks in the mean" in text


# The rank scale.


@pytest.mark.parametrize("classes", [10, SLOW(100), 200])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0, 30.0])
def test_losses_in_units_of_logits_never_exceed_centred_mse_and_equal_it_in_one_block(eps, classes):
    s, t = 3 * np.random.default_rng(classes).normal(size=(2, 16, classes)).astype(np.float32)
    centred = np.mean(((s - s.mean(-1, keepdims=True)) - (t - t.mean(-1, keepdims=True))) ** 2, -1)
    found = losses.ranking_alignment(s, t, eps, rank_scale="logits")
    np.testing.assert_allclose(found, eps**2 * losses.ranking_alignment(s, t, eps), rtol=1e-4)
    assert (found <= centred * 1.001).all()
    assert (losses.ranking_alignment(s, t, eps, "l1", rank_scale="logits") <= np.sqrt(centred) * 1.001).all()
    if (ranking.num_blocks(s, eps) == 1).all() and (ranking.num_blocks(t, eps) == 1).all():
        np.testing.assert_allclose(found, centred, rtol=1e-3)
    np.testing.assert_allclose(
        losses.ranking_alignment(s, t, eps, "spearman", rank_scale="logits"),
        losses.ranking_alignment(s, t, eps, "spearman"), atol=1e-5,
    )  # fmt: skip


def test_the_method_has_the_rank_scale_and_its_default_is_the_papers():
    assert methods.create("ranking_alignment").rank_scale == "paper"
    assert methods.create("ranking_alignment", rank_scale="logits", eps=0.1).rank_scale == "logits"
    with pytest.raises(ValueError, match="rank_scale='log'"):
        methods.create("ranking_alignment", rank_scale="log")
    with pytest.raises(ValueError, match=r"^rank_scale='log' is none of 'paper', 'logits'"):
        losses.ranking_alignment(jnp.ones((1, 3)), jnp.ones((1, 3)), rank_scale="log")
