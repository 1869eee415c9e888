"""Networks by the names of the distillation community, one file per family; its NETWORKS maps names to factories.

>>> model = create("resnet8x4", num_classes=100)
>>> variables = model.init(jax.random.key(0), images, train=False)  # images [B, H, W, K], normalised float
>>> outputs = model.apply(variables, images, train=False)
>>> outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

A name with a form of its own for a size of image has it as NAME_64x64; `image_size=64` finds it. A network of your own
is "my_module:factory", where factory(num_classes=...) returns a Flax module, Linen or NNX (see `create`).
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import _own
from rkd_jax.losses import promote
from rkd_jax.models._fold import fold
from rkd_jax.models._resume import classifier, resume
from rkd_jax.models.layers import LAST, Cut, in_turn

__all__ = [
    "LAST", "Adapter", "Cut", "Cuts", "Outputs", "classifier", "create", "fold", "in_turn", "names", "resolve",
    "resume",
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cuts:
    """The maps that a network's stages hand on, each marked by a `Cut`: from here `resume` can go on with another."""

    maps: Sequence[jax.Array]  # [B, H, W, K] each, of stage 0, the stem, and on; the last one is read for its average
    activated: bool = dataclasses.field(metadata={"static": True})  # after the activation; else that follows, if any


class Outputs(NamedTuple):
    """What every network returns, float32; a network of your own may leave out all but the logits.

    `features` are the stages' maps as they hand them on, after their activation where they end with one, and
    `preactivations` the maps before it, from the stem on; each family's file says where they lie. What is not used
    costs nothing under jit.
    """

    logits: jax.Array  # [B, C]
    features: tuple[jax.Array, ...] = ()  # per stage, NHWC
    embedding: jax.Array | None = None  # [B, D], the classifier's input
    preactivations: tuple[jax.Array, ...] = ()  # per stage, NHWC, before the activation
    class_maps: jax.Array | None = None  # [B, H, W, C], the classifier at each position; their average is the logits
    last_map: jax.Array | None = None  # [B, H, W, D], whose average is the embedding; not every network's last feature
    cuts: Cuts | None = None  # where `resume` can go on from

    @classmethod
    def of(cls, *arrays: Any, **named: Any) -> "Outputs":
        """The outputs as float32, whatever the compute dtype; called as the class is."""
        found = cls(*arrays, **named)
        found = found._replace(features=tuple(found.features), preactivations=tuple(found.preactivations))
        return jax.tree.map(promote, found)


def create(
    name: str,
    num_classes: int,
    dtype: Any = jnp.float32,
    image_size: int | None = None,
    field: str = "config.student",
) -> nn.Module:
    """The network of that name, case-insensitive; its `__call__(images, train=False)` returns `Outputs`.

    Args:
      name: one of `names()`, or "my_module:factory" for your own: factory(num_classes=...) returns a Linen module,
        called as module(images, train=...), or factory(num_classes=..., rngs=...) an NNX one, called as
        module(images) after its train() or eval(), and with train=... where it takes that. What it returns are Outputs
        or logits [B, C]. The factory, which may be the module's class, is given dtype if it takes one, and has to take
        it where that is not float32.
      num_classes: C.
      dtype: compute dtype, float32 or bfloat16; parameters, batch normalisation and all outputs are float32.
      image_size: side of the images, for the names that have a form of their own at that size.
      field: the config field that gave the name, for the error.

    Raises:
      ValueError: no such network (names the nearest), or a module of one's own that cannot be used.
    """
    if ":" in name:
        return _create_own(name, num_classes, dtype, field)
    return _networks()[resolve(name, image_size, field)](num_classes=num_classes, dtype=dtype)


def resolve(name: str, image_size: int | None = None, field: str = "config.student") -> str:
    """The network's name as `names()` spells it, in its form for images of that size; ValueError as of `create`."""
    if ":" in name:
        return name
    spelled = {known.lower(): known for known in names()}
    if name.lower() not in spelled:
        near = difflib.get_close_matches(name.lower(), spelled, n=1)
        raise ValueError(
            f"{field}={name!r} is no network" + (f"; did you mean {spelled[near[0]]!r}?" if near else ".")
            + f" There are {', '.join(names())}, and my_module:factory for your own."
        )  # fmt: skip
    return spelled.get(f"{name}_{image_size}x{image_size}".lower(), spelled[name.lower()])


def names() -> tuple[str, ...]:
    """The networks of this package, family by family."""
    return tuple(_networks())


@functools.cache
def _networks() -> dict[str, Callable[..., nn.Module]]:
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    families = (importlib.import_module(f"{__name__}.{module}") for module in modules)
    return {name: factory for family in families for name, factory in getattr(family, "NETWORKS", {}).items()}


def count_parameters(params: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Adapter(nn.Module):
    """A network of the user's own, made to return Outputs; its variables stay as they are."""

    network: nn.Module
    name_given: str
    num_classes: int

    def setup(self):
        """Gives the variables no level of their own."""
        nn.share_scope(self, self.network)

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Outputs as they come; logits alone become Outputs without features and embedding."""
        found = self.network(images, train=train)
        logits = found.logits if isinstance(found, Outputs) else found
        if getattr(logits, "shape", None) != (count := images.shape[0], self.num_classes):
            what = f"an array of shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
            what = f"logits of shape {logits.shape}" if isinstance(found, Outputs) else what
            raise ValueError(
                f"network {self.name_given!r} returned {what} for {count} images of {self.num_classes} classes; "
                f"return rkd_jax.models.Outputs, or logits of shape ({count}, {self.num_classes})"
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(
                f"network {self.name_given!r} returned logits of {logits.dtype}, which have no gradient; return floats"
            )
        outputs = Outputs.of(*found) if isinstance(found, Outputs) else Outputs.of(found)
        if not isinstance(outputs.cuts, Cuts | None):
            kind = type(outputs.cuts).__name__
            raise ValueError(
                f"network {self.name_given!r} returned a {kind} as cuts; return rkd_jax.models.Cuts(maps, ...)"
            )
        return outputs


def _create_own(name: str, num_classes: int, dtype: Any, field: str) -> nn.Module:
    factory = _own.load(name, field, "factory")
    taken = _own.parameters(factory)
    options = {"num_classes": num_classes} | ({"dtype": dtype} if "dtype" in taken else {})
    if "dtype" not in taken and jnp.dtype(dtype) != jnp.float32:
        raise ValueError(
            f"{field}={name!r} takes no dtype, and config.dtype={jnp.dtype(dtype).name} would not reach its layers; "
            "give the factory an argument `dtype` to hand to them, or set config.dtype=float32"
        )
    if rngs := "rngs" in taken:
        from rkd_jax.models import _nnx  # here: importing NNX takes a tenth of a second
    try:
        network = _nnx.to_linen(factory, options) if rngs else factory(**options)
    except TypeError as error:
        called = f"factory(num_classes={num_classes}{', rngs=rngs' if rngs else ''})"
        raise ValueError(f"{field}={name!r}: {error}; it is called as {called}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{field}={name!r} returned a {type(network).__name__}; return a flax.linen.Module, or a flax.nnx.Module "
            "made with `rngs`, which the factory then takes"
        )
    parameters = inspect.signature(type(network).__call__).parameters.values()
    if not any(parameter.name == "train" or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{field}={name!r}: its __call__ lacks `train`; define __call__(self, images, train=False)")
    return Adapter(network, name, num_classes)
