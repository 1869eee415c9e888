"""Normalized knowledge distillation (Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation",
ICCV 2023, arXiv:2303.13005).

L = CE(s, y) - p_t(y) log p_s(y) + gamma * T^2 * CE(softmax_{i != y}(t / T), softmax_{i != y}(s / T))

The part of the target class ignores T. The other is a cross-entropy, whose minimum over s, at s = t, is the entropy of
the teacher's, not 0. T and gamma are the defaults of the authors' code, and what later comparisons on CIFAR-100 take;
their one CIFAR-100 configuration, ResNet34 > ResNet18, has T 3 and gamma 3.5.
"""

import dataclasses

import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    gamma: float = base.non_negative(1.5)  # weight of the other classes' part
    temperature: float = base.positive(1.0)  # T

    def loss(self, params, state, student, teacher, batch, context):
        s, t, y = student.logits, teacher.logits, batch["label"]
        others = losses.soft_cross_entropy(s, t, self.temperature, where=~losses.is_label(t, y))
        cross_entropy = losses.cross_entropy(s, y)
        confidence = jnp.exp(-losses.cross_entropy(t, y))
        terms = {
            "label": cross_entropy.mean(),
            "target": (confidence * cross_entropy).mean(),
            "others": self.gamma * others.mean(),
        }
        return terms, state, {}
