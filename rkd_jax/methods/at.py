"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928).

L = CE(s, y) + beta * sum over stages of mean (A(F_s) - A(F_t))^2, A(F) = the mean of F^2 over channels, of norm 1 over
positions

Of two maps of a stage the larger is averaged to the smaller's size first, before squaring.
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(1000.0)  # weight of the attention

    def init(self, rng, student, teacher, num_examples):
        _maps.pairs("at", student, teacher)
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        stages = [_maps.same_size(s, t) for s, t in _maps.pairs("at", student, teacher)]
        distances = [((attention(s) - attention(t)) ** 2).mean() for s, t in stages]
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        return {"label": label, "attention": self.beta * sum(distances)}, state, {}


def attention(x):
    """[B, H, W, K] -> [B, H * W], of norm 1."""
    return _maps.unit((x**2).mean(axis=-1).reshape(len(x), -1))
