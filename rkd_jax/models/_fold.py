"""Batch normalisation folded into the convolutions before it: a frozen network with less to compute."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from rkd_jax.models.layers import EPSILON, BatchNorm


def fold(model: nn.Module, variables: Any, images: Any) -> dict[str, Any]:
    """The variables of the same function in fewer operations, for `model.apply(folded, images, train=False)`.

    A batch normalisation after a convolution scales the convolution's kernel and leaves a bias; one elsewhere (the
    pre-activation blocks of wrn) leaves an affine map. What a convolution reads is kept in its compute dtype. The
    logits change by rounding alone. Only for networks that stay as they are, for the statistics are gone. `images` is
    an array or jax.ShapeDtypeStruct like those to come.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    norms, dtypes = _layers(model, variables, images)
    for norm, convolution in norms.items():
        scale, bias = (flat.pop(("params", *norm, leaf)) for leaf in ("scale", "bias"))
        mean, var = (flat.pop(("batch_stats", *norm, leaf)) for leaf in ("mean", "var"))
        factor = scale / jnp.sqrt(var + EPSILON)
        bias = bias - mean * factor
        if convolution is None:
            flat["params", *norm, "scale"], flat["params", *norm, "bias"] = factor, bias
            continue
        flat["params", *convolution, "kernel"] = flat["params", *convolution, "kernel"] * factor
        if ("params", *convolution, "bias") in flat:
            flat["params", *convolution, "bias"] = bias + flat["params", *convolution, "bias"] * factor
        else:
            flat["params", *norm, "bias"] = bias.astype(dtypes[convolution])
    for convolution, dtype in dtypes.items():
        for leaf in ("kernel", "bias"):
            if ("params", *convolution, leaf) in flat:
                flat["params", *convolution, leaf] = flat["params", *convolution, leaf].astype(dtype)
    return {"batch_stats": {}, **traverse_util.unflatten_dict(flat)}


def _layers(model: nn.Module, variables: Any, images: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Each BatchNorm's path with that of the convolution whose output it alone reads (None: none), and each
    convolution's path with its dtype."""
    norms, dtypes = {}, {}

    def record(call, args, kwargs, context):
        module, path = context.module, context.module.path
        if context.method_name == "__call__" and isinstance(module, BatchNorm):
            norms[path] = (*path[:-1], module.follows) if module.follows else None
        if context.method_name == "__call__" and isinstance(module, nn.Conv):
            dtypes[path] = module.dtype or jnp.float32
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return norms, dtypes
