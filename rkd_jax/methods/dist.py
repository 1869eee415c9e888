"""DIST, "Knowledge distillation from a stronger teacher" (Huang et al., NeurIPS 2022, arXiv:2205.10536).

L = CE(s, y) + T^2 * [beta * mean over examples of (1 - Pearson(p_s, p_t) over classes)
+ gamma * mean over classes of (1 - Pearson(p_s, p_t) over the batch)], p = softmax at temperature T

As in the released code, 1e-8 is added to the correlation's denominator.
"""

import dataclasses

import jax

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(2.0)  # weight of the relations within an example, over classes
    gamma: float = base.non_negative(2.0)  # weight of the relations within a class, over the batch
    temperature: float = base.positive(4.0)  # T

    def loss(self, params, state, student, teacher, batch, context):
        T = self.temperature
        p_s, p_t = (jax.nn.softmax(losses.promote(side.logits) / T) for side in (student, teacher))
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "inter": self.beta * T**2 * (1 - losses.pearson(p_s, p_t, epsilon=1e-8)).mean(),
            "intra": self.gamma * T**2 * (1 - losses.pearson(p_s.T, p_t.T, epsilon=1e-8)).mean(),
        }
        return terms, state, {}
