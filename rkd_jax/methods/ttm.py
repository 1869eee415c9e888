"""Transformed teacher matching (Zheng and Yang, ICLR 2024, arXiv:2402.11148).

L = CE(s, y) + beta * w * KL(p_t^power / sum p_t^power || p_s), p = softmax at temperature 1; w = 1, or, where
`weighted` (WTTM), the example's sum p_t^power

The teacher's temperature is 1 / power, the student's 1, and there is no T^2. WTTM's weights are not normalised: 26 to
39 for 100 classes at power 0.1, so it needs a smaller beta of its own. beta = 45 is the authors' for vgg13 > vgg8, the
one pair whose command they publish. Their paper lists power and beta of every pair (appendix A.4); those are not here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(45.0)  # weight of the teacher's term
    power: float = base.positive(0.1)  # gamma, of the teacher's probabilities
    weighted: bool = False  # WTTM: each example by the sum of the teacher's powers, more for the less certain

    def loss(self, params, state, student, teacher, batch, context):
        powers = self.power * jax.nn.log_softmax(losses.promote(teacher.logits))
        matching = losses.kl(student.logits, powers)
        if self.weighted:
            matching = matching * jnp.exp(powers).sum(axis=-1)
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        return {"label": label, "distill": self.beta * matching.mean()}, state, {}
