"""Multi-level logit distillation (Jin et al., CVPR 2023).

L = alpha * [CE(s_w, y) + CE(s_s, y)] + beta * sum over T in {temperature, 3, 5, 2, 6} of [I(T) + B(T) + C(T)],
I = T^2 * KL(softmax(t / T) || softmax(s / T)) of the weak view, masked, plus that of the strong view,
B = |P_t P_t' - P_s P_s'|^2 / batch and C = |P_t' P_t - P_s' P_s|^2 / classes, masked, P = the batch's softmaxes at T

The masks keep the examples and the classes of which the teacher is less certain, at or below the batch's median (of the
largest probability, and of the class' summed probability, in the weak view). The released code, the default here,
multiplies already averaged terms by a mask, which scales them by the kept fraction; its strong sum of I takes the weak
view at T = 2 and 6; B and C are of the weak view alone. `intended` does what the code's names say: the masks choose
examples, and rows of the Gram matrices; the strong sum is of the strong view; B (masked) and C (not masked) of the
strong view are added. `standardize` concerns I alone, as in lskd's code. Needs both views.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import base

WEAK, STRONG = 0, 1
BATCH, CLASS = "tic,tjc->tij", "tbi,tbj->tij"  # Gram matrices of the examples, and of the classes


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(0.1)  # weight of the label loss
    beta: float = base.non_negative(0.9)  # weight of the teacher's
    temperature: float = base.positive(4.0)  # the first of the five temperatures
    intended: bool = False  # masks and views as intended, rather than as released
    standardize: bool = False  # both sides' logits to z-scores first, as lskd does; in I only

    joint_views: ClassVar[bool] = True

    def loss(self, params, state, student, teacher, batch, context):
        s, t = (base.weak_and_strong("mlkd", side) for side in (student, teacher))
        temperatures = jnp.array([self.temperature, 3.0, 5.0, 2.0, 6.0], jnp.float32)
        p_t = jax.nn.softmax(losses.promote(t[WEAK]))
        unsure_examples, unsure_classes = (x <= jnp.median(x) for x in (p_t.max(axis=-1), p_t.sum(axis=0)))

        def masked(values, mask):
            return (values * mask).mean(axis=-1) if self.intended else values.mean(axis=-1) * mask.mean()

        def instance(view):
            """I of each example at each temperature, [5, B]."""
            logits = [losses.standardize(x[view]) if self.standardize else x[view] for x in (s, t)]
            return jax.vmap(lambda T: losses.kl(*logits, T))(temperatures)

        def gram(view, product):
            """Squared differences of the Gram matrices at each temperature, summed over each row."""
            scaled = (losses.promote(x[view]) / temperatures[:, None, None] for x in (s, t))
            probabilities = (jax.nn.softmax(logits) for logits in scaled)
            gram_s, gram_t = (jnp.einsum(product, p, p, precision="highest") for p in probabilities)
            return jnp.sum((gram_t - gram_s) ** 2, axis=-1)

        weak, strong = instance(WEAK), instance(STRONG)
        if not self.intended:
            strong = jnp.concatenate([strong[:3], weak[3:]])
        totals = {
            "instance": masked(weak, unsure_examples) + strong.mean(axis=-1),
            "batch": masked(gram(WEAK, BATCH), unsure_examples),
            "class": masked(gram(WEAK, CLASS), unsure_classes),
        }
        if self.intended:
            totals["batch"] += masked(gram(STRONG, BATCH), unsure_examples)
            totals["class"] += gram(STRONG, CLASS).mean(axis=-1)

        label = sum(losses.cross_entropy(s[view], batch["label"]).mean() for view in (WEAK, STRONG))
        terms = {"label": self.alpha * label} | {name: self.beta * total.sum() for name, total in totals.items()}
        return terms, state, {}
