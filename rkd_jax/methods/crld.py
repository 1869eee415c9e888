"""Cross-view consistency regularisation (Zhang et al., ACM MM 2024, arXiv:2412.16493).

L = CE(s_w, y) + CE(s_s, y) + within_weight * 1(max p(t_w) >= weak_threshold) * [KL(t_w, s_w) + KL(t_s, s_s)]
+ cross_weight * 1(max p(t_s) >= strong_threshold) * [KL(t_w, s_s) + KL(t_s, s_w)],
KL(t, s) = T^2 * KL(softmax(t / T) || softmax(s / T)), w and s the weak and the strong view

The masks compare probabilities at temperature 1, and masked examples count in the mean. Needs both views.
"""

import dataclasses
from typing import ClassVar

import jax

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    within_weight: float = base.non_negative(2.0)  # weight of the terms within a view
    cross_weight: float = base.non_negative(0.5)  # weight of the terms across views
    weak_threshold: float = base.fraction(0.9)  # the teacher's probability in the weak view from which "within" counts
    strong_threshold: float = base.fraction(0.2)  # its probability in the strong view from which "cross" counts
    temperature: float = base.positive(4.0)  # T

    joint_views: ClassVar[bool] = True
    tuned: ClassVar = {"tiny_imagenet": {"temperature": 2.0, "within_weight": 4.0, "cross_weight": 1.0}}

    def loss(self, params, state, student, teacher, batch, context):
        (s_w, s_s), (t_w, t_s) = (base.weak_and_strong("crld", side) for side in (student, teacher))
        T, y = self.temperature, batch["label"]
        sure_w, sure_s = (
            jax.nn.softmax(losses.promote(t)).max(axis=-1) >= threshold
            for t, threshold in ((t_w, self.weak_threshold), (t_s, self.strong_threshold))
        )
        terms = {
            "label": (losses.cross_entropy(s_w, y) + losses.cross_entropy(s_s, y)).mean(),
            "within": self.within_weight * (sure_w * (losses.kl(s_w, t_w, T) + losses.kl(s_s, t_s, T))).mean(),
            "cross": self.cross_weight * (sure_s * (losses.kl(s_s, t_w, T) + losses.kl(s_w, t_s, T))).mean(),
        }
        return terms, state, {}
