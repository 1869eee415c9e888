"""The protocol that every distillation method follows.

A method is a frozen dataclass named `Method` in its own file; its fields are its hyper-parameters and only `loss` is
required. `config.method = "dkd"` loads `rkd_jax/methods/dkd.py`; `"my_module:Method"` loads a class of yours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from rkd_jax.models import Outputs

Params = Any  # trained beside the student's, by the same optimizer
State = Any  # carried from step to step, not differentiated
Terms = dict[str, jax.Array]  # named scalars, already weighted; their sum is the loss; "label" is the cross-entropy part
Metrics = dict[str, jax.Array]  # named scalars to log


class Context(NamedTuple):
    """Where in the run a step is."""

    rng: jax.Array  # a key of this step and view alone
    step: jax.Array  # int32, from 0
    epoch: jax.Array  # float32, step / steps per epoch
    progress: jax.Array  # float32 in [0, 1), step / all steps


@dataclasses.dataclass(frozen=True)
class Distiller:
    """A method: its hyper-parameters, and the loss they make."""

    needs_teacher: ClassVar[bool] = True
    joint_views: ClassVar[bool] = False  # True: loss gets all views at once; every array has a leading view axis
    # True: the optimizer is called as tx.update(grads, state, params, term_grads={"label": ..., "distill": ...}),
    # the gradients of the label term and of the sum of the others.
    per_term_gradients: ClassVar[bool] = False
    # Values that the authors use elsewhere than in the dataclass' defaults: data set, student or "teacher>student", in
    # lower case and in rising precedence -> fields. They apply where the config leaves a field unset.
    tuned: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def init(self, rng: jax.Array, student: Outputs, teacher: Outputs, num_examples: int) -> tuple[Params, State]:
        """Returns what the method trains and what it carries; the outputs (of one view) are jax.ShapeDtypeStructs."""
        del rng, student, teacher, num_examples
        return {}, {}

    def loss(
        self,
        params: Params,
        state: State,
        student: Outputs,
        teacher: Outputs | None,
        batch: Mapping[str, jax.Array],  # "label" [B] int32, "index" [B] int32: the position in the training set
        context: Context,
    ) -> tuple[Terms, State, Metrics]:
        """Returns the terms of one view's loss (of all views' where joint_views), the next state, what to log."""
        raise NotImplementedError

    def wrap_optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns the optimizer to use in place of `tx`."""
        return tx
