"""Batch normalisation folded into the convolutions before it: a frozen network with less to compute."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from rkd_jax.models.layers import EPSILON, BatchNorm


def fold(model: nn.Module, variables: Any, images: Any) -> dict[str, Any]:
    """The variables of the same function in fewer operations, for `model.apply(folded, images, train=False)`.

    A batch normalisation after a convolution leaves a bias and scales the convolution's kernel; one elsewhere (the
    pre-activation blocks of wrn) leaves an affine map. The logits change by rounding alone. Only for networks that stay
    as they are, for the statistics are gone. `images` is an array or jax.ShapeDtypeStruct like those to come.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    for norm, convolution in _norms(model, variables, images).items():
        scale = flat.pop(("params", *norm, "scale"))
        mean, var = (flat.pop(("batch_stats", *norm, leaf)) for leaf in ("mean", "var"))
        factor = scale / jnp.sqrt(var + EPSILON)
        bias = flat["params", *norm, "bias"] - mean * factor
        if convolution is None:
            flat["params", *norm, "scale"] = factor
        else:
            flat["params", *convolution, "kernel"] = flat["params", *convolution, "kernel"] * factor
            if ("params", *convolution, "bias") in flat:
                bias = bias + flat["params", *convolution, "bias"] * factor
                flat["params", *convolution, "bias"] = jnp.zeros_like(bias)
        flat["params", *norm, "bias"] = bias
    return {"batch_stats": {}, **traverse_util.unflatten_dict(flat)}


def _norms(model: nn.Module, variables: Any, images: Any) -> dict[tuple[str, ...], tuple[str, ...] | None]:
    """Where every BatchNorm of the model lies, and where the convolution whose output it alone reads (None: none)."""
    found = {}

    def record(call, args, kwargs, context):
        if isinstance(norm := context.module, BatchNorm) and context.method_name == "__call__":
            found[norm.path] = (*norm.path[:-1], norm.follows) if norm.follows else None
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return found
