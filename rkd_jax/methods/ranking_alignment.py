"""Logit ranking alignment (Lu et al., "Knowledge Distillation Based on Logit Ranking Alignment", ICIC 2025).

L = CE(s, y) + lam * L_RA, L_RA = (1 / C) sum_i d(r(s)_i, r(t)_i) with r the soft rank of strength eps and d the squared
or absolute difference, or L_RA = 1 - Spearman's rho of the soft ranks; with `kd_weight`, Hinton's term is added (Table 4,
last row).
"""

import dataclasses
from typing import ClassVar

from rkd_jax import losses, ranking
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    lam: float = 5.0  # lambda, the weight of the ranking term: 5 on CIFAR-100, 10 on Tiny-ImageNet
    eps: float = 1.0  # regularization strength of the soft rank; at 1, trained networks' ranks are centred logits
    kind: str = "l2"  # d: "l2", "l1", or "spearman"
    kd_weight: float = 0.0  # weight of an added T^2 * KL term; 0: none
    temperature: float = 4.0  # T of the added term

    tuned: ClassVar = {"tiny_imagenet": {"lam": 10.0}}

    def loss(self, params, state, student, teacher, batch, context):
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "ranking": self.lam
            * losses.ranking_alignment(student.logits, teacher.logits, self.eps, self.kind).mean(),
        }
        if self.kd_weight:
            terms["distill"] = self.kd_weight * losses.kl(student.logits, teacher.logits, self.temperature).mean()
        blocks = {
            "student_blocks": ranking.num_blocks(student.logits, self.eps).mean(),
            "teacher_blocks": ranking.num_blocks(teacher.logits, self.eps).mean(),
        }
        return terms, state, blocks
