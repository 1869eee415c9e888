"""The methods that compare feature maps or embeddings, each against its formula in PyTorch, in float64.

tests/test_methods.py has what every method keeps. A method of this kind is named there in FEATURES, and here in
REFERENCES.
"""

import dataclasses
import functools
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SLOW
from test_methods import FEATURES, context, jit
from test_train import assert_same, records

from rkd_jax import experiment, methods, models, steps, train
from rkd_jax.checkpoint import Checkpoints, load_network
from rkd_jax.methods import _maps, crd, fcfd, fitnets, norm
from rkd_jax.models import LAST, Cuts, Outputs
from rkd_jax.report import paper

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
pytestmark = pytest.mark.usefixtures("fast_compile")

BATCH, CLASSES, EXAMPLES = 4, 6, 9
MAPS = {  # [side, channels] from the stem on
    "student": ((8, 3), (8, 5), (4, 6), (2, 10)),
    "teacher": ((8, 4), (8, 6), (4, 8), (2, 12)),
    "smaller teacher": ((8, 4), (4, 6), (2, 8), (2, 12)),
    "larger teacher": ((8, 4), (8, 6), (8, 8), (4, 12)),
    "smallest teacher": ((8, 4), (4, 6), (2, 8), (1, 12)),
    "activated student's teacher": ((8, 4), (4, 6), (4, 8), (4, 12)),
    "longer teacher": ((8, 4), (8, 7), (8, 6), (4, 8), (2, 12)),
}
Y, INDEX = np.array([0, 3, 5, 3], np.int32), np.array([7, 2, 0, 5], np.int32)


def outputs(seed, maps):
    """Random outputs of a network, float64."""
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(BATCH, side, side, channels)) for side, channels in maps]
    class_maps = rng.normal(size=(BATCH, maps[-1][0], maps[-1][0], CLASSES))
    side, channels = maps[-1]  # a network may have layers of other channels behind its last stage
    last = np.maximum(rng.normal(size=(BATCH, side, side, channels + 3)), 0)
    relu = tuple(np.maximum(x, 0) for x in features)
    cuts = Cuts(tuple(features), activated=seed == 1)  # the teacher's
    return Outputs(class_maps.mean((1, 2)), relu, last.mean((1, 2)), tuple(features), class_maps, last, cuts)


def rest(seed, maps):
    """What follows a map in such a network, in JAX and in PyTorch: averages of squares, a matrix and tanh a stage."""
    rng = np.random.default_rng(seed)
    channels = [channels for _, channels in maps]
    steps = [1, *(before // after for (before, _), (after, _) in itertools.pairwise(maps))]
    weights = [None, *(rng.normal(size=pair) for pair in itertools.pairwise(channels))]
    heads = {
        len(maps) - 1: rng.normal(size=(channels[-1], CLASSES)),
        LAST: rng.normal(size=(channels[-1] + 3, CLASSES)),
    }

    def in_jax(stage, x):
        found = [jnp.zeros(0)] * len(maps)
        for i in range(stage + 1, len(maps)) if stage != LAST else ():
            b, h, w, k = x.shape
            x = x.reshape(b, h // steps[i], steps[i], w // steps[i], steps[i], k).mean((2, 4))
            found[i] = x = jnp.tanh(x @ weights[i])
        logits = x.mean((1, 2)) @ heads[LAST if stage == LAST else len(maps) - 1]
        return Outputs(logits, cuts=Cuts(found, activated=False))

    def in_torch(stage, x):
        found = [None] * len(maps)
        for i in range(stage + 1, len(maps)) if stage != LAST else ():
            found[i] = x = torch.tanh(
                torch.einsum("bkhw,kl->blhw", F.avg_pool2d(x, steps[i]), torch.tensor(weights[i]))
            )
        return x.mean((2, 3)) @ torch.tensor(heads[LAST if stage == LAST else len(maps) - 1]), found

    return in_jax, in_torch


def where(epoch, kind="teacher"):
    """A context whose networks go on as `rest` has it."""
    student, teacher = rest(2, MAPS["student"])[0], rest(3, MAPS[kind])[0]
    return context(epoch)._replace(resume_student=student, resume_teacher=teacher)


def shapes(found):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), found)


# The formulas.


def batch_norm(x, params):
    return F.batch_norm(x, None, None, params["scale"], params["bias"], training=True)


def dense(x, params):
    """A 1x1 convolution."""
    kernel, bias = params["kernel"], params.get("bias")
    return F.conv2d(x, kernel.T[:, :, None, None], bias)


def resize(s, t):
    side = min(s.shape[-1], t.shape[-1])
    return [F.adaptive_avg_pool2d(x, side) for x in (s, t)]


def reference_fitnets(m, params, s, t):
    s, t = (side.features[m["hint_stage"]] for side in (s, t))
    here, there = s.shape[-1], t.shape[-1]
    if 2 * here == there:
        kernel = params["ConvTranspose_0"]["kernel"].permute(2, 3, 0, 1).flip(2, 3)
        found = F.conv_transpose2d(s, kernel, stride=2, padding=1)
    else:
        kernel = params["Conv_0"]["kernel"].permute(3, 2, 0, 1)
        found = F.conv2d(s, kernel, stride=2, padding=1) if here == 2 * there else F.conv2d(s, kernel)
    return {"hint": m["beta"] * F.mse_loss(F.relu(batch_norm(found, params["BatchNorm_0"])), t)}


def stages(s, t, kind="features"):
    ours, theirs = s.features[1:], getattr(t, kind)[1:]
    count = min(len(ours), len(theirs))
    return list(zip(ours[-count:], theirs[-count:], strict=True))


def reference_at(m, params, s, t):
    def attention(x):
        return F.normalize(x.pow(2).mean(1).reshape(BATCH, -1))

    distances = [F.mse_loss(*map(attention, resize(a, b))) for a, b in stages(s, t)]
    return {"attention": m["beta"] * sum(distances)}


def reference_sp(m, params, s, t):
    flat = [x.permute(0, 2, 3, 1).reshape(BATCH, -1) for x in stages(s, t)[-1]]
    gram_s, gram_t = (F.normalize(x @ x.T) for x in flat)
    return {"similarity": m["beta"] * (gram_t - gram_s).pow(2).sum() / BATCH**2}


def reference_nst(m, params, s, t):
    total = 0
    for stage in stages(s, t):
        a, b = (F.normalize(x.flatten(2), dim=2) for x in resize(*stage))
        pairs = [(a[:, :, None] * a[:, None]), (b[:, :, None] * b[:, None]), (a[:, :, None] * b[:, None])]
        own, theirs, across = (x.sum(-1).pow(2).mean() for x in pairs)
        total = total + own + theirs - 2 * across
    return {"selectivity": m["beta"] * total}


def reference_pkt(m, params, s, t):
    s, t = ((1 + F.cosine_similarity(x.embedding[:, None], x.embedding[None], dim=2)) / 2 for x in (s, t))
    s, t = (x / x.sum(1, keepdim=True) for x in (s, t))
    return {"probabilities": m["beta"] * (t * ((t + 1e-7).log() - (s + 1e-7).log())).sum() / BATCH**2}


def reference_rkd(m, params, s, t):
    """Pair by pair and triple by triple, those of an example with itself left out: they add nothing but their count."""
    pairs = list(itertools.permutations(range(BATCH), 2))
    e = [x.embedding for x in (s, t)]
    lengths = [torch.stack([(x[i] - x[j]).norm() for i, j in pairs]) for x in e]
    s_length, t_length = (x / x.mean() for x in lengths)
    distance = F.smooth_l1_loss(s_length, t_length, reduction="sum") / BATCH**2
    triples = [(i, j, k) for i, j in pairs for k in range(BATCH) if k not in (i, j)]
    s_angle, t_angle = (
        torch.stack([F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0) for i, j, k in triples]) for x in e
    )
    angle = F.smooth_l1_loss(s_angle, t_angle, reduction="sum") / BATCH**3
    return {"distance": m["distance_weight"] * distance, "angle": m["angle_weight"] * angle}


