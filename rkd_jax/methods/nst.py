"""Neuron selectivity transfer (Huang and Wang, "Like What You Like", 2017, arXiv:1707.01219).

L = CE(s, y) + beta * sum over stages of [mean K(F_s, F_s) + mean K(F_t, F_t) - 2 * mean K(F_s, F_t)], K = the squared
products of two channels' maps, each of norm 1 over positions; means over all pairs of channels, and examples

Of two maps of a stage the larger is averaged to the smaller's size first.
"""

import dataclasses

import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(50.0)  # weight of the discrepancies

    def init(self, rng, student, teacher, num_examples):
        _maps.pairs("nst", student, teacher)
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        stages = [map(channels, _maps.same_size(*pair)) for pair in _maps.pairs("nst", student, teacher)]
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "selectivity": self.beta * sum(discrepancy(s, t) for s, t in stages),
        }
        return terms, state, {}


def channels(x):
    """[B, H, W, K] -> [B, K, H * W], whose rows have norm 1."""
    return _maps.unit(x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2))


def discrepancy(s, t):
    """Maximum mean discrepancy, squared, of two sets of channels, [B, K, P] and [B, K', P], for the squared product."""

    def kernel(a, b):
        return (jnp.einsum("bkp,blp->bkl", a, b, precision="highest") ** 2).mean()

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)
