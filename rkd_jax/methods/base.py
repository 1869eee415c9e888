"""The protocol that every distillation method follows.

A method is a frozen dataclass named `Method` in its own file; its fields are its hyper-parameters and only `loss` is
required. `config.method = "dkd"` loads `rkd_jax/methods/dkd.py`; `"my_module:Method"` loads a class of yours. Its
module's docstring is the method's page: the paper, a blank line, the formula, and after another whatever else to know.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from rkd_jax import losses
from rkd_jax.models import Outputs

Params = Any  # trained beside the student's, by the same optimizer
State = Any  # carried from step to step, not differentiated
Terms = dict[str, jax.Array]  # named scalars, already weighted, whose sum is the loss; "label" is the cross-entropy
Metrics = dict[str, jax.Array]  # named scalars to log; "top1" in place of that of the student's logits


class Context(NamedTuple):
    """Where in the run a step is."""

    rng: jax.Array  # a key of this step and view alone
    step: jax.Array  # int32, from 0
    epoch: jax.Array  # float32, step / steps per epoch
    progress: jax.Array  # float32 in [0, 1), step / all steps
    # What a network makes of a map [B, H, W, K] in place of its own of a stage (see `rkd_jax.models.resume`), batch
    # normalisation by the batch: (stage, map) -> Outputs. With a gradient to the map, and to the student's parameters.
    resume_student: Callable[[int, jax.Array], Outputs] | None = None
    resume_teacher: Callable[[int, jax.Array], Outputs] | None = None

    def epoch_number(self) -> jax.Array:
        """1 throughout the first epoch, 2 throughout the second: how the methods' released codes count."""
        return jnp.floor(self.epoch) + 1

    def warmup(self, epochs: float) -> jax.Array:
        """min(epoch number / epochs, 1): a weight that rises by epochs; 1 where epochs is 0."""
        return jnp.minimum(self.epoch_number() / epochs, 1.0) if epochs else jnp.float32(1)


def positive(default: float) -> Any:
    """A hyper-parameter that has to be above 0."""
    return dataclasses.field(default=default, metadata={"claim": (lambda value: value > 0, "has to be above 0")})


def non_negative(default: float) -> Any:
    """A hyper-parameter that has to be 0 or above."""
    return dataclasses.field(default=default, metadata={"claim": (lambda value: value >= 0, "has to be 0 or above")})


def fraction(default: float) -> Any:
    """A hyper-parameter from 0 to 1."""
    return dataclasses.field(default=default, metadata={"claim": (lambda value: 0 <= value <= 1, "has to be 0 to 1")})


def one_of(default: str, *others: str) -> Any:
    """A hyper-parameter with a few values."""
    values = (default, *others)
    claim = "has to be one of " + ", ".join(map(repr, values))
    return dataclasses.field(default=default, metadata={"claim": (lambda value: value in values, claim)})


@dataclasses.dataclass(frozen=True)
class Distiller:
    """A method: its hyper-parameters, and the loss they make.

    A field whose type is Distiller is another method, given by its name; fields that this method lacks are that one's.
    """

    needs_teacher: ClassVar[bool] = True
    joint_views: ClassVar[bool] = False  # True: loss gets all views at once; every array has a leading view axis
    # True: the optimizer is called as tx.update(grads, state, params, term_grads={"label": ..., "distill": ...}),
    # the gradients of the label term and of the sum of the others.
    per_term_gradients: ClassVar[bool] = False
    resumes_teacher: ClassVar[bool] = False  # True: loss resumes the teacher, whose batch normalisation is not folded
    # Fields of a term that is left out until the field of its weight is set: to set the former alone is an error.
    weighted_by: ClassVar[Mapping[str, str]] = {}
    # Values that the authors use elsewhere than in the dataclass' defaults: data set, student or "teacher>student", in
    # lower case and in rising precedence -> fields. They apply where the config leaves a field unset.
    tuned: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self):
        """ValueError for a hyper-parameter of another type, that is not finite, or that breaks its own claim."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong = _wrong_type(field.default, value)
            if not wrong and "claim" in field.metadata:
                holds, claim = field.metadata["claim"]
                wrong = "" if holds(value) else claim
            if wrong:
                raise ValueError(f"config.{field.name}={value!r} {wrong}; unset, it is {field.default!r}")

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

    def deploy(self, network: nn.Module, images: Any, variables: Any, params: Params, state: State) -> Any:
        """Returns the student's variables as they are tested and saved: {"params": ..., "batch_stats": ...}.

        `variables` are those that are trained, `images` is like the network's input, and may be a ShapeDtypeStruct.
        """
        del network, images, params, state
        return variables

    def wrap_optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns the optimizer to use in place of `tx`."""
        return tx


def _wrong_type(default: Any, value: Any) -> str:
    """What a value has to be that stands where `default` is the default; "" where it is."""
    if isinstance(default, float) and isinstance(value, str | None | Sequence):
        return "has to be a number"
    if isinstance(default, bool) and not isinstance(value, bool):
        return "has to be True or False"
    if type(default) is int and type(value) is not int:
        return "has to be a whole number"
    if isinstance(value, float) and not math.isfinite(value):
        return "has to be finite"
    return ""


def distilled_logits(student: Outputs, teacher: Outputs, standardize: bool) -> tuple[jax.Array, jax.Array]:
    """Both sides' logits in float32 at least, as z-scores where `standardize` (Sun et al., 2024)."""
    prepare = losses.standardize if standardize else losses.promote
    return prepare(student.logits), prepare(teacher.logits)


def weak_and_strong(name: str, outputs: Outputs) -> tuple[jax.Array, jax.Array]:
    """The logits of the weak and of the strong view, [2, B, C] -> [B, C] each; ValueError for other views."""
    if outputs.logits.ndim != 3 or outputs.logits.shape[0] != 2:
        views = outputs.logits.shape[0] if outputs.logits.ndim == 3 else 1
        raise ValueError(
            f"config.method={name!r} compares a weak view with a strong one, and config.views gives {views}; "
            "set config.views to 'both', or to two with + between"
        )
    return outputs.logits[0], outputs.logits[1]
