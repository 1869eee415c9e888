"""Similarity-preserving knowledge distillation (Tung and Mori, ICCV 2019, arXiv:1907.09682).

L = CE(s, y) + beta * |N(F_t F_t') - N(F_s F_s')|^2 / batch^2, F = the last stage's maps, one example a row; N divides
each row by its norm
"""

import dataclasses

import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(3000.0)  # weight of the similarities

    def init(self, rng, student, teacher, num_examples):
        _maps.pairs("sp", student, teacher)
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = map(similarities, _maps.pairs("sp", student, teacher)[-1])
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "similarity": self.beta * ((t - s) ** 2).mean(),
        }
        return terms, state, {}


def similarities(x):
    """[B, H, W, K] -> [B, B], whose rows have norm 1."""
    x = losses.promote(x).reshape(len(x), -1)
    return _maps.unit(jnp.matmul(x, x.T, precision="highest"))
