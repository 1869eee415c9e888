"""Every method file: one conformance test over all that are found, and each loss against plain NumPy in float64.

A new method is under test as soon as its file is there. REFERENCES asks for its formula in NumPy; the other tables hold
what its paper makes different from the rule.
"""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAST_COMPILE, ROOT, SLOW

from rkd_jax import methods
from rkd_jax.methods import __main__ as listing
from rkd_jax.methods import base, dot, kd
from rkd_jax.models import Cuts, Outputs

jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
CLASSES = 6
NAMES = methods.names()

# Methods that compare feature maps or embeddings: tests/test_feature_methods.py has their formulas. What holds for
# functions of the logits is not asked of them.
FEATURES = {
    "at", "cat_kd", "crd", "fcfd", "fitnets", "ickd", "norm", "nst", "pkt", "plus_kd", "reviewkd", "rkd", "sp", "vid",
}  # fmt: skip
# The student's logits at which the terms of distillation are least, where these are not the teacher's.
MATCH = {"ttm": lambda method, t: method.power * t}
# Terms that are not least there: a cross-entropy with the label.
NO_DISTANCE = {("nkd", "target")}
# Terms whose least value is not 0.
ENTROPY = {("nkd", "others")}
# Methods whose loss of an example depends on the others of its batch.
BATCHWISE = {"dist", "mlkd"}
# Terms of methods with `standardize` that are not computed from standardized logits.
NOT_STANDARDIZED = {("mlkd", "batch"), ("mlkd", "class")}
# Switches, each under the same tests as the method's defaults.
VARIANTS = [
    ("ranking_alignment", {"eps": 0.1}),
    ("ranking_alignment", {"kind": "l1"}),
    ("ranking_alignment", {"kind": "spearman", "eps": 0.2}),
    ("ranking_alignment", {"kd_weight": 0.9}),
    ("ctkd", {"standardize": True}),
    ("dkd", {"standardize": True, "temperature": 2.0}),
    ("rld", {"standardize": True}),
    ("rld", {"confidence_temperature": 2.5}),
    ("sortkd", {"standardize": True}),
    ("ttm", {"weighted": True}),
    ("mlkd", {"intended": True}),
    ("mlkd", {"standardize": True, "temperature": 2.0, "beta": 9.0}),
    ("dot", {"inner": "mlkd"}),
    ("dot", {"inner": "ctkd"}),
    ("dot", {"inner": "reviewkd"}),
    ("dot", {"inner": "norm"}),
    ("plus_kd", {"inner": "dkd"}),
    ("plus_kd", {"inner": "crld", "kd_weight": 0.5, "kd_temperature": 3.0}),
    ("plus_kd", {"inner": "at"}),
]
CASES = [(name, {}) for name in NAMES] + VARIANTS
OF_LOGITS = [(name, fields) for name, fields in CASES if fields.get("inner", name) not in FEATURES]


# What a method within "dot" does is under test on its own, and one method's standardized logits show another's.
LONG = [
    *(("dot", {"inner": inner}) for inner in ("ctkd", "reviewkd", "norm")),
    *((name, fields) for name, fields in VARIANTS if "standardize" in fields and name in ("dkd", "mlkd", "rld")),
]


def each(cases):
    ids = ["-".join([name, *map(str, fields.values())]) for name, fields in cases]
    cases = [SLOW(*case) if case in LONG else case for case in cases]
    return pytest.mark.parametrize(("name", "fields"), cases, ids=ids)


each_case, each_case_of_logits = each(CASES), each(OF_LOGITS)


def context(epoch):
    epoch = jnp.float32(epoch)
    return base.Context(jax.random.key(0), jnp.int32(epoch * 10), epoch, epoch / 100, resumed, resumed)


def resumed(stage, x):
    """What a network makes of a map, for a network that is its logits: other logits."""
    weights = jnp.sin(jnp.arange(x.shape[-1] * CLASSES, dtype=x.dtype)).reshape(x.shape[-1], CLASSES)
    return outputs(x.mean((-3, -2)) @ weights)


def outputs(logits, features=((8, 8, 4), (4, 4, 8), (2, 2, 16))):
    """A network's outputs with these logits; the rest follows from them, so that gradients reach everything."""
    summary = jnp.tanh(logits.mean(axis=-1, keepdims=True))
    maps = tuple(
        (summary * jnp.linspace(-1, 1, math.prod(shape), dtype=logits.dtype)).reshape(*logits.shape[:-1], *shape)
        for shape in features
    )
    embedding = jnp.tanh(logits @ jnp.cos(jnp.arange(CLASSES * 16, dtype=logits.dtype)).reshape(CLASSES, 16))
    class_maps = logits[..., None, None, :] * jnp.linspace(0.5, 1.5, 4, dtype=logits.dtype).reshape(2, 2, 1)
    last = jax.nn.relu(maps[-1])
    return Outputs(
        logits, tuple(map(jax.nn.relu, maps)), embedding, maps, class_maps, last, Cuts(maps, activated=False)
    )


def shapes(batch):
    return jax.eval_shape(outputs, jax.ShapeDtypeStruct((batch, CLASSES), jnp.float32))


def terms(method, s, t, y, epoch=30.0):
    """The method's terms for logits [B, C], or [V, B, C]: the sum over the views where it takes one at a time."""
    params, state = method.init(jax.random.key(1), shapes(y.shape[0]), shapes(y.shape[0]), 100)
    batch = {"label": y, "index": jnp.arange(y.shape[0])}
    if method.joint_views or s.ndim == 2:
        s, t = (x if x.ndim == 3 or not method.joint_views else jnp.stack([x, x]) for x in (s, t))
        views = [(s, t)]
    else:
        views = list(zip(s, t, strict=True))
    found = []
    for s_view, t_view in views:
        teacher = outputs(t_view) if method.needs_teacher else None
        one, state, metrics = method.loss(params, state, outputs(s_view), teacher, batch, context(epoch))
        assert not {*metrics} & {*one, "loss"}
        assert ("top1" in metrics) == ("norm" in methods.called(method))  # whose logits are not those of its student
        found.append(one)
    return jax.tree.map(lambda *values: sum(values), *found)


