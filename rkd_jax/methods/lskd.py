"""Logit standardization in knowledge distillation (Sun et al., CVPR 2024, arXiv:2403.01427).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(Z(t) / T) || softmax(Z(s) / T)), Z(x) = (x - mean x) / (std x + 1e-7)

It is kd with `standardize`, a switch that ctkd, dkd, mlkd, rld, sortkd and takd have too. With it the authors take T =
2 and larger weights for the teacher's terms: by their README's commands beta 9 for kd, ctkd (whose temperature is
learned) and mlkd, 9 times the pair's alpha and beta for dkd (as rld's do for rld). Their published logs are named after
temperature and weight: the pairs below are theirs, and for dkd and mlkd the weights are other ones for some pairs (dkd
9 to 18, mlkd 6 or 9). The standard deviation is over C - 1.
"""

import dataclasses
from typing import ClassVar

from rkd_jax.methods import base, kd


@dataclasses.dataclass(frozen=True)
class Method(kd.Method):
    beta: float = base.non_negative(9.0)  # weight of the teacher's
    temperature: float = base.positive(2.0)  # T
    standardize: bool = True  # off, it is kd

    tuned: ClassVar = {
        "vgg13>vgg8": {"temperature": 3.0},
        "vgg13>mobilenetv2": {"temperature": 3.0},
        "resnet50>mobilenetv2": {"temperature": 3.0, "beta": 1.0},
    }