def reference_ickd(m, params, s, t):
    s, t = s.last_map, t.last_map
    s = batch_norm(dense(s, params["Dense_0"]), params["BatchNorm_0"])
    gram_s, gram_t = (F.normalize(x.flatten(2) @ x.flatten(2).transpose(1, 2), dim=2) for x in (s, t))
    return {"correlation": m["beta"] * (gram_t - gram_s).pow(2).sum() / (t.shape[1] * BATCH)}


def reference_vid(m, params, s, t):
    total = 0
    for own, stage in zip(params, stages(s, t), strict=True):
        x, target = resize(*stage)
        for i in range(3):
            x = dense(F.relu(x) if i else x, own["mean"][f"Dense_{i}"])
        v = torch.log(1 + torch.exp(own["variance"]))[:, None, None] + 1e-5
        total = total + (0.5 * ((x - target) ** 2 / v + torch.log(v))).mean()
    return {"information": m["beta"] * total}


def reference_cat_kd(m, params, s, t):
    cells = [F.adaptive_avg_pool2d(side.class_maps, m["map_resolution"]) for side in (s, t)]
    if m["normalize_maps"]:
        cells = [F.normalize(x, dim=(2, 3)) for x in cells]
    return {"class_maps": m["beta"] * F.mse_loss(*cells)}


def reference_reviewkd(m, params, s, t):
    pairs = [*stages(s, t, "preactivations"), (s.embedding[:, :, None, None], t.embedding[:, :, None, None])][::-1]
    dense_names, norms = iter(range(100)), iter(range(100))
    below, total = None, 0
    for level, (x, target) in enumerate(pairs):
        x = dense(x, params[f"Dense_{next(dense_names)}"])
        x = batch_norm(x, params[f"BatchNorm_{next(norms)}"])
        if below is not None:
            below = F.interpolate(below, x.shape[-2:], mode="nearest")
            mix = torch.sigmoid(dense(torch.cat([x, below], 1), params[f"Dense_{next(dense_names)}"]))
            x = x * mix[:, :1] + below * mix[:, 1:]
        below = F.interpolate(x, target.shape[-2:], mode="nearest")
        found = F.conv2d(below, params[f"Conv_{level}"]["kernel"].permute(3, 2, 0, 1), padding=1)
        found = batch_norm(found, params[f"BatchNorm_{next(norms)}"])
        loss, weight, weights = F.mse_loss(found, target), 1.0, 1.0
        for side in (4, 2, 1):
            if side < found.shape[-1]:
                weight /= 2
                weights += weight
                loss = loss + weight * F.mse_loss(*(F.adaptive_avg_pool2d(y, side) for y in (found, target)))
        total = total + loss / weights
    return {"review": m["beta"] * min(4 / 20, 1) * total}  # the fourth epoch