@functools.cache
def compiled(method):
    """(s, t, y, epoch) -> the terms, and the gradient of their sum."""

    def loss(s, t, y, epoch):
        found = terms(method, s, t, y, epoch)
        return sum(found.values()), found

    return jit(lambda *arguments: jax.grad(loss, has_aux=True)(*arguments)[::-1])


def evaluate(name, fields, s, t, y, epoch=30.0):
    return compiled(methods.create(name, **fields))(s, t, y, epoch)[0]


def distilled(name, found):
    return {term: value for term, value in found.items() if term != "label" and (name, term) not in NO_DISTANCE}


Y = jnp.array([0, 3, 5, 1])


def logits(seed, *shape):
    return 3 * jax.random.normal(jax.random.key(seed), (*shape, CLASSES))


# What every method keeps.


@each_case
def test_terms_are_float32_scalars_also_from_half_precision(name, fields):
    method = methods.create(name, **fields)
    found = jax.eval_shape(functools.partial(terms, method), logits(0, 4), logits(1, 4), Y)
    half = jax.eval_shape(
        functools.partial(terms, method), logits(0, 4).astype(jnp.bfloat16), logits(1, 4).astype(jnp.bfloat16), Y
    )
    assert "label" in found
    assert (len(found) > 1) == method.needs_teacher
    for value in (*found.values(), *half.values()):
        assert (value.shape, value.dtype) == ((), jnp.float32)


@each_case_of_logits
def test_distillation_is_least_at_the_teacher(name, fields):
    t = logits(0, 4)
    y = t.argmax(-1)  # a teacher that is right, as rld and sortkd ask
    matched = MATCH.get(name, lambda method, t: t)(methods.create(name, **fields), t)
    least = distilled(name, evaluate(name, fields, matched, t, y))
    for term, value in least.items():
        if (name, term) not in ENTROPY:
            np.testing.assert_allclose(value, 0, atol=1e-4, err_msg=term)
    for seed in range(2, 5):
        for size in (0.1, 3.0):
            other = distilled(name, evaluate(name, fields, matched + size * logits(seed, 4) / 3, t, y))
            for term in least:
                assert other[term] > least[term] + 1e-6, (term, size)


@each_case_of_logits
def test_a_constant_added_to_an_examples_logits_changes_nothing(name, fields):
    s, t = logits(0, 4), logits(1, 4)
    shift = jnp.array([[2.0], [-7.0], [0.5], [11.0]])
    expected = evaluate(name, fields, s, t, Y)
    for moved in (evaluate(name, fields, s + shift, t, Y), evaluate(name, fields, s, t - shift, Y)):
        for term in moved:
            np.testing.assert_allclose(moved[term], expected[term], rtol=1e-4, atol=1e-4, err_msg=term)


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if "standardize" in (field.name for field in dataclasses.fields(methods.load(name)))],
)
def test_standardized_logits_are_invariant_to_affine_maps(name):
    s, t = logits(0, 4), logits(1, 4)
    scale = jnp.array([[2.0], [0.3], [1.5], [7.0]])
    for mapped in ((scale * s - 3, t, Y), (s, scale * t + 5, Y)):
        for term, value in evaluate(name, {"standardize": True}, s, t, Y).items():
            if term != "label" and (name, term) not in NOT_STANDARDIZED:
                found, plain = (evaluate(name, {"standardize": switch}, *mapped)[term] for switch in (True, False))
                np.testing.assert_allclose(found, value, rtol=1e-4, err_msg=term)
                assert not np.isclose(plain, evaluate(name, {"standardize": False}, s, t, Y)[term], rtol=1e-2)


@each_case_of_logits
def test_examples_are_independent_where_they_should_be(name, fields):
    """The gradient of the first example does not depend on the others."""
    method = methods.create(name, **fields)
    s, t = logits(0, 4), logits(1, 4)
    _, gradient = compiled(method)(s, t, Y, 30.0)
    _, other = compiled(method)(s.at[1:].multiply(-2), t.at[1:].multiply(-0.3), Y.at[1:].set(2), 30.0)
    independent = methods.hyperparameters(method).get("inner", name) not in BATCHWISE
    assert np.allclose(gradient[0], other[0], rtol=1e-4, atol=1e-6) == independent


def extremes():
    one_hot = 1e4 * jax.nn.one_hot(Y, CLASSES)
    s, t = logits(0, 4), logits(1, 4)
    return {
        "confident and right": (one_hot, one_hot),
        "confident and apart": (jnp.roll(one_hot, 1, -1), one_hot),
        "confidently wrong teacher": (s, jnp.roll(one_hot, 2, -1)),
        "large": (1e4 * jnp.sign(s), 1e4 * jnp.sign(t)),
        "opposite": (1e4 * s, -1e4 * s),
        "constant": (jnp.full_like(s, 1e4), jnp.full_like(t, -1e4)),
        "an untrained student": (jnp.zeros_like(s), t),
        "tiny": (1e-20 * s, 1e-20 * t),
    }


@each_case
def test_finite_at_extreme_logits(name, fields):
    for extreme, (s, t) in extremes().items():
        found, gradient = compiled(methods.create(name, **fields))(s, t, Y, 30.0)
        assert all(jnp.isfinite(value) for value in found.values()), (extreme, found)
        assert jnp.isfinite(gradient).all(), extreme


