"""Knowledge distillation with refined logits (Sun et al., ICCV 2025, arXiv:2408.07703).

L = CE(s, y) + min(epoch / warmup_epochs, 1) * (alpha * SC + beta * MC); SC = T_c^2 * KL of the teacher's
(max p_t, 1 - max p_t) to the student's (p_s(y), 1 - p_s(y)) at temperature T_c; MC = T^2 * KL of the softmaxes at
temperature T over the classes whose teacher's logit is below that of y

The epochs count from 1, as in the released code. SC is 0 at s = t only where the teacher is right; MC is 0 where the
teacher ranks y last.
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(1.0)  # weight of the sample confidence, SC
    beta: float = base.non_negative(8.0)  # weight of the masked correlation, MC
    temperature: float = base.positive(4.0)  # T, of MC
    confidence_temperature: float = base.positive(1.0)  # T_c, of SC
    warmup_epochs: float = base.non_negative(20.0)  # epochs until the two have their full weight
    standardize: bool = False  # both sides' logits to z-scores first, as lskd does

    def loss(self, params, state, student, teacher, batch, context):
        y, T_c = batch["label"], self.confidence_temperature
        s, t = base.distilled_logits(student, teacher, self.standardize)
        confidence = T_c**2 * losses.label_kl(s / T_c, t / T_c, y, teacher.logits.argmax(axis=-1)).mean()
        below = teacher.logits < losses.pick(teacher.logits, y)[..., None]
        correlation = losses.kl(s, t, self.temperature, where=below).mean()
        warmup = context.warmup(self.warmup_epochs)
        terms = {
            "label": losses.cross_entropy(student.logits, y).mean(),
            "confidence": warmup * self.alpha * confidence,
            "correlation": warmup * self.beta * correlation,
        }
        return terms, state, {}