def reference_crd(m, params, s, t):
    """In the first batch, with all examples but those of the batch that have the same label."""
    state = methods.create("crd", **m).init(jax.random.key(0), shapes(S), shapes(T), EXAMPLES)[1]
    bank = {side: torch.from_numpy(np.asarray(state[side]["bank"], np.float64)) for side in ("student", "teacher")}
    found = {}
    for side, other, own in (("student", "teacher", s), ("teacher", "student", t)):
        layer = params[side]["Dense_0"]
        e = F.normalize(own.embedding @ layer["kernel"] + layer["bias"])
        p = torch.exp(e @ bank[other].T / m["temperature"])
        rows = []
        for i in range(BATCH):
            same = [j for j in range(EXAMPLES) if j in INDEX and Y[list(INDEX).index(j)] == Y[i]]
            rows.append((p[i, INDEX[i]], p[i, [j for j in range(EXAMPLES) if j not in same]]))
        taken = torch.cat([torch.cat([positive[None], negative]) for positive, negative in rows])
        partition = taken.mean().detach() * EXAMPLES
        total = 0
        for positive, negative in rows:
            noise = len(negative) / EXAMPLES
            positive, negative = positive / partition, negative / partition
            total = total - torch.log(positive / (positive + noise + 1e-7))
            total = total - torch.log(noise / (negative + noise + 1e-7)).sum()
        found[f"{side}_contrast"] = m["beta"] * total / BATCH
    return found


def reference_plus_kd(m, params, s, t):
    own = {name: value for name, value in m.items() if name not in ("inner", "kd_weight", "kd_temperature")}
    term = m["kd_weight"] * kd(s.logits, t.logits, m["kd_temperature"])
    return REFERENCES[m["inner"]](own, params, s, t) | {"kd": term}


