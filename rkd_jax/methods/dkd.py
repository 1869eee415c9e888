"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv:2203.08679).

L = CE(s, y) + min(epoch / warmup_epochs, 1) * T^2 * (alpha * TCKD + beta * NCKD), at temperature T; TCKD = KL of
(p_y, 1 - p_y), NCKD = KL of the softmaxes over the classes other than y

The epochs count from 1, as in the released code, which leaves the label's logit out of NCKD by subtracting 1000: exact
for logits of ordinary size, and here exact for all.
"""

import dataclasses
from typing import ClassVar

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(1.0)  # weight of the target class' part, TCKD
    beta: float = base.non_negative(8.0)  # weight of the other classes' part, NCKD
    temperature: float = base.positive(4.0)  # T
    warmup_epochs: float = base.non_negative(20.0)  # epochs until the two have their full weight
    standardize: bool = False  # both sides' logits to z-scores first, as lskd does

    tuned: ClassVar = {
        "resnet20": {"beta": 2.0},
        "resnet32": {"beta": 2.0},
        "wrn_16_2": {"beta": 6.0},
        "wrn_40_1": {"beta": 6.0},
        "vgg8": {"beta": 6.0},
        "vgg13>mobilenetv2": {"beta": 6.0},
    }

    def loss(self, params, state, student, teacher, batch, context):
        y, T = batch["label"], self.temperature
        s, t = base.distilled_logits(student, teacher, self.standardize)
        target = T**2 * losses.label_kl(s / T, t / T, y, y).mean()
        others = losses.kl(s, t, T, where=~losses.is_label(t, y)).mean()
        warmup = context.warmup(self.warmup_epochs)
        terms = {
            "label": losses.cross_entropy(student.logits, y).mean(),
            "target": warmup * self.alpha * target,
            "others": warmup * self.beta * others,
        }
        return terms, state, {}
