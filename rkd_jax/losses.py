"""Losses of logits, per example: [..., C], [..., C] -> [...]; the caller reduces.

s are the student's logits, t the teacher's, y the labels, T a temperature. Gradients flow to both sides: a teacher is
frozen by whoever applies it. Half precision is computed and returned in float32, float64 stays float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import ranking

EXCLUDED = -1e30  # the logit of a class left out: its probability is exactly 0, and nothing overflows


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(s)_y; [..., C], integer [...] -> [...]. A label that is none of 0 to C - 1 makes its row NaN."""
    label = is_label(logits, labels)
    known = (labels >= 0) & (labels < np.int32(logits.shape[-1]))
    counted = label | ~known[..., None]  # all of a row that becomes NaN, so that its gradient does
    log_p = jnp.sum(jax.nn.log_softmax(promote(logits)), axis=-1, where=counted)
    return -log_p * jnp.where(known, 1, jnp.nan).astype(log_p.dtype)


def soft_cross_entropy(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """-T^2 * sum softmax(t / T) log softmax(s / T), over the classes where `where`; [..., C], [..., C] -> [...]."""
    log_s, log_t = log_probabilities(student_logits, teacher_logits, temperature, where)
    return -(temperature**2) * jnp.sum(jnp.exp(log_t) * log_s, axis=-1, where=where)


def kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """T^2 * KL(softmax(t / T) || softmax(s / T)) (Hinton et al., 2015); [..., C], [..., C] -> [...].

    The distributions are over the classes where `where` [..., C] alone; the loss is 0 if there is none.
    """
    log_s, log_t = log_probabilities(student_logits, teacher_logits, temperature, where)
    return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1, where=where)


def label_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, student_labels: jax.Array, teacher_labels: jax.Array
) -> jax.Array:
    """KL between the Bernoulli distributions (p_y, 1 - p_y), y of each side's own; [..., C], [..., C] -> [...].

    DKD's target-class term, and RLD's sample confidence, where the teacher's y is the class that it predicts.
    """
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    return kl(label_against_rest(student_logits, student_labels), label_against_rest(teacher_logits, teacher_labels))


