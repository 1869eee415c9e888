"""A Flax NNX network of the user's own as a Linen module, which everything here applies, trains and saves."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util

COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


def to_linen(factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The Linen module of the NNX module factory(rngs=..., **options), or what else the factory returns.

    TypeError where the module keeps arrays that would be made anew, or names them as Linen cannot.
    """
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(factory(rngs=nnx.Rngs(0), **options)))  # no array is computed
    if not isinstance(made[0], nnx.Module):
        return made[0]
    _check(made[0])
    return FromNNX(functools.partial(factory, **options))


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
        drawn = "params" if first else "dropout"
        key = self.make_rng(drawn) if first or self.has_rng(drawn) else jax.random.key(0)  # of nothing that is used
        network = self.create(rngs=nnx.Rngs(key))
        (self._keep if first else self._give)(network)
        (network.train if train else network.eval)()
        option = {"train": train} if "train" in inspect.signature(type(network).__call__).parameters else {}
        outputs = network(images, **option)
        if not first:
            self._keep(network)
        return outputs

    def _keep(self, network: nnx.Module) -> None:
        named: dict[str, dict[tuple[str, ...], jax.Array]] = {}
        for collection, path, variable in _variables(network):
            if self.is_mutable_collection(collection):
                named.setdefault(collection, {})[tuple(map(str, path))] = variable[...]
        for collection, arrays in named.items():
            for name, array in traverse_util.unflatten_dict(arrays).items():
                self.put_variable(collection, name, array)

    def _give(self, network: nnx.Module) -> None:
        kept = traverse_util.flatten_dict(dict(self.variables))
        given = {path: kept[collection, *map(str, path)] for collection, path, _ in _variables(network)}
        nnx.update(network, traverse_util.unflatten_dict(given))


def _variables(network: nnx.Module) -> Iterator[tuple[str, tuple[Any, ...], nnx.Variable]]:
    """A network's variables with Linen's collection, or their kind where that has none, and their path."""
    for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Not(nnx.RngState))):
        if isinstance(leaf, nnx.Variable):  # else it is a NumPy array, a constant that the network makes itself
            collections = [name for kind, name in COLLECTIONS.items() if isinstance(leaf, kind)]
            yield (collections or [type(leaf).__name__])[0], path, leaf


def _check(network: nnx.Module) -> None:
    """TypeError where a network, as traced, has what `FromNNX` cannot carry on."""
    if hasattr(network, "params"):
        raise TypeError("its attribute 'params' has the name of a collection of Linen's; rename it")
    attributes = [((*path, name), x) for path, module in nnx.iter_modules(network) for name, x in vars(module).items()]
    for path, x in [*attributes, *nnx.to_flat_state(nnx.state(network))]:  # the state has those in lists and dicts
        if isinstance(x, jax.Array):
            raise TypeError(
                f"its array {'.'.join(map(str, path))} is no nnx.Variable, and would be made anew in each step; make "
                "it an nnx.Param, an nnx.BatchStat, which is carried on, or, of constants, a NumPy array"
            )
