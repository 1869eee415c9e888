"""Knowledge distillation (Hinton et al., 2015, arXiv:1503.02531).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(t / T) || softmax(s / T))
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = 0.1  # weight of the label loss
    beta: float = 0.9  # weight of the teacher's
    temperature: float = 4.0  # T

    def loss(self, params, state, student, teacher, batch, context):
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        distill = losses.kl(student.logits, teacher.logits, self.temperature).mean()
        return {"label": self.alpha * label, "distill": self.beta * distill}, state, {}