def reference_norm(m, params, s, t, resume_student, resume_teacher):
    x, target = s.last_map, t.features[-1]
    expanded = batch_norm(dense(x, params["Dense_0"]), params["BatchNorm_0"])
    x = x + batch_norm(dense(expanded, params["Dense_1"]), params["BatchNorm_1"])
    here, there = x.shape[-1], target.shape[-1]
    target = F.max_pool2d(target, there // here) if there > here else target
    expanded = F.max_pool2d(expanded, here // there) if here > there else expanded
    logits, ideal = (
        F.layer_norm(x, (CLASSES,), eps=1e-7) * m["logit_scale"] for x in (resume_student(LAST, x)[0], t.logits)
    )
    matched = F.mse_loss(expanded, target.repeat(1, m["segments"], 1, 1)) * m["segments"]
    found = {"label": m["alpha"] * F.cross_entropy(logits, torch.tensor(Y).long()), "maps": m["beta"] * 0.1 * matched}
    return found | ({"distill": m["kd_weight"] * kd(logits, ideal, m["temperature"])} if m["kd_weight"] else {})


def kd(logits, target, T):
    return T**2 * F.kl_div((logits / T).log_softmax(1), (target / T).softmax(1), reduction="batchmean")


def connect(x, like, activated, params):
    if 2 * x.shape[-1] == like.shape[-1]:
        kernel = params["ConvTranspose_0"]["kernel"].permute(2, 3, 0, 1).flip(2, 3)
        x = F.conv_transpose2d(x, kernel, stride=2, padding=1)
    else:
        x = F.conv2d(x, params["Conv_0"]["kernel"].permute(3, 2, 0, 1), stride=x.shape[-1] // like.shape[-1], padding=1)
    x = batch_norm(x, params["BatchNorm_0"])
    return F.leaky_relu(x, 0.1) if activated else x


def reference_fcfd(m, params, s, t, resume_student, resume_teacher):
    """Paths as the released code counts them: by the stages that are the student's, from the front or the back."""
    behind, last = len(t.cuts.maps) - len(s.cuts.maps), len(s.cuts.maps) - 1
    if m["teacher_in_training"]:
        logits, maps = resume_teacher(0, t.cuts.maps[0])
        t = Outputs(logits, cuts=Cuts(maps, activated=False))

    def kl(logits):
        return kd(logits, t.logits, m["temperature"])

    def compare(maps, first):
        total = 0
        for i in range(first, last + 1):
            total = total + F.mse_loss(maps[i], t.cuts.maps[i + behind])
        pooled = [F.relu(x).mean((2, 3)) for x in (maps[last], t.cuts.maps[last + behind])]
        return total + F.mse_loss(*pooled)

    bridged = {
        i: connect(s.cuts.maps[i], t.cuts.maps[i + behind], t.cuts.activated, params["to_teacher"][i - 1])
        for i in range(1, last + 1)
    }
    paths = [(side, i) for side in ("teacher", "student") for i in range(1, last)]
    order = np.asarray(jax.random.permutation(context(3.5).rng, len(paths)))
    function = mixture = torch.zeros(())
    for number, (side, i) in zip(order, paths, strict=True):
        if number >= m["extra_paths"]:
            continue
        if side == "teacher":
            logits, maps = resume_teacher(i + behind, bridged[i])
            function = function + compare(dict(enumerate(maps, -behind)), i + 1)
        else:
            x = connect(t.cuts.maps[i + behind], s.cuts.maps[i], s.cuts.activated, params["to_student"][i - 1])
            logits, _ = resume_student(i, x)
        mixture = mixture + kl(logits)
    weight = m["feature_weight"] * 4 / 20  # the fourth epoch
    return {
        "distill": m["beta"] * kl(s.logits),
        "appearance": weight * compare(bridged, 1),
        "function": weight * function,
        "mixture": m["mixture_weight"] * mixture,
    }


OTHER_SIDES = {  # of the student and the teacher, between which a method has no way
    ("fcfd", "tinyimagenet_res18_mv2"): r"33 x 33 in config\.student and of 64 x 64 in config\.teacher",
    ("fitnets", "tinyimagenet_res18_mv2"): r"17 x 17 in config\.student and of 32 x 32 in config\.teacher",
    ("norm", "tinyimagenet_res18_mv2"): r"9 x 9 in config\.student and of 8 x 8 in config\.teacher",
}
REFERENCES = {
    "at": reference_at,
    "cat_kd": reference_cat_kd,
    "crd": reference_crd,
    "fcfd": reference_fcfd,
    "fitnets": reference_fitnets,
    "ickd": reference_ickd,
    "norm": reference_norm,
    "nst": reference_nst,
    "pkt": reference_pkt,
    "plus_kd": reference_plus_kd,
    "reviewkd": reference_reviewkd,
    "rkd": reference_rkd,
    "sp": reference_sp,
    "vid": reference_vid,
}
RESUMING, SIDES = {"fcfd", "norm"}, ("teacher", "student")
S, T = outputs(0, MAPS["student"]), outputs(1, MAPS["teacher"])
CASES = [(name, {}, "teacher") for name in sorted(FEATURES)] + [
    *((name, {}, "longer teacher") for name in ("at", "ickd", "nst", "reviewkd", "sp", "vid")),
    *((name, {}, "smaller teacher") for name in ("at", "fitnets", "nst", "reviewkd", "vid")),
    *((name, {}, "larger teacher") for name in ("at", "fitnets", "nst", "reviewkd", "vid")),
    ("fitnets", {"hint_stage": 1}, "larger teacher"),
    ("cat_kd", {"map_resolution": 4, "normalize_maps": True}, "teacher"),
    ("cat_kd", {"map_resolution": 3}, "larger teacher"),
    ("vid", {"initial_variance": 0.5}, "teacher"),
    ("plus_kd", {"inner": "vid", "kd_weight": 0.5, "kd_temperature": 3.0}, "longer teacher"),
    ("norm", {}, "smallest teacher"),
    ("norm", {"kd_weight": 2.0, "temperature": 3.0}, "teacher"),
    ("fcfd", {"teacher_in_training": False, "extra_paths": 3}, "activated student's teacher"),
    ("fcfd", {"teacher_in_training": False, "extra_paths": 4}, "longer teacher"),
    ("norm", {"alpha": 0.5, "beta": 2.0, "segments": 3, "logit_scale": 1.5}, "larger teacher"),
    *(("fcfd", {"extra_paths": count}, kind) for count, kind in enumerate((
        "larger teacher", "smaller teacher", "longer teacher", "teacher", "longer teacher"))),
    ("fcfd", {"alpha": 2.0, "beta": 3.0, "feature_weight": 10.0, "mixture_weight": 0.2, "extra_paths": 4}, "teacher"),
]  # fmt: skip
LONG = [
    ("fcfd", {}, "teacher"),
    ("reviewkd", {}, "teacher"),
    ("reviewkd", {}, "longer teacher"),
    ("reviewkd", {}, "larger teacher"),
    ("reviewkd", {}, "smaller teacher"),
    ("fcfd", {"teacher_in_training": False, "extra_paths": 4}, "longer teacher"),
    *(("fcfd", {"extra_paths": count}, kind) for count, kind in ((0, "larger teacher"), (1, "smaller teacher"))),
    *(("fcfd", {"extra_paths": count}, kind) for count, kind in ((3, "teacher"), (4, "longer teacher"))),
    ("vid", {}, "smaller teacher"),
    ("vid", {"initial_variance": 0.5}, "teacher"),
    ("norm", {"kd_weight": 2.0, "temperature": 3.0}, "teacher"),
    *(case for case in CASES if case[2] == "activated student's teacher"),
]


def in_torch(tree):
    """Outputs as leaves of a graph, their maps NCHW."""

    def one(x):
        x = torch.tensor(np.asarray(x, np.float64))
        return (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x).requires_grad_()

    return jax.tree.map(one, tree)


@needs_torch
@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [SLOW(*case) if case in LONG else case for case in CASES],
    ids=["-".join(map(str, (n, k, *f.values()))) for n, f, k in CASES],
)
def test_values_and_gradients_are_pytorchs(name, fields, kind):
    method, s, t = methods.create(name, **fields), S, outputs(1, MAPS[kind])
    if kind == "activated student's teacher":
        s, t = (side._replace(cuts=Cuts(side.cuts.maps, activated=side is s)) for side in (s, t))
    params, state = method.init(jax.random.key(0), shapes(s), shapes(t), EXAMPLES)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    batch = {"label": Y, "index": INDEX}

    def loss(params, s):
        found, _, _ = method.loss(params, state, s, t, batch, where(3.5, kind))
        return sum(found.values()), found

    with jax.enable_x64(True):
        (_, found), (of_params, of_s) = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, s)

    theirs = in_torch(s)
    # A kernel of rank 4 would be taken for a map: parameters keep their order of axes.
    own = jax.tree.map(lambda x: torch.tensor(np.asarray(x)).requires_grad_(), params)
    rests = [rest(2, MAPS["student"])[1], rest(3, MAPS[kind])[1]] if name in RESUMING else []
    expected = REFERENCES[name](methods.hyperparameters(method), own, theirs, in_torch(t), *rests)
    label = methods.hyperparameters(method).get("alpha", 1) * F.cross_entropy(theirs.logits, torch.tensor(Y).long())
    expected.setdefault("label", label)
    sum(expected.values()).backward()
    assert {*found} == {*expected}
    for term, value in found.items():
        np.testing.assert_allclose(value, expected[term].item(), rtol=1e-9, err_msg=term)
    for ours, reference in ((of_params, own), (of_s, theirs)):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
            want = torch.zeros_like(b) if b.grad is None else b.grad
            want = want.permute(0, 2, 3, 1) if ours is of_s and want.ndim == 4 else want
            np.testing.assert_allclose(a, want, rtol=1e-7, atol=1e-9, err_msg=f"{name} {jax.tree_util.keystr(path)}")
    assert max(np.abs(x).max() for x in jax.tree.leaves(of_s._replace(logits=np.zeros(1)))) > 1e-6


@pytest.mark.parametrize("name", ["at", "cat_kd", "nst", "pkt", "rkd", "sp"])
def test_least_at_the_teacher(name):
    method = methods.create(name)
    one = lambda s, t: method.loss({}, {}, s, t, {"label": Y, "index": INDEX}, context(3.5))[0]  # noqa: E731
    near = jax.tree.map(lambda a, b: a + 0.1 * b, S, outputs(2, MAPS["student"]))
    for term in set(one(S, S)) - {"label"}:
        np.testing.assert_allclose(one(S, S)[term], 0, atol=1e-6)
        assert 1e-6 < one(near, S)[term] < one(outputs(2, MAPS["student"]), S)[term]


@needs_torch
@pytest.mark.parametrize(("size", "side"), [(8, 4), (8, 3), (2, 4), (7, 5), (66, 17), (1, 8), (4, 4), (9, 2)])
def test_resampling_is_pytorchs(size, side):
    x = np.random.default_rng(0).normal(size=(2, size, size + 1, 3))
    with jax.enable_x64(True):
        pooled, chosen = _maps.pool(x, (side, side + 1)), _maps.nearest(x, (side, side + 1))
    x = torch.tensor(x).permute(0, 3, 1, 2)
    for found, expected in (
        (pooled, F.adaptive_avg_pool2d(x, (side, side + 1))),
        (chosen, F.interpolate(x, (side, side + 1), mode="nearest")),
    ):
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


@needs_torch
@pytest.mark.parametrize(("channels", "features"), [(30, 200), (200, 30)])
@pytest.mark.parametrize(("side", "to_side"), [(8, 16), (16, 8), (8, 8)])
def test_fcfds_connector_starts_as_the_released_one(channels, features, side, to_side):
    """He's initialisation by the outputs of a convolution, PyTorch's default of a transposed one."""
    s, t = (jax.ShapeDtypeStruct((2, x, x, k), jnp.float32) for x, k in ((side, channels), (to_side, features)))
    params = _maps.init(fcfd.connector(s, t, activated=True), jax.random.key(0), s)
    (kernel,) = (x for x in jax.tree.leaves(params) if x.ndim == 4)
    if to_side > side:
        theirs = torch.nn.ConvTranspose2d(channels, features, 4).weight
    else:
        theirs = torch.nn.init.kaiming_normal_(
            torch.nn.Conv2d(channels, features, 3).weight, mode="fan_out", nonlinearity="relu"
        )
    assert kernel.shape[0] == theirs.shape[-1]
    np.testing.assert_allclose(kernel.std(), theirs.detach().numpy().std(), rtol=0.02)


@needs_torch
@pytest.mark.parametrize(("channels", "features"), [(30, 200), (200, 30)])
@pytest.mark.parametrize(("side", "to_side"), [(8, 16), (16, 8), (8, 6)])
def test_fitnets_regressor_starts_as_pytorchs(channels, features, side, to_side):
    s, t = (jax.ShapeDtypeStruct((2, x, x, k), jnp.float32) for x, k in ((side, channels), (to_side, features)))
    (kernel,) = (x for x in jax.tree.leaves(_maps.init(fitnets.regressor(s, t), jax.random.key(0), s)) if x.ndim == 4)
    layer = torch.nn.ConvTranspose2d if to_side > side else torch.nn.Conv2d
    theirs = layer(channels, features, kernel.shape[0]).weight.detach().numpy()
    np.testing.assert_allclose(kernel.std(), theirs.std(), rtol=0.02)
    np.testing.assert_allclose(np.abs(kernel).max(), np.abs(theirs).max(), rtol=0.01)


# CRD's banks.


def test_crds_banks_are_running_averages_and_its_partition_stays():
    method = methods.create("crd", embedding_dim=5, bank_momentum=0.3)
    params, state = method.init(jax.random.key(0), shapes(S), shapes(T), EXAMPLES)
    bank = {side: np.array(state[side]["bank"]) for side in ("student", "teacher")}
    partitions = []
    for step, index in enumerate(([7, 2, 0, 5], [1, 2, 8, 5])):
        s, t = outputs(step, MAPS["student"]), outputs(10 + step, MAPS["teacher"])
        batch = {"label": jnp.array(Y), "index": jnp.array(index)}
        _, state, _ = jit(functools.partial(method.loss, context=context(step)))(params, state, s, t, batch)
        for side, own in (("student", s), ("teacher", t)):
            layer = params[side]["Dense_0"]
            e = own.embedding @ np.asarray(layer["kernel"], np.float64) + layer["bias"]
            e = 0.3 * bank[side][index] + 0.7 * e / np.linalg.norm(e, axis=1, keepdims=True)
            bank[side][index] = e / np.linalg.norm(e, axis=1, keepdims=True)
            np.testing.assert_allclose(state[side]["bank"], bank[side], rtol=1e-5, atol=1e-6)
        partitions.append([float(state[side]["log_partition"]) for side in ("student", "teacher")])
    assert partitions[0] == partitions[1]
    assert np.isfinite(partitions[0]).all()
    np.testing.assert_array_equal(state["label"], [5, 0, 3, -1, -1, 3, -1, 0, 5])


def test_crds_banks_begin_as_the_released_codes():
    state = methods.create("crd", embedding_dim=48).init(jax.random.key(0), shapes(S), shapes(T), 1000)[1]
    banks = [state[side]["bank"] for side in ("student", "teacher")]
    for bank in banks:  # uniform in +- 1 / sqrt(48 / 3)
        assert bank.shape == (1000, 48)
        assert 0.2499 < jnp.abs(bank).max() <= 0.25
        assert abs(bank.mean()) < 0.003
    assert (banks[0] != banks[1]).any()


def test_crds_negatives_are_of_other_classes_and_as_many_as_asked_for():
    count, classes, asked = 3000, 10, 700
    label = np.arange(count) % classes
    method = methods.create("crd", num_negatives=asked)
    params, state = method.init(jax.random.key(0), shapes(S), shapes(T), count)
    state["label"] = jnp.array(label)
    seen = []
    original = crd.nce

    def nce(scores, own, chosen, expected, log_partition):
        seen.append((own, chosen, expected))
        return original(scores, own, chosen, expected, log_partition)

    index = np.array([3, 14, 159, 2653])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crd, "nce", nce)
        _, _, metrics = method.loss(
            params, state, S, T, {"label": jnp.array(label[index]), "index": jnp.array(index)}, context(0)
        )
    own, chosen, expected = map(np.asarray, seen[0])
    assert (np.nonzero(own)[1] == index).all()
    assert (expected == asked).all()
    for i, row in enumerate(chosen):
        assert not (label[row] == label[index[i]]).any()
        assert abs(row.sum() - asked) < 5 * (asked * (1 - asked / (0.9 * count))) ** 0.5
        assert len(set(label[row])) == classes - 1
    assert not (chosen[0] == chosen[1]).all()
    np.testing.assert_allclose(metrics["negatives"], chosen.sum(-1).mean())


