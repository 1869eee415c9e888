"""The table of networks: python -m rkd_jax.models [NAME ...] [--num_classes 100] [--image_size 32].

MMACs are the millions of multiply-adds of the convolutions and the classifier for one image, as papers count them; "-"
for a network of your own that has neither of Linen's.
XLA is half the floating-point operations that XLA finds in the inference program, in millions: its cost analysis leaves
out the products with padding, and counts batch normalisation and activations.
"""

import argparse
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import _flags, models
from rkd_jax.models import _conv


class Row(NamedTuple):
    """A network in figures."""

    name: str
    parameters: int
    mmacs: float | None  # None: the network has no layer of Linen's
    xla: float
    embedding: int | None  # None: the network returns none
    features: tuple[str, ...]  # channels@side

    def __str__(self) -> str:
        mmacs = "-" if self.mmacs is None else f"{self.mmacs:,.1f}"
        figures = f"{self.name:18} {self.parameters:>10,} {mmacs:>8} {self.xla:>8,.1f} {self.embedding or '-':>9}"
        return f"{figures}  {' '.join(self.features)}"


def describe(name: str, num_classes: int = 100, image_size: int = 32) -> Row:
    """A network's parameters, costs and shapes, for one RGB image; nothing is computed. ValueError as of `create`."""
    model = models.create(name, num_classes, image_size=image_size, field="NAME")
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    macs = []

    def count(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
            macs.append(out.size * math.prod(context.module.variables["params"]["kernel"].shape[:-1]))
        return out

    with nn.intercept_methods(count), _conv.xla_alone():
        outputs = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    with _conv.xla_alone():
        inference = jax.jit(lambda v, x: model.apply(v, x, train=False).logits).lower(variables, images)
    return Row(
        models.resolve(name, image_size),
        models.count_parameters(variables["params"]),
        sum(macs) / 1e6 if macs else None,
        inference.cost_analysis()["flops"] / 2e6,
        None if outputs.embedding is None else outputs.embedding.shape[-1],
        tuple(f"{feature.shape[-1]}@{feature.shape[1]}" for feature in outputs.features),
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m rkd_jax.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every network")
    parser.add_argument("--num_classes", type=_flags.positive, default=100)
    parser.add_argument("--image_size", type=_flags.positive, default=32, help="side in pixels")
    args = parser.parse_args(argv)
    header = f"{'network':18} {'parameters':>10} {'MMACs':>8} {'XLA':>8} {'embedding':>9}  features, channels@side"
    with _flags.one_sentence(args):
        names = [models.resolve(name, args.image_size, field="NAME") for name in args.names or models.names()]
        for i, name in enumerate(dict.fromkeys(names)):
            row = describe(name, args.num_classes, args.image_size)
            print(row if i else f"{header}\n{row}", flush=True)


if __name__ == "__main__":
    main()
