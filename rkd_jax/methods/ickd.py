"""Inter-channel correlation (Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
Distillation", ICCV 2021).

L = CE(s, y) + beta * mean over examples of |N(G_t) - N(G_s)|^2 / channels, G = the products of all pairs of channels of
the map that the global average reads, summed over positions; N divides each row by its norm

That map comes after the activation in wrn too, and after the last 1x1 convolution in MobileNetV2 and ShuffleV2: it is
not their last stage's. The student's is brought to the teacher's channels by a 1x1 convolution and batch normalisation,
trained beside it. The authors' later script has beta 4 for resnet32x4 > resnet8x4.
A G has channels^2 entries for each example: with ResNet50 as the teacher, 1 GB for a batch of 64.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import torch_default


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(2.5)  # weight of the correlations

    def init(self, rng, student, teacher, num_examples):
        s, t = _maps.both("ickd", student, teacher, "last_map")
        return _maps.init(Embedding(t.shape[-1]), rng, s), {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = _maps.both("ickd", student, teacher, "last_map")
        s = _maps.apply(Embedding(t.shape[-1]), params, s)
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "correlation": self.beta * ((correlations(t) - correlations(s)) ** 2).sum(axis=(1, 2)).mean() / t.shape[-1],
        }
        return terms, state, {}


def correlations(x):
    """[B, H, W, K] -> [B, K, K], whose rows have norm 1."""
    x = losses.promote(x)
    return _maps.unit(jnp.einsum("bhwk,bhwl->bkl", x, x, precision="highest"))


class Embedding(nn.Module):
    """A 1x1 convolution and batch normalisation."""

    features: int

    @nn.compact
    def __call__(self, x):
        """[B, H, W, K] -> [B, H, W, features]."""
        return _maps.BatchNorm()(nn.Dense(self.features, use_bias=False, kernel_init=torch_default)(x))