@pytest.mark.parametrize("name", [SLOW("crd"), SLOW("fcfd"), SLOW("norm")])
def test_resumed_run_is_an_uninterrupted_one(name, two_stages, tmp_path, stopped):
    """Of a method with parameters and a state: the same bits of both, too."""
    config = two_stages(method=name, num_steps=8, checkpoint_seconds=0.0)
    whole = train.train_and_evaluate(config, tmp_path / "a")
    stopped(config, tmp_path / "b", 6)
    resumed = train.train_and_evaluate(config, tmp_path / "b")
    assert resumed["last"] == whole["last"]
    template = steps.run_once(experiment.build(config).create_state, jax.random.key(0))
    states = [Checkpoints(tmp_path / name / "checkpoints").restore(template, 8)[0] for name in "ab"]
    for part in (lambda state: state.params["method"], lambda state: state.method_state):
        assert_same(*map(part, states))


# FCFD's paths.


@pytest.mark.slow
def test_fcfds_paths_are_drawn_anew_and_as_many_as_asked_for():
    method, (s, t) = methods.create("fcfd", extra_paths=2, teacher_in_training=False), jax.tree.map(np.float32, (S, T))
    params, _ = method.init(jax.random.key(0), shapes(s), shapes(t), EXAMPLES)
    alone = dataclasses.replace(method, extra_paths=4)

    def mixture(method, rng, skip=None):
        """The paths' term, without that of one path where `skip`, whose logits are the teacher's."""

        def without(resume, side):
            def found(stage, x):
                outputs = resume(stage, x)
                return outputs._replace(logits=t.logits) if (side, stage) == skip else outputs

            return found

        now = where(3.5)._replace(rng=rng)
        now = now._replace(**{f"resume_{side}": without(getattr(now, f"resume_{side}"), side) for side in SIDES})
        return method.loss(params, {}, s, t, {"label": Y, "index": INDEX}, now)[0]["mixture"]

    paths = [(side, stage) for side in SIDES for stage in (1, 2)]
    whole = mixture(alone, jax.random.key(0))
    shares = [whole - mixture(alone, jax.random.key(0), path) for path in paths]
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-4)
    pairs = {frozenset(pair): shares[pair[0]] + shares[pair[1]] for pair in itertools.combinations(range(4), 2)}
    drawn = []
    for total in jit(jax.vmap(functools.partial(mixture, method)))(jax.random.split(jax.random.key(5), 60)):
        (found,) = (pair for pair, share in pairs.items() if np.isclose(share, total, rtol=1e-4))
        drawn.append(found)
    assert {*drawn} == {*pairs}
    assert max(map(drawn.count, pairs)) < 25  # of 60, for 10 expected


