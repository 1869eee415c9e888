"""Knowledge distillation (Hinton et al., 2015, arXiv:1503.02531).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(t / T) || softmax(s / T))
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(0.1)  # weight of the label loss
    beta: float = base.non_negative(0.9)  # weight of the teacher's
    temperature: float = base.positive(4.0)  # T
    standardize: bool = False  # both sides' logits to z-scores first, as lskd does

    def loss(self, params, state, student, teacher, batch, context):
        s, t = base.distilled_logits(student, teacher, self.standardize)
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        distill = losses.kl(s, t, self.temperature).mean()
        return {"label": self.alpha * label, "distill": self.beta * distill}, state, {}
