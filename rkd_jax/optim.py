"""The paper's optimizer: SGD with momentum, coupled weight decay, a rate that falls in steps (counted in epochs)."""

from collections.abc import Sequence

import optax


def create_schedule(
    learning_rate: float, decay_epochs: Sequence[float], decay_factor: float, steps_per_epoch: int
) -> optax.Schedule:
    """step -> rate: `learning_rate`, times `decay_factor` after each of `decay_epochs` (150: from epoch 151 on)."""
    boundaries = {round(epoch * steps_per_epoch): decay_factor for epoch in decay_epochs}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def create_optimizer(
    schedule: optax.Schedule, momentum: float, weight_decay: float, nesterov: bool = False
) -> optax.GradientTransformation:
    """torch.optim.SGD: v = momentum * v + (g + weight_decay * p); p = p - rate * v, for every parameter."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum or None, nesterov))