@each_case
def test_one_view_and_two(name, fields):
    method = methods.create(name, **fields)
    s, t = logits(0, 2, 4), logits(1, 2, 4)
    if method.joint_views:
        views = jax.eval_shape(functools.partial(terms, method), s, t, Y)
        assert {*views} == {*jax.eval_shape(functools.partial(terms, method), s[0], t[0], Y)}
        with pytest.raises(ValueError, match=r"config\.views .* set config\.views to 'both'"):
            jax.eval_shape(functools.partial(terms, method), s[:1], t[:1], Y)
        with pytest.raises(ValueError, match=r"set config\.views to 'both'"):
            method.loss({}, {}, outputs(s[0]), outputs(t[0]), {"label": Y}, context(0.0))
    else:
        both, one = (jax.eval_shape(functools.partial(terms, method), *pair, Y) for pair in ((s, t), (s[0], t[0])))
        assert {*both} == {*one}


@pytest.mark.parametrize(
    ("name", "fields"),
    [SLOW(name, {}) if name in ("fcfd", "reviewkd") else (name, {}) for name in NAMES]
    + [("dot", {"inner": "mlkd"}), ("dot", {"inner": "ctkd"})],
)
def test_trains_and_compiles_once(name, fields):
    """Steps as steps.py makes them, of a student that is its own logits: no recompilation, and the loss falls."""
    method = methods.create(name, **fields)
    views = (2,) if method.joint_views else ()
    t, y = logits(1, *views, 8), jnp.arange(8) % CLASSES
    tx = method.wrap_optimizer(optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.02, 0.9)))
    traces = 0

    @jit
    def step(params, state, opt_state, rng, number):
        nonlocal traces
        traces += 1

        def parts(params):
            where = base.Context(rng, number, 40 + number / 10, number / 40, resumed, resumed)
            teacher = outputs(t) if method.needs_teacher else None
            batch = {"label": y, "index": jnp.arange(8)}
            found, new, _ = method.loss(params["method"], state, outputs(params["student"]), teacher, batch, where)
            rest = [value for term, value in found.items() if term != "label"]
            return (found["label"], sum(rest, start=jnp.float32(0))), new

        (label, distill), pull, new = jax.vjp(parts, params, has_aux=True)
        one, zero = jnp.float32(1), jnp.float32(0)
        grads = {"label": pull((one, zero))[0], "distill": pull((zero, one))[0]}
        extra = {"term_grads": grads} if method.per_term_gradients else {}
        updates, opt_state = tx.update(jax.tree.map(jnp.add, *grads.values()), opt_state, params, **extra)
        return optax.apply_updates(params, updates), new, opt_state, label + distill

    method_params, state = method.init(jax.random.key(0), shapes(8), shapes(8), 8)
    params = {"student": logits(0, *views, 8), "method": method_params}
    opt_state = tx.init(params)
    losses = []
    for number in range(40):
        params, state, opt_state, loss = step(params, state, opt_state, jax.random.key(number), jnp.int32(number))
        losses.append(float(loss))
    assert traces == step._cache_size() == 1
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# Against NumPy.


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def ce(s, y):
    return np.mean([-np.log(softmax(row)[label]) for row, label in zip(s, y, strict=True)])


def z_score(x):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-7)


def kd_term(s, t, T, standardize=False):
    if standardize:
        s, t = z_score(s), z_score(t)
    return T**2 * np.mean(kl(softmax(t / T), softmax(s / T)))


def reference_kd(m, s, t, y, epoch):
    return {"label": m["alpha"] * ce(s, y), "distill": m["beta"] * kd_term(s, t, m["temperature"], m["standardize"])}


def reference_ctkd(m, s, t, y, epoch):
    T = 1 + 20 / (1 + np.exp(-1.0))
    return {"label": 0.1 * ce(s, y), "distill": 0.9 * kd_term(s, t, T, m["standardize"])}


def reference_sortkd(m, s, t, y, epoch):
    new = np.empty_like(t)
    for row, label, out in zip(t, y, new, strict=True):
        classes = [label, *(i for i in np.argsort(-row) if i != label)]
        out[classes] = sorted(row, reverse=True)
    return reference_kd(m, s, new, y, epoch)


def reference_plus_kd(m, s, t, y, epoch):
    """Of methods of all views, s and t are [V, B, C]."""
    views = list(zip(s, t, strict=True)) if s.ndim == 3 else [(s, t)]
    term = sum(kd_term(*view, m["kd_temperature"]) for view in views)
    return REFERENCES[m["inner"]](m, s, t, y, epoch) | {"kd": m["kd_weight"] * term}


def reference_nkd(m, s, t, y, epoch):
    target, others = [], []
    for s_row, t_row, label in zip(s, t, y, strict=True):
        target.append(-softmax(t_row)[label] * np.log(softmax(s_row)[label]))
        rest = np.arange(CLASSES) != label
        T = m["temperature"]
        others.append(-(T**2) * np.sum(softmax(t_row[rest] / T) * np.log(softmax(s_row[rest] / T))))
    return {"label": ce(s, y), "target": np.mean(target), "others": m["gamma"] * np.mean(others)}


def bernoulli(p):
    return np.array([p, 1 - p])


def reference_dkd(m, s, t, y, epoch):
    tckd, nckd, T = [], [], m["temperature"]
    label = ce(s, y)
    if m["standardize"]:
        s, t = z_score(s), z_score(t)
    for s_row, t_row, c in zip(s / T, t / T, y, strict=True):
        tckd.append(T**2 * kl(bernoulli(softmax(t_row)[c]), bernoulli(softmax(s_row)[c])))
        rest = np.arange(CLASSES) != c
        nckd.append(T**2 * kl(softmax(t_row[rest]), softmax(s_row[rest])))
    warmup = min((math.floor(epoch) + 1) / 20, 1)
    return {
        "label": label,
        "target": warmup * m["alpha"] * np.mean(tckd),
        "others": warmup * m["beta"] * np.mean(nckd),
    }


