"""Logit standardization in knowledge distillation (Sun et al., CVPR 2024, arXiv:2403.01427).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(Z(t) / T) || softmax(Z(s) / T)), Z(x) = (x - mean x) / (std x + 1e-7)

It is kd with `standardize`, a switch that ctkd, dkd, mlkd, rld and sortkd have too. With it the authors take T = 2 and
larger weights for the teacher's terms: beta 9 for kd and mlkd, 9 times the pair's alpha and beta for dkd (as rld's do
for rld). The standard deviation is over C - 1.
"""

import dataclasses

from rkd_jax.methods import base, kd


@dataclasses.dataclass(frozen=True)
class Method(kd.Method):
    beta: float = 9.0  # weight of the teacher's
    temperature: float = base.positive(2.0)  # T
    standardize: bool = True  # off, it is kd
