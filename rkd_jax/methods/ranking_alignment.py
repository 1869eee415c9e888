"""Logit ranking alignment (Lu et al., "Knowledge Distillation Based on Logit Ranking Alignment", ICIC 2025).

L = CE(s, y) + lam * L_RA, L_RA = (1 / C) sum_i d(r(s)_i, r(t)_i) with r the soft rank of strength eps and d the squared
or absolute difference, or L_RA = 1 - Spearman's rho of the soft ranks; + kd_weight * T^2 * KL(softmax(t / T) ||
softmax(s / T)), 0 but in the last row of Table 4
"""

import dataclasses
from typing import ClassVar

from rkd_jax import losses, ranking
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    lam: float = base.non_negative(5.0)  # lambda, the weight of the ranking term: 5 on CIFAR-100, 10 on Tiny-ImageNet
    eps: float = base.positive(1.0)  # strength of the soft rank; at 1, a trained network's ranks are its centred logits
    kind: str = base.one_of("l2", "l1", "spearman")  # d: the difference squared, or absolute; or 1 - rho
    rank_scale: str = base.one_of("paper", "logits")  # r as it is, or eps * r, so that lam means the same at every eps
    kd_weight: float = base.non_negative(0.0)  # weight of an added T^2 * KL term; 0: none
    temperature: float = base.positive(4.0)  # T of the added term

    weighted_by: ClassVar = {"temperature": "kd_weight"}
    tuned: ClassVar = {"tiny_imagenet": {"lam": 10.0}}

    def loss(self, params, state, student, teacher, batch, context):
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "ranking": self.lam
            * losses.ranking_alignment(
                student.logits, teacher.logits, self.eps, self.kind, rank_scale=self.rank_scale
            ).mean(),
        }
        if self.kd_weight:
            terms["distill"] = self.kd_weight * losses.kl(student.logits, teacher.logits, self.temperature).mean()
        student_blocks = ranking.num_blocks(student.logits, self.eps)
        blocks = {
            "student_blocks": student_blocks.mean(),
            "student_one_block": (student_blocks == 1).mean(),  # of these rows, only the centred logits are matched
            "teacher_blocks": ranking.num_blocks(teacher.logits, self.eps).mean(),
        }
        return terms, state, blocks