def reference_rld(m, s, t, y, epoch):
    label = ce(s, y)
    if m["standardize"]:
        s, t = z_score(s), z_score(t)
    sure, masked, T, T_c = [], [], m["temperature"], m["confidence_temperature"]
    for s_row, t_row, c in zip(s, t, y, strict=True):
        p, q = softmax(t_row / T_c).max(), softmax(s_row / T_c)[c]
        sure.append(T_c**2 * kl(bernoulli(p), bernoulli(q)))
        below = t_row < t_row[c]
        masked.append(T**2 * kl(softmax(t_row[below] / T), softmax(s_row[below] / T)) if below.any() else 0)
    warmup = min((math.floor(epoch) + 1) / 20, 1)
    return {
        "label": label,
        "confidence": warmup * m["alpha"] * np.mean(sure),
        "correlation": warmup * m["beta"] * np.mean(masked),
    }


def reference_ttm(m, s, t, y, epoch):
    powers = softmax(t) ** m["power"]
    weights = powers.sum(-1) if m["weighted"] else 1.0
    match = kl(powers / powers.sum(-1, keepdims=True), softmax(s))
    return {"label": ce(s, y), "distill": m["beta"] * np.mean(weights * match)}


def reference_dist(m, s, t, y, epoch):
    def distance(a, b):
        return np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])

    T = m["temperature"]
    p, q = softmax(s / T), softmax(t / T)
    inter, intra = T**2 * distance(p, q), T**2 * distance(p.T, q.T)
    return {"label": ce(s, y), "inter": m["beta"] * inter, "intra": m["gamma"] * intra}


def reference_mlkd(m, s, t, y, epoch):
    (s_w, s_s), (t_w, t_s), beta = s, t, m["beta"]
    top, mass = softmax(t_w).max(-1), softmax(t_w).sum(0)
    examples, classes = top <= np.median(top), mass <= np.median(mass)
    instance = batch = per_class = 0
    for i, T in enumerate((m["temperature"], 3, 5, 2, 6)):

        def each_kd(s, t, T=T):
            s, t = (z_score(s), z_score(t)) if m["standardize"] else (s, t)
            return T**2 * kl(softmax(t / T), softmax(s / T))

        def gram(s, t, T=T):
            p, q = softmax(s / T), softmax(t / T)
            return (q @ q.T - p @ p.T) ** 2, (q.T @ q - p.T @ p) ** 2

        b_w, c_w = gram(s_w, t_w)
        b_s, c_s = gram(s_s, t_s)
        if m["intended"]:
            instance += np.sum(each_kd(s_w, t_w) * examples) / len(y) + each_kd(s_s, t_s).mean()
            batch += (b_w[examples].sum() + b_s[examples].sum()) / len(y)
            per_class += (c_w[classes].sum() + c_s.sum()) / CLASSES
        else:
            strong = (s_s, t_s) if i < 3 else (s_w, t_w)
            instance += each_kd(s_w, t_w).mean() * examples.mean() + each_kd(*strong).mean()
            batch += b_w.sum() / len(y) * examples.mean()
            per_class += c_w.sum() / CLASSES * classes.mean()
    label = m["alpha"] * (ce(s_w, y) + ce(s_s, y))
    return {"label": label, "instance": beta * instance, "batch": beta * batch, "class": beta * per_class}


def reference_crld(m, s, t, y, epoch):
    T = m["temperature"]

    def each(s, t):
        return T**2 * kl(softmax(t / T), softmax(s / T))

    sure_w = softmax(t[0]).max(-1) >= m["weak_threshold"]
    sure_s = softmax(t[1]).max(-1) >= m["strong_threshold"]
    return {
        "label": ce(s[0], y) + ce(s[1], y),
        "within": m["within_weight"] * np.mean(sure_w * (each(s[0], t[0]) + each(s[1], t[1]))),
        "cross": m["cross_weight"] * np.mean(sure_s * (each(s[1], t[0]) + each(s[0], t[1]))),
    }


def project(z, eps):
    """Descending soft ranks of a row: min-max form of the antitonic regression, no pooling."""
    order = np.argsort(-z)
    t = z[order] / eps
    target = t + np.arange(1, len(t) + 1)
    mean = np.array([[target[i : j + 1].mean() if i <= j else np.nan for j in range(len(t))] for i in range(len(t))])
    rank = np.empty_like(z)
    rank[order] = [min(mean[i, k:].max() for i in range(k + 1)) for k in range(len(t))] - t
    return rank


def reference_ranking_alignment(m, s, t, y, epoch):
    a, b = (np.array([project(row, m["eps"]) for row in x]) for x in (s, t))
    distance = {
        "l2": lambda: np.mean((a - b) ** 2),
        "l1": lambda: np.mean(np.abs(a - b)),
        "spearman": lambda: np.mean([1 - np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)]),
    }[m["kind"]]
    found = {"label": ce(s, y), "ranking": m["lam"] * distance()}
    return found | ({"distill": m["kd_weight"] * kd_term(s, t, m["temperature"])} if m["kd_weight"] else {})


