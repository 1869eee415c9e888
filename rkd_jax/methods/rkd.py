"""Relational knowledge distillation (Park et al., CVPR 2019, arXiv:1904.05068).

L = CE(s, y) + distance_weight * mean over pairs of H(D(e_s), D(e_t)) + angle_weight * mean over triples of H(A(e_s),
A(e_t)); D = the distance of two embeddings over the mean distance of the batch, A = the cosine of the angle at one
embedding between two others, H(a, b) = (a - b)^2 / 2, or |a - b| - 1 / 2 where |a - b| is above 1

Not the ranking alignment that this package is named after. Pairs and triples are those of a batch, the pairs of an
embedding with itself, which are 0 on both sides, among them, as released.
"""

import dataclasses

import jax.numpy as jnp
import optax

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    distance_weight: float = base.non_negative(25.0)  # weight of the distances
    angle_weight: float = base.non_negative(50.0)  # weight of the angles

    def init(self, rng, student, teacher, num_examples):
        _maps.both("rkd", student, teacher, "embedding")
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = map(differences, _maps.both("rkd", student, teacher, "embedding"))
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "distance": self.distance_weight * optax.losses.huber_loss(distances(s), distances(t)).mean(),
            "angle": self.angle_weight * optax.losses.huber_loss(angles(s), angles(t)).mean(),
        }
        return terms, state, {}


def differences(embedding):
    """[B, D] -> [B, B, D]."""
    embedding = losses.promote(embedding)
    return embedding - embedding[:, None]


def distances(between):
    """The lengths of the differences [B, B, D] -> [B, B], over the mean of those of two examples."""
    found = losses.norm(between)
    mean = found.sum() / max(1, len(found) * (len(found) - 1))
    return found / jnp.maximum(mean, _maps.TINY)


def angles(between):
    """The cosines between the differences of one example to all others, [B, B, D] -> [B, B, B]."""
    directions = _maps.unit(between)
    return jnp.einsum("ijd,ikd->ijk", directions, directions, precision="highest")
