"""The schedule and the optimizer: the paper's SGD at a rate that falls in steps, a cosine, optax's, the user's own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import optax

from rkd_jax import _own

OPTIONS = ("momentum", "nesterov", "weight_decay")  # config fields that an optimizer may take
DECAY = ("decay_epochs", "decay_factor")  # and that a schedule may


def create_schedule(
    name: str,
    learning_rate: float,
    *,
    num_steps: int,
    steps_per_epoch: int,
    decay_epochs: Sequence[float] = (),
    decay_factor: float = 0.1,
    warmup_epochs: float = 0.0,
) -> optax.Schedule:
    """step -> learning rate; for the first `warmup_epochs`, multiplied by (step + 1) / (steps of warm-up).

    "step": `learning_rate`, times `decay_factor` after each of `decay_epochs` (150: from epoch 151 on).
    "cosine": learning_rate (1 + cos(pi step / num_steps)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983).
    "my_module:factory": what factory(learning_rate=..., ...) returns, with those of num_steps, steps_per_epoch,
    decay_epochs and decay_factor that it takes by name.
    Raises ValueError for another name, and where a factory makes no schedule.
    """
    factory, field = _schedule(name), f"config.schedule={name!r}"
    options = {"num_steps": num_steps, "steps_per_epoch": steps_per_epoch}
    options |= dict(zip(DECAY, (decay_epochs, decay_factor), strict=True))
    names = _own.parameters(factory)
    try:
        schedule = factory(learning_rate=learning_rate, **{each: options[each] for each in options if each in names})
    except TypeError as error:
        raise ValueError(f"{field}: {error}; it is called as factory(learning_rate=..., num_steps=...)") from error
    if not callable(schedule):
        raise ValueError(f"{field} returned a {type(schedule).__name__}; return a function of the step")
    rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    if getattr(rate, "shape", None) != () or not jnp.issubdtype(rate.dtype, jnp.floating):
        raise ValueError(f"{field} returned a function whose value is {rate}; it has to be one float, the rate")
    if not (warmup := round(warmup_epochs * steps_per_epoch)):
        return schedule
    return lambda step: schedule(step) * jnp.minimum((step + 1) / warmup, 1.0)


def schedule_takes(name: str) -> tuple[str, ...]:
    """Those of `DECAY` that a schedule takes; ValueError for a name that is none."""
    names = _own.parameters(_schedule(name))
    return tuple(option for option in DECAY if option in names)


def _schedule(name: str) -> Callable[..., optax.Schedule]:
    if name in SCHEDULES:
        return SCHEDULES[name]
    if ":" not in name:
        raise ValueError(
            f"config.schedule={name!r} is none of {', '.join(map(repr, SCHEDULES))}; write one of them, or "
            "my_module:factory for your own"
        )
    return _own.load(name, "config.schedule", "factory")


def _step(
    learning_rate: float, steps_per_epoch: int, decay_epochs: Sequence[float], decay_factor: float
) -> optax.Schedule:
    boundaries: dict[int, float] = {}
    for epoch in decay_epochs:  # two may fall into one step, and some behind all that can be counted
        if (step := round(epoch * steps_per_epoch)) <= jnp.iinfo(jnp.int32).max:
            boundaries[step] = boundaries.get(step, 1.0) * decay_factor
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def _cosine(learning_rate: float, num_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(learning_rate, num_steps)


SCHEDULES = {"step": _step, "cosine": _cosine}


def create_optimizer(
    name: str, schedule: optax.Schedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The optimizer of that name, for every parameter.

    "sgd" is torch.optim.SGD: v = momentum * v + (g + weight_decay * p); p = p - rate * v. "optax:adamw", or another
    my_module:factory, is factory(learning_rate=schedule) with those of the options that it takes by name.
    Raises ValueError where it cannot be used, or does not take a weight_decay that is not 0.
    """
    factory, field = _factory(name), f"config.optimizer={name!r}"
    options = dict(zip(OPTIONS, (momentum, nesterov, weight_decay), strict=True))
    if "schedule_free" in name:
        raise ValueError(f"{field} is tested at averaged parameters, which this loop does not do; take another")
    try:
        tx = factory(learning_rate=schedule, **{option: options[option] for option in taken(name)})
    except TypeError as error:
        raise ValueError(f"{field}: {error}; it is called as factory(learning_rate=schedule, ...)") from error
    if not isinstance(tx, optax.GradientTransformation):
        way = "; its .gradient_transformation() is one" if hasattr(tx, "gradient_transformation") else ""
        raise ValueError(f"{field} returned a {type(tx).__name__}; return an optax.GradientTransformation{way}")
    if weight_decay and "weight_decay" not in taken(name):
        raise ValueError(f"{field} takes no weight_decay; set config.weight_decay=0, or take another")
    return tx


def taken(name: str) -> tuple[str, ...]:
    """Those of `OPTIONS` that an optimizer takes."""
    names = _own.parameters(_factory(name))
    return tuple(option for option in OPTIONS if option in names)


@contextlib.contextmanager
def used() -> Iterator[None]:
    """An error of an optimizer as it meets the parameters, or their gradients, names the field."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        said = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"config.optimizer cannot be used here: {said}. It is given the gradients of {{'student': ..., 'method': "
            "...}, the trees of both, and these parameters"
        ) from error


def _factory(name: str) -> Callable[..., optax.GradientTransformation]:
    if name == "sgd":
        return _sgd
    if ":" not in name:
        mend = f"'optax:{name.lower()}', or " if name.lower() != "sgd" and hasattr(optax, name.lower()) else ""
        raise ValueError(
            f"config.optimizer={name!r} is not one of this package, which has 'sgd'; write {mend or 'that, or '}"
            "my_module:factory for your own"
        )
    return _own.load(name, "config.optimizer", "factory")


def _sgd(
    learning_rate: optax.Schedule, momentum: float, weight_decay: float, nesterov: bool
) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum or None, nesterov))