REFERENCES = {
    "cross_entropy": lambda m, s, t, y, epoch: {"label": ce(s, y)},
    "crld": reference_crld,
    "ctkd": reference_ctkd,
    "dist": reference_dist,
    "dkd": reference_dkd,
    "dot": lambda m, *arguments: REFERENCES[m["inner"]](m, *arguments),
    "kd": reference_kd,
    "lskd": lambda m, *arguments: reference_kd(m | {"standardize": True}, *arguments),
    "mlkd": reference_mlkd,
    "nkd": reference_nkd,
    "plus_kd": reference_plus_kd,
    "ranking_alignment": reference_ranking_alignment,
    "rld": reference_rld,
    "sortkd": reference_sortkd,
    "takd": reference_kd,
    "ttm": reference_ttm,
}


@each_case_of_logits
def test_values_and_gradients_are_numpys(name, fields):
    assert name in REFERENCES, f"write {name}'s formula in NumPy into REFERENCES"
    method = methods.create(name, **fields)
    rng = np.random.default_rng(3)
    views = (2,) if method.joint_views else ()
    s, t = 2 * rng.normal(size=(2, *views, 5, CLASSES))
    y = rng.integers(CLASSES, size=5)
    reference = functools.partial(REFERENCES[name], methods.hyperparameters(method))
    for epoch in (0.3, 7.0, 50.0):
        with jax.enable_x64(True):
            found, gradient = compiled(method)(s, t, y, epoch)
        expected = reference(s, t, y, epoch)
        assert {*found} == {*expected}
        for term, value in found.items():
            np.testing.assert_allclose(value, expected[term], rtol=1e-5, atol=1e-7, err_msg=term)
    for i in np.ndindex(s.shape):
        h = np.zeros_like(s)
        h[i] = 1e-5
        slope = sum(reference(s + h, t, y, epoch).values()) - sum(reference(s - h, t, y, epoch).values())
        np.testing.assert_allclose(gradient[i], slope / 2e-5, rtol=1e-5, atol=1e-5)


# What is particular to one.


def test_ranking_alignment_takes_its_rank_scale_and_logs_the_blocks_of_either_side():
    fields = ({"eps": 0.5, "rank_scale": scale} for scale in ("logits", "paper"))
    found, paper = (evaluate("ranking_alignment", each, logits(0, 4), logits(1, 4), Y)["ranking"] for each in fields)
    np.testing.assert_allclose(found, 0.5**2 * paper, rtol=1e-5)

    s, t = outputs(1e-3 * logits(0, 4)), outputs(1e3 * logits(1, 4))
    method = methods.create("ranking_alignment")
    _, _, blocks = jit(lambda s, t: method.loss({}, {}, s, t, {"label": Y}, context(0.0)))(s, t)
    assert blocks == {"student_blocks": 1, "student_one_block": 1, "teacher_blocks": CLASSES}


def test_ctkds_temperature_is_trained_to_raise_the_loss():
    method = methods.create("ctkd")
    s, t, y = logits(0, 4), logits(1, 4), Y

    @jax.jit
    def loss(theta, epoch):
        return method.loss({"theta": theta}, {}, outputs(s), outputs(t), {"label": y}, context(epoch))

    _, _, metrics = loss(jnp.float32(1), 0.0)
    np.testing.assert_allclose(metrics["temperature"], 15.62, atol=0.005)

    def numerical(theta=1.0, h=1e-2):
        up, down = (float(loss(jnp.float32(theta + d), 0.0)[0]["distill"]) for d in (h, -h))
        return (up - down) / (2 * h)

    slope = jax.jit(jax.grad(lambda theta, epoch: sum(loss(theta, epoch)[0].values())))
    for epoch, factor in ((0.0, -0.02447), (0.9, -0.02447), (4.5, -0.5), (9.0, -1.0), (200.0, -1.0)):
        np.testing.assert_allclose(slope(jnp.float32(1), epoch), factor * numerical(), rtol=0.02)


@pytest.mark.parametrize("only", ["", "label", "distill"])
def test_dots_two_momenta_are_numpys(only):
    """And the plain momentum where one of the gradients never comes, as in the authors' code."""
    rng = np.random.default_rng(0)
    theta = start = rng.normal(size=3)
    v_ce, v_kd, m, delta, decay, rates = 0.0, 0.0, 0.9, 0.075, 5e-3, [0.1] * 4 + [0.01] * 4
    gradients = rng.normal(size=(8, 2, 3)) * {"": [[1], [1]], "label": [[1], [0]], "distill": [[0], [1]]}[only]
    for rate, (g_ce, g_kd) in zip(rates, gradients, strict=True):
        v_ce = (m if only else m - delta) * v_ce + g_ce + decay * theta
        v_kd = (m if only else m + delta) * v_kd + g_kd
        theta = theta - rate * (v_ce + v_kd)

    schedule = optax.piecewise_constant_schedule(0.1, {4: 0.1})
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, m))
    with jax.enable_x64(True):
        params = {"student": jnp.array(start)}
        wrapped = methods.create("dot", delta=delta).wrap_optimizer(tx)
        state = wrapped.init(params)
        for g_ce, g_kd in gradients:
            term_grads = {"label": {"student": jnp.array(g_ce)}, "distill": {"student": jnp.array(g_kd)}}
            grads = jax.tree.map(jnp.add, *term_grads.values())
            updates, state = wrapped.update(grads, state, params, term_grads=term_grads)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["student"], theta, rtol=1e-6)


def test_dot_asks_for_momentum_and_room_for_its_delta():
    with pytest.raises(ValueError, match=r"set config.momentum=0.9"):
        dot.two_momenta(optax.sgd(0.1), 0.075)
    with pytest.raises(ValueError, match=r"config.delta=0.2 .* take at most 0.1"):
        dot.two_momenta(optax.sgd(0.1, 0.9), 0.2)
    with pytest.raises(ValueError, match=r"set config.nesterov=False"):
        dot.two_momenta(optax.sgd(lambda step: 0.1 / (step + 1), 0.9, nesterov=True), 0.05)
    with pytest.raises(ValueError, match=r"config.inner has to be a method with a teacher"):
        methods.create("dot", inner="cross_entropy")
    with pytest.raises(ValueError, match=r"config.inner cannot be 'dot', .* per term; unset, it is 'kd'"):
        methods.create("dot", inner="dot")