def test_fcfd_asks_for_two_maps():
    bare = S._replace(cuts=Cuts(S.cuts.maps[:1], activated=True))
    with pytest.raises(ValueError, match=r"config\.student has 1 in its rkd_jax\.models\.Cuts, config\.teacher 4; two"):
        methods.create("fcfd").init(jax.random.key(0), shapes(bare), shapes(T), EXAMPLES)


@pytest.mark.slow
def test_fcfds_teacher_is_not_folded(two_stages, tmp_path, monkeypatch):
    """Nor where it is shared with a method whose teacher is."""
    with pytest.raises(ValueError, match=r"config\.method='fcfd' trains through .*config\.fold_teacher=True"):
        experiment.build(two_stages(method="fcfd", fold_teacher=True))
    build, folded = experiment.build, []

    def on_a_gpu(config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            run = build(config)
        folded.append(not run.teacher_variables["batch_stats"])
        return run._replace(loop=run.loop._replace(steps_per_call=1))

    fields = {"num_steps": 2, "log_every": 1}
    train.train_and_evaluate(two_stages(method="fcfd", **fields), tmp_path / "alone")
    monkeypatch.setattr(experiment, "build", on_a_gpu)
    pair = [(two_stages(method=name, **fields), tmp_path / name) for name in ("kd", "fcfd")]
    train.train_together(pair)
    assert folded == [True, False]
    alone, together = (records(tmp_path / name) for name in ("alone", "fcfd"))
    mixtures = [[line["mixture"] for line in lines if "mixture" in line] for lines in (alone, together)]
    assert mixtures[0] == pytest.approx(mixtures[1], rel=1e-4)
    assert len(mixtures[0]) == 2


def test_norms_weight_of_the_maps_goes_by_the_epoch():
    method, (s, t) = methods.create("norm"), jax.tree.map(np.float32, (S, T))
    params, state = method.init(jax.random.key(0), shapes(s), shapes(t), EXAMPLES)

    def maps(epoch, part):
        found = methods.create("norm", schedule_epochs=part)
        return found.loss(params, state, s, t, {"label": Y, "index": INDEX}, where(0)._replace(epoch=epoch))[0]["maps"]

    weights = {9.9: 0.1, 10: 0.5, 19.9: 0.5, 20: 1, 179.9: 1, 180: 0.5, 209.9: 0.5, 210: 0.1, 250: 0.1}
    for part in (1.0, 0.1):
        scaled = jit(functools.partial(maps, part=240 * part))
        one = scaled(100.0 * part)
        for epoch, weight in weights.items():
            np.testing.assert_allclose(scaled(epoch * part + 1e-4) / one, weight, rtol=1e-5, err_msg=str(epoch))


# NORM's layers, merged.


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", SLOW("MobileNetV2_64x64")])
def test_norms_layers_merge_into_the_classifier(name):
    model, rng = models.create(name, CLASSES), np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = experiment.untrained(model, images.shape[1:])
    plain = jax.eval_shape(model.apply, variables, images)
    method = methods.create("norm", segments=2)
    params, state = method.init(jax.random.key(0), plain, plain, EXAMPLES)
    params, state = jax.tree.map(lambda x: x + 0.3 * rng.random(x.shape, np.float32), (params, state))

    @jit
    def logits(variables, params, state):
        plain = model.apply(variables, images)
        layers = norm.Transform(2 * plain.features[-1].shape[-1])
        _, x = layers.apply({"params": params, "batch_stats": state}, plain.last_map, False)
        deployed = method.deploy(model, images, variables, params, state)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), deployed, variables)
        through = models.resume(model, variables, LAST, x, images=images)
        return model.apply(deployed, images).logits, through.logits, plain.logits

    # What cancels, and what merges, in full float32 on any device.
    text = str(jax.make_jaxpr(lambda *given: method.deploy(model, images, *given))(variables, params, state))
    assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST") == 4

    found, expected, before = logits(variables, params, state)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(before - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_a_run_of_norm_leaves_a_plain_network_of_the_accuracy_that_it_says(two_stages, tmp_path):
    config = two_stages(method="norm", segments=2)
    summary = train.train_and_evaluate(config, tmp_path)
    run = experiment.build(config)
    variables, metadata = load_network(tmp_path / "last", "small_network:two_stages", 10)
    experiment.check_variables(run.student, variables, run.splits.train.images.shape[1:], "last")
    evaluate = steps.make_eval_step(run.student, run.recipe.student_normalization, steps.local_mesh())
    assert (
        steps.evaluate(evaluate, variables, *run.splits.test, 32)["top1"] == metadata["top1"] == summary["last"]["top1"]
    )
    template = steps.run_once(run.create_state, jax.random.key(0))
    trained = Checkpoints(tmp_path / "checkpoints").restore(template, 12)[0].params["student"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), trained, variables["params"])
    assert {path[0].key for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal} == {"fc"}


