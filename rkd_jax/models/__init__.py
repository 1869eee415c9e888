"""Networks by the names of the distillation community, one file per family. (being written)"""

from typing import NamedTuple

import jax


class Outputs(NamedTuple):
    """What every network returns, float32.

    `features` are the stages' maps after their activation, NHWC, and `preactivations` the same maps before it;
    what is not used costs nothing under jit.
    """

    logits: jax.Array  # [B, C]
    features: tuple[jax.Array, ...]  # per stage, NHWC, after the activation
    embedding: jax.Array  # [B, D], the classifier's input
    preactivations: tuple[jax.Array, ...] = ()  # per stage, NHWC, before the activation