def test_dots_inner_method_gets_its_fields_and_its_authors_values():
    method = methods.resolve("dot", {"inner": "dkd", "alpha": 3.0, "lam": None}, "cifar100", "vgg13", "MobileNetV2")
    assert methods.hyperparameters(method) == {
        "inner": "dkd", "delta": 0.075, "alpha": 3.0, "beta": 6.0, "temperature": 4.0, "warmup_epochs": 20.0,
        "standardize": False,
    }  # fmt: skip
    assert methods.create("dot", **methods.hyperparameters(method)) == method
    assert methods.create("dot", temperature=2.0).inner == methods.create("kd", temperature=2.0)
    assert methods.create("dot", inner=methods.create("dkd", beta=2.0)) == methods.create("dot", inner="dkd", beta=2.0)
    with pytest.raises(ValueError, match=r"config.beta=3.0 is set, but method 'dot' does not read it"):
        methods.create("dot", inner=methods.create("dkd", beta=2.0), beta=3.0)
    with pytest.raises(
        ValueError, match=r"lam=3.0 is set, but within 'dot' \(config.inner\), method 'kd' does not read it"
    ):
        methods.create("dot", lam=3.0)


def test_dot_deploys_and_wraps_the_optimizer_as_its_inner_method_does():
    class Inner(kd.Method):
        def deploy(self, network, images, variables, params, state):
            return f"{variables} as deployed"

        def wrap_optimizer(self, tx):
            return optax.chain(optax.add_decayed_weights(0.5), tx)

    method = dot.Method(Inner())
    assert method.deploy(None, None, "variables", {}, {}) == "variables as deployed"
    tx, params, nothing = method.wrap_optimizer(optax.sgd(0.1, 0.9)), jnp.float32(2), jnp.float32(0)
    grads = {"label": nothing, "distill": nothing}
    updates, _ = tx.update(nothing, tx.init(params), params, term_grads=grads)
    assert float(updates) == pytest.approx(-0.1 * 0.5 * 2)


def test_what_stands_within_another_has_no_kd_term_and_no_method_within_of_its_own():
    method = methods.resolve("plus_kd", {"kd_weight": 0.5}, "cifar100", "resnet56", "resnet20")
    assert methods.hyperparameters(method).items() >= {"inner": "crd", "kd_weight": 0.5, "num_negatives": 16384}.items()
    for name in ("norm", "ranking_alignment"):
        with pytest.raises(ValueError, match=f"^config.inner='{name}' has a KD term of its own; set it as config.meth"):
            methods.create("plus_kd", inner=name)
    with pytest.raises(ValueError, match=r"^config.inner cannot be 'plus_kd', which has one of its own; .* 'kd'"):
        methods.create("dot", inner="plus_kd")
    with pytest.raises(ValueError, match=r"^config.inner has to be a method with a teacher; .* 'crd'"):
        methods.create("plus_kd", inner="cross_entropy")


def test_takds_chain():
    method = methods.resolve("takd", {}, teacher="resnet56", student="resnet20")
    assert method.links("resnet56", "resnet20") == [("resnet56", "resnet32"), ("resnet32", "resnet20")]
    method = methods.resolve("takd", {"assistant": "resnet44 > resnet32"}, teacher="resnet56", student="resnet20")
    assert [student for _, student in method.links("resnet56", "resnet20")] == ["resnet44", "resnet32", "resnet20"]
    with pytest.raises(ValueError, match=r"config.assistant is not set.* resnet8>resnet20"):
        methods.create("takd").links("resnet8", "resnet20")


def test_lskd_is_kd_and_kd_is_sortkd_where_the_teacher_is_right():
    s, t = logits(0, 4), logits(1, 4)
    y = t.argmax(-1)
    fields = {"alpha": 0.1, "beta": 9.0, "temperature": 2.0, "standardize": True}
    assert evaluate("lskd", {}, s, t, y) == evaluate("kd", fields, s, t, y)
    assert evaluate("sortkd", {}, s, t, y) == evaluate("kd", {}, s, t, y)
    assert evaluate("sortkd", {}, s, t, y * 0) != evaluate("kd", {}, s, t, y * 0)


def test_warmup_counts_epochs_from_1():
    assert [float(context(epoch).warmup(20.0)) for epoch in (0.0, 0.9, 1.0, 18.9, 19.0, 100.0)] == pytest.approx(
        [0.05, 0.05, 0.1, 0.95, 1, 1]
    )
    assert context(0.0).warmup(0.0) == 1


