"""A Flax NNX network of the user's own as a Linen module, which everything here applies, trains and saves."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx


def to_linen(factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The Linen module of the NNX module factory(rngs=..., **options), or what else the factory returns.

    It is called as module(images, train=...); its Params are "params", its BatchStats "batch_stats".
    """
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(factory(rngs=nnx.Rngs(0), **options)))  # no array is computed
    if not isinstance(made[0], nnx.Module):
        return made[0]
    return FromNNX(functools.partial(_create, factory, options), metadata_fn=None)


class FromNNX(nnx.bridge.ToLinen):
    """Flax's bridge, with a call as Linen's."""

    def __call__(self, images: jax.Array, train: bool = False) -> Any:
        """What the network returns, in its mode for training or the other."""
        return super().__call__(images, nnx_method=functools.partial(_call, train=train))


def _create(factory: Callable[..., nnx.Module], options: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """The network, from Linen's keys: "params" for what is drawn as it is made, "dropout" for what each step draws."""
    streams = {"dropout": rngs["dropout"]()} if "dropout" in rngs else {}
    made_of = rngs["params" if "params" in rngs else "default"]  # the latter where its Params then are replaced
    return factory(rngs=nnx.Rngs(made_of(), **streams), **options)


def _call(network: nnx.Module, images: jax.Array, *, train: bool) -> Any:
    (network.train if train else network.eval)()
    option = {"train": train} if "train" in inspect.signature(type(network).__call__).parameters else {}
    return network(images, **option)