@pytest.mark.slow
def test_gate_of_the_docs_is_merged_into_the_classifier(two_stages, tmp_path, monkeypatch):
    (*_, block) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL)
    (tmp_path / "gated.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    config = two_stages(method="gated:Method")
    summary = train.train_and_evaluate(config, tmp_path / "run")
    variables, _ = load_network(tmp_path / "run" / "last", "small_network:two_stages", 10)
    run = experiment.build(config)
    template = steps.run_once(run.create_state, jax.random.key(0))
    params = Checkpoints(tmp_path / "run" / "checkpoints").restore(template, 12)[0].params
    gate = params["method"]["gate"]
    assert np.abs(gate - 1).max() > 1e-4
    np.testing.assert_allclose(variables["params"]["fc"]["kernel"], gate[:, None] * params["student"]["fc"]["kernel"])
    evaluate = steps.make_eval_step(run.student, run.recipe.student_normalization, steps.local_mesh())
    assert steps.evaluate(evaluate, variables, *run.splits.test, 32)["top1"] == summary["last"]["top1"]


def test_norm_names_what_it_cannot_merge_before_the_first_step(two_stages, tmp_path):
    (tmp_path / "own.py").write_text(NO_CUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for factory, message in (
            ("no_cut", r"does not end with rkd_jax\.models\.Cut\(LAST\)"),
            ("no_bias", "it has no bias"),
        ):
            message = rf"config\.method='norm' merges layers into config\.student's classifier: .*{message}"
            with pytest.raises(ValueError, match=message):
                train.train_and_evaluate(two_stages(method="norm", student=f"own:{factory}"), tmp_path / "run")
            assert not (tmp_path / "run" / "config.json").exists()
    odd, even = S._replace(last_map=np.ones((BATCH, 3, 3, 5))), outputs(1, [(8, 4)] * 4)
    with pytest.raises(
        ValueError, match=r"3 x 3 in config\.student and of 8 x 8 in config\.teacher, neither a multiple"
    ):
        methods.create("norm").init(jax.random.key(0), shapes(odd), shapes(even), EXAMPLES)


NO_CUT = """
import flax.linen as nn
from rkd_jax.models import LAST, Cut, Outputs

class Net(nn.Module):
    num_classes: int
    cut: bool

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=4)(images))
        x = Cut(LAST)(x) if self.cut else x
        logits = nn.Dense(self.num_classes, use_bias=not self.cut)(x.mean((1, 2)))
        return Outputs(logits, last_map=x)

def no_cut(num_classes): return Net(num_classes, cut=False)
def no_bias(num_classes): return Net(num_classes, cut=True)
"""


# Every pair, and what cannot be.


@functools.cache
def traced(name, classes, side):
    """A network, its variables and its outputs, the arrays by their shapes."""
    model = models.create(name, classes, image_size=side)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, variables, jax.eval_shape(functools.partial(model.apply, train=False), variables, images)


def terms_of(method, student, teacher, side):
    """The terms of a method for two such networks, by their shapes."""
    (s_model, *s), (t_model, *t) = student, teacher
    images, batch = jnp.zeros((2, side, side, 3)), {"label": jnp.zeros(2, jnp.int32), "index": jnp.arange(2)}

    def loss(s_variables, s, t_variables, t):
        resume_student = functools.partial(models.resume, s_model, s_variables, images=images, train=True)
        resume_teacher = functools.partial(models.resume, t_model, t_variables, images=images, train=True)
        now = context(0.0)._replace(resume_student=resume_student, resume_teacher=resume_teacher)
        params, state = method.init(jax.random.key(0), shapes(s), shapes(t), 10)
        method.deploy(s_model, images, s_variables, params, state)
        return method.loss(params, state, s, t, batch, now)[0]

    return jax.eval_shape(loss, *s, *t)


# Their networks' maps are as others' of the same families.
ALONE = ("cifar100_res32x4_res8x4",)  # the others with -m slow


@pytest.mark.parametrize("pair", [pair if pair in ALONE else SLOW(pair) for pair in paper.PAIRS])
def test_every_pair_of_the_paper(pair):
    config = importlib.import_module(f"configs.{pair}").get_config()
    classes, side = (100, 32) if config.dataset == "cifar100" else (200, 64)
    student, teacher = (traced(name, classes, side) for name in (config.student, config.teacher))
    for name in sorted(FEATURES):
        method = methods.resolve(name, {}, config.dataset, config.teacher, config.student)
        if (name, pair) in OTHER_SIDES:
            with pytest.raises(ValueError, match=OTHER_SIDES[name, pair]):
                terms_of(method, student, teacher, side)
            continue
        found = terms_of(method, student, teacher, side)
        assert all(value.shape == () for value in found.values()), name


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_networks_without_maps_are_named(name):
    method = methods.create(name)
    read = {"cat_kd": "class_maps", "fcfd": "cuts", "ickd": "last_map", "norm": "last_map"}
    read |= dict.fromkeys(("crd", "pkt", "plus_kd", "rkd"), "embedding")
    field = read.get(name, "features")
    bare, message = Outputs(S.logits), f"reads the student's {field}, and config.student returns none"
    named = "config.inner='crd'" if name == "plus_kd" else f"config.method='{name}'"
    with pytest.raises(ValueError, match=f"^{re.escape(named)} {message}"):
        method.init(jax.random.key(0), shapes(bare), shapes(T), EXAMPLES)
    if name != "plus_kd":
        with pytest.raises(ValueError, match=rf"^config\.inner='{name}' {message}"):
            methods.create("dot", inner=name).init(jax.random.key(0), shapes(bare), shapes(T), EXAMPLES)
    field = {"norm": "features", "reviewkd": "preactivations"}.get(name, field)
    bare = T._replace(**{field: () if isinstance(getattr(T, field), tuple) else None})
    with pytest.raises(
        ValueError, match=f"reads the teacher's {field}, and config.teacher returns none; return {field}"
    ):
        method.init(jax.random.key(0), shapes(S), shapes(bare), EXAMPLES)
    if name == "reviewkd":
        with pytest.raises(ValueError, match=r"reads the teacher's embedding, and config\.teacher returns none"):
            method.init(jax.random.key(0), shapes(S), shapes(T._replace(embedding=None)), EXAMPLES)
    if name not in read and name != "fitnets":
        with pytest.raises(ValueError, match=r"config\.student returns 1 of at least 2"):
            method.init(jax.random.key(0), shapes(S._replace(features=S.features[:1])), shapes(T), EXAMPLES)


@pytest.mark.parametrize("name", sorted(FEATURES - {"cat_kd"}))
def test_the_documentations_network_has_what_they_read(name, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "methods.md").read_text()
    (tmp_path / "my_networks.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    found = terms_of(methods.create(name), traced("my_networks:Net", CLASSES, 32), traced("resnet8", CLASSES, 32), 32)
    assert {value.shape for value in found.values()} == {()}


@pytest.mark.parametrize("name", [SLOW(x) if x in ("norm", "reviewkd", "vid") else x for x in sorted(FEATURES)])
def test_images_that_are_not_square(name):
    """Maps of twice the width, each pixel twice: what is averaged over positions stays, and all else has a value."""
    wide = [jax.tree.map(lambda x: x.repeat(2, axis=2) if x.ndim == 4 else x, side) for side in (S, T)]
    method = methods.create(name)
    batch = {"label": Y, "index": INDEX}

    def loss(s, t):
        params, state = method.init(jax.random.key(0), shapes(s), shapes(t), EXAMPLES)
        return method.loss(params, state, s, t, batch, where(3.5))[0]

    found, square = jit(loss)(*wide), jit(loss)(S, T)
    assert all(np.isfinite(value) for value in found.values())
    if name in ("vid", "ickd", "sp"):
        for term in found:
            np.testing.assert_allclose(found[term], square[term], rtol=1e-4)


def test_hints_that_do_not_fit_are_named():
    for stage in (7, -1):
        with pytest.raises(ValueError, match=rf"config\.hint_stage={stage} is no stage of both networks; take 0 to 3"):
            methods.create("fitnets", hint_stage=stage).init(jax.random.key(0), shapes(S), shapes(T), EXAMPLES)
    with pytest.raises(ValueError, match=r"2 x 2 in config\.student and of 8 x 8 in config\.teacher"):
        methods.create("fitnets", hint_stage=3).init(
            jax.random.key(0), shapes(S), shapes(outputs(0, [(8, 4)] * 4)), EXAMPLES
        )
