"""Variational information distillation (Ahn et al., CVPR 2019, arXiv:1904.05835).

L = CE(s, y) + beta * sum over stages of mean 0.5 * ((m(F_s) - F_t)^2 / v + log v), v = softplus(a) + 1e-5

m is three 1x1 convolutions with ReLUs between, and a one number for each channel of the teacher; both are trained
beside the student. Of two maps of a stage the larger is averaged to the smaller's size. The term is a negative
log-likelihood and may fall below 0. In mdistiller's code v stays as it begins, for its optimizer never gets a; here it
is trained, as in RepDistiller's.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import torch_default

LEAST = 1e-5  # variance


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(1.0)  # weight of the likelihoods
    initial_variance: float = base.positive(5.0)  # v at first

    def init(self, rng, student, teacher, num_examples):
        variance = max(self.initial_variance - LEAST, LEAST)
        start = variance + math.log(-math.expm1(-variance))  # softplus(start) = variance
        params = [
            {
                "mean": _maps.init(Mean(t.shape[-1]), jax.random.fold_in(rng, i), s),
                "variance": jnp.full(t.shape[-1:], start, jnp.float32),
            }
            for i, (s, t) in enumerate(_maps.pairs("vid", student, teacher))
        ]
        return params, {}

    def loss(self, params, state, student, teacher, batch, context):
        total = 0.0
        for own, stage in zip(params, _maps.pairs("vid", student, teacher), strict=True):
            s, t = _maps.same_size(*stage)
            mean = _maps.apply(Mean(t.shape[-1]), own["mean"], s)
            variance = jax.nn.softplus(own["variance"]) + LEAST
            total += 0.5 * ((mean - t) ** 2 / variance + jnp.log(variance)).mean()
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        return {"label": label, "information": self.beta * total}, state, {}


class Mean(nn.Module):
    """Three 1x1 convolutions with ReLUs between."""

    features: int

    @nn.compact
    def __call__(self, x):
        """[B, H, W, K] -> [B, H, W, features]."""
        for i in range(3):
            x = nn.Dense(self.features, use_bias=False, kernel_init=torch_default)(nn.relu(x) if i else x)
        return x
