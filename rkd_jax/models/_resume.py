"""A network that goes on from a map in its middle, and where its classifier is."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from rkd_jax.models.layers import LAST, Cut


def resume(model: nn.Module, variables: Any, stage: int, x: jax.Array, *, images: Any, **options: Any) -> Any:
    """What a network makes of `x` in place of its own map of `stage`: its Outputs, whose later maps are of `x`.

    With the options of `model.apply`, train=True for one; the running averages stay as they are. `images` are like
    those that x would be of, and only their shape matters: what is computed of them is not used, and dropped by jit.

    Raises:
      ValueError: the network has no `Cut` of that stage, or x is of another shape than the map there.
    """
    put = []

    def replace(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Cut) and context.module.stage == stage:
            put.append(stage)
            if x.shape != args[0].shape:
                raise ValueError(
                    f"{_called(model)} was given a map of shape {x.shape} at Cut({_name(stage)}), where its own has "
                    f"{args[0].shape}"
                )
            return x.astype(args[0].dtype)
        return call(*args, **kwargs)

    with nn.intercept_methods(replace):
        outputs, _ = model.apply(variables, images, mutable=["batch_stats"], **options)
    if not put:
        raise ValueError(f"{_called(model)} has no rkd_jax.models.Cut({_name(stage)}); put one there, in Linen")
    return outputs


def classifier(model: nn.Module, variables: Any, images: Any) -> tuple[str, ...]:
    """The path, in the parameters, of the layer that makes the logits of the average of the map at `Cut(LAST)`.

    Raises:
      ValueError: there is no such cut, or what follows it is no linear layer.
    """
    after: list[Any] = []  # the cut, then the layers behind it

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and (after or (isinstance(module, Cut) and module.stage == LAST)):
            after.append(module)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    if len(after) != 2 or not isinstance(after[1], nn.Dense | nn.Conv):
        raise ValueError(
            f"{_called(model)} does not end with rkd_jax.models.Cut({_name(LAST)}), the average over positions, "
            "and one flax.linen.Dense; let it, in Linen"
        )
    return after[1].path


def _called(model: nn.Module) -> str:
    return f"network {getattr(model, 'name_given', type(model).__name__)!r}"


def _name(stage: int) -> str:
    return "LAST" if stage == LAST else str(stage)