def pearson(a: jax.Array, b: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """Pearson's correlation over the last axis, 0 where a side is constant; [..., C], [..., C] -> [...].

    (Or where its squares are below what the dtype holds.) `epsilon` is added to the denominator, the product of the
    centred norms. The gradient to a constant side is the other, centred: a way out.
    """
    same_shape(a=a, b=b)
    a, b = _centred(a), _centred(b)
    scale = norm(a) * norm(b)
    return jnp.sum(a * b, axis=-1) / jnp.where(scale > 0, scale + epsilon, 1.0)


def ranking_alignment(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    eps: float | jax.Array = 1.0,
    kind: str = "l2",
    rank_scale: str = "paper",
) -> jax.Array:
    """Distance of the soft ranks of strength `eps` (Lu et al., 2025); [..., C], [..., C] -> [...].

    kind "l2": mean_i (r(s)_i - r(t)_i)^2; "l1": mean_i |r(s)_i - r(t)_i|; "spearman": 1 - Pearson(r(s), r(t)).
    rank_scale "paper": r as it is. "logits": eps * r, which is in units of the logits, so that a weight keeps its
    meaning from one eps or C to another: "l2" is the mean squared error of the centred logits where both rows are one
    block, at any eps and C, and never more than that elsewhere, since a projection moves no two points apart. (In
    float32 ranks are rounded to 1e-7 C, so that the differences lose digits from an eps of about 100 on.)
    """
    if kind not in ("l2", "l1", "spearman"):
        raise ValueError(f"kind={kind!r} is none of 'l2', 'l1', 'spearman'")
    if rank_scale not in ("paper", "logits"):
        raise ValueError(f"rank_scale={rank_scale!r} is none of 'paper', 'logits'")
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    unit = eps if rank_scale == "logits" else 1.0
    student_rank = unit * ranking.soft_rank(student_logits, regularization_strength=eps)
    teacher_rank = unit * ranking.soft_rank(teacher_logits, regularization_strength=eps)
    if kind == "l2":
        return jnp.mean((student_rank - teacher_rank) ** 2, axis=-1)
    if kind == "l1":
        return jnp.mean(jnp.abs(student_rank - teacher_rank), axis=-1)
    return 1.0 - pearson(student_rank, teacher_rank)


# What the losses are made of.


def same_shape(**sides: jax.Array) -> None:
    """ValueError that names two arguments whose shapes differ: they would be broadcast."""
    (ours, s), (theirs, t) = ((name, jnp.shape(x)) for name, x in sides.items())
    if s != t:
        raise ValueError(f"{ours} has shape {s} and {theirs} {t}; give both the same, [..., C]")


def promote(x: jax.Array) -> jax.Array:
    """Half precision to float32; wider types as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pick(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values_y; [..., C], integer [...] -> [...]. A masked sum: it fuses, and its gradient is no scatter."""
    return jnp.sum(values, axis=-1, where=is_label(values, labels))


def is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Which class is the label; [..., C], integer [...] -> bool [..., C]. TypeError, ValueError for other labels."""
    shape, kind = jnp.shape(logits), jnp.result_type(labels)
    if not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"labels has dtype {kind}; give each row's class as an integer, e.g. int32")
    if jnp.shape(labels) != shape[:-1]:
        raise ValueError(
            f"labels has shape {jnp.shape(labels)}, and logits {shape}; give each row's class, of shape {shape[:-1]}"
        )
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def label_against_rest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits of (p_y, 1 - p_y): z_y and log sum_{i != y} exp z_i; [..., C], integer [...] -> [..., 2]."""
    logits = promote(logits)
    rest = jax.nn.logsumexp(jnp.where(is_label(logits, labels), EXCLUDED, logits), axis=-1)
    return jnp.stack([pick(logits, labels), rest], axis=-1)


def label_first(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The same values with the largest given to y, the rest in their order; [..., C], integer [...] -> [..., C]."""
    logits = promote(logits)
    order = jnp.argsort(jnp.where(is_label(logits, labels), jnp.inf, logits), descending=True)
    return jax.lax.sort((order, jnp.sort(logits, descending=True)), num_keys=1)[1]


def standardize(logits: jax.Array) -> jax.Array:
    """(z - mean) / (std + 1e-7), std over C - 1 (Sun et al., 2024); [..., C] -> [..., C].

    0 where z is constant, with a gradient of about 1e7: do not begin with a last layer of zeros.
    """
    centred = _centred(logits)
    std = norm(centred)[..., None] / max(logits.shape[-1] - 1, 1) ** 0.5
    return centred / (std + 1e-7)


def _centred(x: jax.Array) -> jax.Array:
    """x less its mean over the last axis; without the largest first, rounding leaves something of a constant row."""
    x = promote(x)
    x = x - jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
    return x - x.mean(axis=-1, keepdims=True)


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm whose gradient at 0 is 0; [..., C] -> [...]."""
    square = jnp.sum(promote(x) ** 2, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def log_probabilities(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax of both sides' logits / T over the classes where `where`; the others' values mean nothing.

    T is a positive and finite scalar; ValueError for any other (a traced one is not checked).
    """
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    if jnp.ndim(temperature):
        raise ValueError(f"temperature has shape {jnp.shape(temperature)}; give a scalar, or use jax.vmap")
    if not isinstance(temperature, jax.core.Tracer) and not 0 < float(temperature) < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    scaled = (promote(student_logits) / temperature, promote(teacher_logits) / temperature)
    if where is not None:
        scaled = tuple(jnp.where(where, logits, EXCLUDED) for logits in scaled)
    log_s, log_t = (jax.nn.log_softmax(logits) for logits in scaled)
    return log_s, log_t
