"""A Flax NNX network of the user's own as a Linen module, which everything here applies, trains and saves."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


def to_linen(factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The Linen module of the NNX module factory(rngs=..., **options), or what else the factory returns."""
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(factory(rngs=nnx.Rngs(0), **options)))  # no array is computed
    return FromNNX(functools.partial(factory, **options)) if isinstance(made[0], nnx.Module) else made[0]


class FromNNX(nn.Module):
    """An NNX network that is made anew each time it is traced, and then given the variables that Linen keeps.

    Its Params are "params", its BatchStats "batch_stats", each under its path. Unlike Flax's nnx.bridge.ToLinen: every
    name in a path is a str, also of those in a list, so that they are on disk what they are here; the network is set to
    train() or eval(); what a step draws at random is of Linen's key "dropout", whatever it is for.
    """

    create: Callable[..., nnx.Module]  # called with rngs

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Any:
        """What the network returns, which is told `train` too where it takes it."""
        first = self.is_initializing()
        key = self.make_rng("params") if first else jax.random.key(0)  # whose Params are replaced
        streams = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
        network = self.create(rngs=nnx.Rngs(key, **streams))
        (self._keep if first else self._give)(network)
        (network.train if train else network.eval)()
        option = {"train": train} if "train" in inspect.signature(type(network).__call__).parameters else {}
        outputs = network(images, **option)
        if not first:
            self._keep(network)
        return outputs

    def _keep(self, network: nnx.Module) -> None:
        for collection, arrays in _collections(network).items():
            if self.is_mutable_collection(collection):
                named = {tuple(map(str, path)): array for path, array in arrays.items()}
                for name, array in traverse_util.unflatten_dict(named).items():
                    self.put_variable(collection, name, array)

    def _give(self, network: nnx.Module) -> None:
        for collection, arrays in _collections(network).items():
            kept = traverse_util.flatten_dict(self.variables.get(collection, {}))
            given = {path: kept[tuple(map(str, path))] for path in arrays}
            nnx.update(network, traverse_util.unflatten_dict(given))


def _collections(network: nnx.Module) -> dict[str, dict[tuple[Any, ...], jax.Array]]:
    """A network's arrays by path, in Linen's collections; those of other kinds by the kind's name."""
    found: dict[str, dict[tuple[Any, ...], jax.Array]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Not(nnx.RngState))):
        names = [name for kind, name in COLLECTIONS.items() if isinstance(variable, kind)] or [type(variable).__name__]
        found.setdefault(names[0], {})[path] = variable[...]
    return found