# Choosing a method, and setting its fields.


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        ValueError, match=r"config.method='dkdd' is no method; did you mean 'dkd'\? .*ranking_alignment"
    ):
        methods.create("dkdd")
    with pytest.raises(ValueError, match=r"config.method='KD' is no method; did you mean 'kd'\?"):
        methods.create("KD")
    with pytest.raises(ValueError, match=r"config.method='zzz' is no method\. There are"):
        methods.create("zzz")
    with pytest.raises(ValueError, match=r"^config.inner='dkdd' is no method; did you mean 'dkd'\?"):
        methods.create("dot", inner="dkdd")
    with pytest.raises(
        ValueError, match=r"config.tempereture=2.0 .* 'kd' does not read it; did you mean 'temperature'"
    ):
        methods.create("kd", tempereture=2.0)
    with pytest.raises(ValueError, match=r"config.lam=5.0 .* 'cross_entropy' does not read it\. .* no hyper-parameter"):
        methods.resolve("cross_entropy", {"lam": 5.0, "eps": None})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("kd", {"temperature": 0.0}, "config.temperature=0.0 has to be above 0; unset, it is 4.0"),
        ("kd", {"temperature": "4"}, "config.temperature='4' has to be a number; unset, it is 4.0"),
        ("kd", {"temperature": None}, "config.temperature=None has to be a number"),
        ("kd", {"temperature": [4.0]}, "config.temperature=[4.0] has to be a number"),
        ("kd", {"standardize": "False"}, "config.standardize='False' has to be True or False; unset, it is False"),
        ("fitnets", {"hint_stage": 1.5}, "config.hint_stage=1.5 has to be a whole number"),
        ("kd", {"temperature": float("nan")}, "config.temperature=nan has to be finite"),
        ("kd", {"beta": float("inf")}, "config.beta=inf has to be finite"),
        ("ranking_alignment", {"eps": -1.0}, "config.eps=-1.0 has to be above 0; unset, it is 1.0"),
        ("ranking_alignment", {"kind": "l3"}, "config.kind='l3' has to be one of 'l2', 'l1', 'spearman'"),
        ("dkd", {"warmup_epochs": -1.0}, "config.warmup_epochs=-1.0 has to be 0 or above"),
        ("kd", {"beta": -1.0}, "config.beta=-1.0 has to be 0 or above; unset, it is 0.9"),
        ("ranking_alignment", {"lam": -5.0}, "config.lam=-5.0 has to be 0 or above"),
        ("crld", {"weak_threshold": 90.0}, "config.weak_threshold=90.0 has to be 0 to 1; unset, it is 0.9"),
        ("crd", {"bank_momentum": 2.0}, "config.bank_momentum=2.0 has to be 0 to 1"),
        ("dot", {"temperature": 0.0}, "config.temperature=0.0 has to be above 0"),
    ],
)
def test_bad_hyper_parameters(name, fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        methods.create(name, **fields)


def test_authors_values_apply_where_the_config_leaves_a_field_unset():
    beta = lambda *pair, **given: methods.resolve("dkd", given, "cifar100", *pair).beta  # noqa: E731
    assert beta("resnet32x4", "resnet8x4") == 8
    assert beta("resnet56", "resnet20") == 2
    assert beta("ResNet50", "MobileNetV2") == 8
    assert beta("vgg13", "MobileNetV2") == 6
    assert beta("resnet56", "resnet20", beta=3.0) == 3
    assert beta("resnet56", "resnet20", beta=None) == 2
    assert methods.resolve("ranking_alignment", {}, "tiny_imagenet", "ResNet18", "MobileNetV2").lam == 10
    assert methods.resolve("crld", {}, "tiny_imagenet").temperature == 2


def test_a_pairs_values_precede_a_students_and_a_data_sets(monkeypatch):
    tuned = {
        "digits": {"alpha": 1.0, "beta": 1.0, "temperature": 1.0},
        "b": {"alpha": 2.0, "beta": 2.0},
        "a>b": {"alpha": 3.0},
        "misspelt": {"bta": 1.0},
    }
    monkeypatch.setattr(methods.load("kd"), "tuned", tuned)
    with pytest.raises(ValueError, match=r"kd\.tuned has 'bta', which is no field of it; did you mean 'beta'"):
        methods.resolve("kd", {}, "misspelt")
    assert methods.resolve("kd", {}, "digits", "A", "B") == methods.create("kd", alpha=3.0, beta=2.0, temperature=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_tuned_values_are_fields_of_the_method(name):
    for values in methods.load(name).tuned.values():
        assert values
        methods.create(name, **values)
    assert all(place == place.lower() for place in methods.load(name).tuned)


def test_fields_are_what_flags_can_set_and_defaults_have_their_type():
    assert {"lam", "eps", "temperature", "inner", "assistant"} <= {*methods.fields()}
    assert set(methods.fields().values()) <= {float, int, bool, str}
    for name in NAMES:
        for field, value in methods.hyperparameters(methods.create(name)).items():
            assert type(value) is methods.fields()[field], (name, field)


MINE = '''
"""Logit matching (Ba and Caruana, 2014, arXiv:1312.6184).

L = CE(s, y) + strength * mean (s - t)^2
"""

import dataclasses

from rkd_jax import losses, methods


@dataclasses.dataclass(frozen=True)
class Method(methods.Distiller):
    strength: float = 0.1  # weight of the distance

    def loss(self, params, state, student, teacher, batch, context):
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        s, t = losses.promote(student.logits), losses.promote(teacher.logits)
        return {"label": label, "distance": self.strength * ((s - t) ** 2).mean()}, state, {}
'''


def test_a_method_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_methods.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    method = methods.resolve("my_methods:Method", {"strength": 0.5, "lam": None}, "digits")
    s, t, y = logits(0, 4), logits(1, 4), Y
    np.testing.assert_allclose(terms(method, s, t, y)["distance"], 0.5 * np.mean((s - t) ** 2), rtol=1e-6)
    assert methods.fields("my_methods:Method")["strength"] is float
    assert methods.create("dot", inner="my_methods:Method", strength=2.0).inner.strength == 2
    assert methods.hyperparameters(methods.create("dot", inner="my_methods:Method"))["inner"] == "my_methods:Method"
    listing.main(["my_methods:Method"])
    assert "config.strength = 0.1: weight of the distance" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"config.method='my_methods:Mine' cannot be imported"):
        methods.load("my_methods:Mine")
    with pytest.raises(ValueError, match=r"config.method='my_methods:losses' is a module, which cannot"):
        methods.load("my_methods:losses")
    with pytest.raises(ValueError, match=r"config.method='no_such:Method' cannot be imported: No module"):
        methods.load("no_such:Method")
    parts = MINE.partition("@dataclasses")
    for name, change, complaint in (
        ("plain", ("@dataclasses.dataclass(frozen=True)", ""), "has 'strength', which is no field; write @dataclass"),
        ("bare", (": float = 0.1", ": float"), "has 'strength' without a default; give it one"),
        ("idle", ("def loss", "def lost"), "has no loss; write one"),
        (
            "short",
            ("state, student, teacher, batch, context", "batch"),
            r"has a loss that .*; write def loss\(self, pa",
        ),
        ("thawed", ("(frozen=True)", ""), ": thawed cannot be imported, mend it there: cannot inherit non-frozen"),
        ("torn", ("class Method(", "class Method(("), ": torn cannot be imported, mend it there: "),
    ):
        (tmp_path / f"{name}.py").write_text(parts[0] + (parts[1] + parts[2]).replace(*change))
        with pytest.raises(ValueError, match=rf"^config.method='{name}:Method'\s?{complaint}"):
            methods.load(f"{name}:Method")
    (tmp_path / "future.py").write_text(
        "from __future__ import annotations\n" + MINE.replace("strength", "temperature")
    )
    assert methods.resolve("future:Method", {"temperature": 2.0}).temperature == 2
    assert methods.fields("future:Method")["temperature"] is float
    (tmp_path / "unset.py").write_text(MINE.replace("float = 0.1", "float | None = None"))
    assert methods.fields("unset:Method")["strength"] is float
    assert methods.resolve("unset:Method", {"strength": 2.0}).strength == 2
    (tmp_path / "several.py").write_text(MINE.replace("float = 0.1", "tuple[float, ...] = (0.1,)"))
    assert methods.fields("several:Method")["strength"] is tuple
    (tmp_path / "either.py").write_text(MINE.replace("float = 0.1", "float | str = 0.1"))
    with pytest.raises(ValueError, match=r"^config.method='either:Method' has 'strength' as float \| str, which"):
        methods.load("either:Method")
    (tmp_path / "whole.py").write_text(MINE.replace("strength: float = 0.1", "temperature: int = 4"))
    with pytest.raises(
        ValueError, match=r"^config.method='whole:Method' has 'temperature' as int, which others have as f"
    ):
        methods.fields("whole:Method")
    (tmp_path / "unknown.py").write_text("from __future__ import annotations\n" + MINE.replace(": float", ": flote"))
    with pytest.raises(ValueError, match=r"has a field of a type that is not defined: name 'flote'"):
        methods.load("unknown:Method")
    with pytest.raises(ValueError, match=r"^config.inner='optax:adamw' is no distillation method"):
        methods.create("dot", inner="optax:adamw")
    with pytest.raises(ValueError, match=r"^config.inner='no_such:Method' cannot be imported"):
        methods.create("dot", inner="no_such:Method")


# The listing and the documentation.


def test_every_method_says_what_it_is():
    for name in NAMES:
        paper, formula, _ = listing.page(name)
        assert formula.startswith("L = "), name
        assert not methods.load(name).needs_teacher or re.search(r"\b20\d\d\b", paper), f"{name} names no paper"
        assert all(listing.comments(methods.load(name)).values()), f"{name} has a field without a comment"


def test_the_command_lists_every_method_and_describes_those_it_is_given():
    command = [sys.executable, "-m", "rkd_jax.methods"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert re.findall(r"^(\w+)  ", text, re.MULTILINE) == list(NAMES)
    assert all(listing.page(name)[0] in " ".join(text.split()) for name in NAMES)
    text = subprocess.run([*command, *NAMES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^\w+$", text, re.MULTILINE) == list(NAMES)
    assert "config.temperature = 4.0: T" in text
    assert "vgg13>mobilenetv2: beta = 6.0" in text


def test_the_command_names_what_its_user_wrote():
    for name, complaint in (("nosuch", "is no method"), ("no_such:Method", "cannot be imported")):
        with pytest.raises(SystemExit, match=f"^Error: NAME='{name}' {complaint}"):
            listing.main([name])


def test_the_documentation_is_up_to_date(capsys):
    listing.main(["--markdown"])
    table = capsys.readouterr().out.strip()
    page = (ROOT / "docs" / "methods.md").read_text()
    assert table in page, "write the output of `python -m rkd_jax.methods --markdown` into docs/methods.md"
    _, example, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the others: tests/test_feature_methods.py
    assert textwrap.dedent(example).strip() == MINE.strip()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        SLOW(*case) if case in VARIANTS or case[0] in ("fcfd", "ickd", "norm", "reviewkd", "vid") else case
        for case in CASES
        if not methods.create(case[0], **case[1]).joint_views
    ],
)
def test_views_at_once_are_views_in_turn(name, fields):
    """As on a GPU, where a method without a state takes all views by vmap."""
    method = methods.create(name, **fields)
    rng = np.random.default_rng(3)
    s, t = rng.normal(size=(2, 2, 5, CLASSES)).astype(np.float32)
    y = jnp.arange(5) % CLASSES
    params, state = method.init(jax.random.key(1), shapes(5), shapes(5), 100)

    def loss(s, t):
        one = outputs(s), outputs(t) if method.needs_teacher else None
        found, _, metrics = method.loss(params, state, *one, {"label": y, "index": y}, context(30.0))
        return sum(found.values()), metrics

    grad = jax.value_and_grad(loss, has_aux=True)
    together, alone = jit(jax.vmap(grad))(s, t), jit(grad)
    for i in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            jax.tree.map(lambda x, i=i: x[i], together),
            alone(s[i], t[i]),
        )
