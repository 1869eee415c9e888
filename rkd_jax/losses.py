"""Losses of logits, per example: [..., C], [..., C] -> [...]; the caller reduces.

s are the student's logits, t the teacher's, y the labels, T a temperature. Gradients flow to both sides: a teacher is
frozen by whoever applies it.
"""

import jax
import jax.numpy as jnp

from rkd_jax import ranking


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(s)_y; [..., C], integer [...] -> [...]."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def kl(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """T^2 * KL(softmax(t / T) || softmax(s / T)) (Hinton et al., 2015); [..., C], [..., C] -> [...]."""
    log_s = jax.nn.log_softmax(student_logits / temperature)
    log_t = jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def pearson(a: jax.Array, b: jax.Array) -> jax.Array:
    """Pearson's correlation over the last axis, 0 where a side is constant; [..., C], [..., C] -> [...]."""
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    scale = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.where(scale > 0, scale, 1.0))


def ranking_alignment(
    student_logits: jax.Array, teacher_logits: jax.Array, eps: float = 1.0, kind: str = "l2"
) -> jax.Array:
    """Distance of the soft ranks of strength `eps` (Lu et al., 2025); [..., C], [..., C] -> [...].

    kind "l2": mean_i (r(s)_i - r(t)_i)^2; "l1": mean_i |r(s)_i - r(t)_i|; "spearman": 1 - Pearson(r(s), r(t)).
    """
    student_rank = ranking.soft_rank(student_logits, regularization_strength=eps)
    teacher_rank = ranking.soft_rank(teacher_logits, regularization_strength=eps)
    if kind == "l2":
        return jnp.mean((student_rank - teacher_rank) ** 2, axis=-1)
    if kind == "l1":
        return jnp.mean(jnp.abs(student_rank - teacher_rank), axis=-1)
    if kind == "spearman":
        return 1.0 - pearson(student_rank, teacher_rank)
    raise ValueError(f"kind={kind!r} of ranking_alignment is none of 'l2', 'l1', 'spearman'")
