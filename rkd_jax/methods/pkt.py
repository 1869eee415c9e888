"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018, arXiv:1803.10837).

L = CE(s, y) + beta * mean over pairs of Q(e_t) * log(Q(e_t) / Q(e_s)), Q = (1 + the cosine of two embeddings of the
batch) / 2, over its sum over the second

The pairs of an embedding with itself are among them, as released; both Q have 1e-7 added within the logarithm.
"""

import dataclasses

import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base

EPSILON = 1e-7


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(30000.0)  # weight of the probabilities

    def init(self, rng, student, teacher, num_examples):
        _maps.both("pkt", student, teacher, "embedding")
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = map(probabilities, _maps.both("pkt", student, teacher, "embedding"))
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "probabilities": self.beta * (t * jnp.log((t + EPSILON) / (s + EPSILON))).mean(),
        }
        return terms, state, {}


def probabilities(embedding):
    """Of each other example, given one: [B, D] -> [B, B], whose rows have the sum 1."""
    directions = _maps.unit(embedding)
    similarities = (1 + jnp.matmul(directions, directions.T, precision="highest")) / 2
    return similarities / similarities.sum(axis=-1, keepdims=True)
