"""Curriculum temperature for knowledge distillation (Li et al., AAAI 2023, arXiv:2211.16231).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(t / T) || softmax(s / T)), T = lowest_temperature
+ temperature_range * sigmoid(theta)

One theta for the whole run, 1 at first (T = 15.62), trained to raise the loss: its gradient is multiplied by a factor
that goes from 0 to -1 along a cosine, constant within an epoch: -0.0245 in the first, -1 from epoch `curriculum_epochs`
on. The gradient is that of the whole term, T^2 included. This is the paper's global temperature; its instance-wise one,
predicted from the logits by a small network, is not here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(0.1)  # weight of the label loss
    beta: float = base.non_negative(0.9)  # weight of the teacher's
    lowest_temperature: float = base.positive(1.0)  # T where theta is -infinity
    temperature_range: float = base.non_negative(20.0)  # how far T may rise above it
    curriculum_epochs: float = base.positive(10.0)  # epochs until the reversed gradient has its full size
    standardize: bool = False  # both sides' logits to z-scores first, as lskd does

    def init(self, rng, student, teacher, num_examples):
        return {"theta": jnp.float32(1)}, {}

    def loss(self, params, state, student, teacher, batch, context):
        done = jnp.minimum(context.epoch_number() / self.curriculum_epochs, 1.0)
        theta = scale_gradient(params["theta"], (jnp.cos(jnp.pi * done) - 1) / 2)
        temperature = self.lowest_temperature + self.temperature_range * jax.nn.sigmoid(theta)
        s, t = base.distilled_logits(student, teacher, self.standardize)
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        distill = losses.kl(s, t, temperature).mean()
        terms = {"label": self.alpha * label, "distill": self.beta * distill}
        return terms, state, {"temperature": temperature}


def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x, whose gradient is multiplied by `factor`."""
    return factor * x + jax.lax.stop_gradient(x - factor * x)
