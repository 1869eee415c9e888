"""Parameter-free logit distillation via a sorting mechanism (Limantoro, IEEE SPL 2025, arXiv:2508.16544).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(t' / T) || softmax(s / T)), t' = t with y ranked first

t' has the values of t: the label gets the largest, and the other classes the rest, in the teacher's order. Where the
teacher is right, it is kd.
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import kd


@dataclasses.dataclass(frozen=True)
class Method(kd.Method):
    def loss(self, params, state, student, teacher, batch, context):
        teacher = teacher._replace(logits=losses.label_first(teacher.logits, batch["label"]))
        return super().loss(params, state, student, teacher, batch, context)
