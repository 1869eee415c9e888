"""Convolutions for CPUs: the kernels of _conv.cc, compiled once by the machine's own compiler, and called through FFI.

XLA runs small float32 convolutions on a CPU at a half, and their kernels' gradients at a fifth, of what the cores can
do. Where a kernel of _conv.cc fits, it computes the convolution and its two transposes; all else, and every machine
without a C++ compiler, has XLA's. RKD_JAX_CONV=xla in the environment keeps the kernels out. Depthwise convolutions,
for which XLA takes 20 to 50 times longer than memory does, are sums of shifted products where no kernel fits.
"""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rkd_jax import _files

SOURCE = Path(__file__).with_suffix(".cc")
LANES = 16  # channels come in multiples of the kernels' vectors
NARROWEST = 8  # columns of the output, below which XLA is as fast
_xla_alone = contextvars.ContextVar("xla_alone", default=False)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of `layers.conv`: square, padded evenly, undilated; on CPU by the fastest way."""
    size, stride, side = kernel.shape[0], strides[0], padding[0][0]
    alone, groups = _xla_alone.get(), options["feature_group_count"]
    if not alone and groups == x.shape[-1] == kernel.shape[-1] and jax.default_backend() == "cpu":
        fits = x.dtype == kernel.dtype == jnp.float32 and size == 3 and side < size
        return (_depthwise if fits and available() else _depthwise_products)(stride, side, x, kernel)
    if alone or groups > 1 or not available():
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if (size, stride, side) == (1, 1, 0):  # of pixels in one row
        batch, height, width, channels = x.shape
        y = _conv(stride, side, x.reshape(batch, 1, height * width, channels), kernel)
        return y.reshape(batch, height, width, -1)
    return _conv(stride, side, x, kernel)


@contextlib.contextmanager
def xla_alone() -> Iterator[None]:
    """Traces XLA's convolutions, whose costs its analysis knows."""
    token = _xla_alone.set(True)
    try:
        yield
    finally:
        _xla_alone.reset(token)


class Geometry(NamedTuple):
    """What is fixed about a convolution."""

    x: tuple[int, ...]  # [B, H, W, K]
    kernel: tuple[int, ...]  # [k, k, K, C], or depthwise [k, k, 1, C]
    stride: int
    padding: int

    def y(self) -> tuple[int, ...]:
        """[B, H', W', C]."""
        sides = ((side + 2 * self.padding - self.kernel[0]) // self.stride + 1 for side in self.x[1:3])
        return (self.x[0], *sides, self.kernel[3])


def _bilinear(name: str, forward: Callable, transpose_input: Callable, transpose_kernel: Callable) -> Callable:
    """conv(stride, padding, x, kernel), given forward(x, kernel, stride, padding) and its two transposes.

    Each of the three is linear in both of its operands, and transposed in one of them it is another of the three: as
    primitives they have derivatives of any order, in both modes, and under vmap.
    """

    def y_of(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
        return forward(x, kernel, geometry.stride, geometry.padding)

    def dx_of(kernel: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
        return transpose_input(kernel, dy, geometry.x, geometry.stride, geometry.padding)

    def dkernel_of(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
        return transpose_kernel(x, dy, geometry.kernel, geometry.stride, geometry.padding)

    y = _primitive(name, y_of, Geometry.y, images=0)
    dx = _primitive(f"{name}_input", dx_of, lambda geometry: geometry.x, images=1)
    dkernel = _primitive(f"{name}_kernel", dkernel_of, lambda geometry: geometry.kernel)
    # By operand: what its transpose makes of the result's cotangent `at` and the other operand.
    ad.defbilinear(
        y,
        lambda at, x, kernel, **fixed: dx.bind(kernel, at, **fixed),
        lambda at, x, kernel, **fixed: dkernel.bind(x, at, **fixed),
    )
    ad.defbilinear(
        dx,
        lambda at, kernel, dy, **fixed: dkernel.bind(at, dy, **fixed),
        lambda at, kernel, dy, **fixed: y.bind(at, kernel, **fixed),
    )
    ad.defbilinear(
        dkernel,
        lambda at, x, dy, **fixed: dx.bind(at, dy, **fixed),
        lambda at, x, dy, **fixed: y.bind(x, at, **fixed),
    )

    def conv(stride: int, padding: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return y.bind(x, kernel, geometry=Geometry(x.shape, kernel.shape, stride, padding))

    return conv


def _primitive(name: str, function: Callable, shape: Callable, images: int | None = None) -> Primitive:
    """`function` of two arrays as a primitive; images: the operand that has the result's batch axis."""
    primitive = Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(lambda a, b, geometry: jax.core.ShapedArray(shape(geometry), a.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))

    def batch(operands: Any, axes: Any, geometry: Geometry) -> tuple[jax.Array, int]:
        mapped = [i for i, axis in enumerate(axes) if axis is not None]
        operands = [jnp.moveaxis(x, axes[i], 0) if i in mapped else x for i, x in enumerate(operands)]
        if mapped == [images]:  # as one batch
            count, size = operands[images].shape[:2]
            operands[images] = operands[images].reshape(count * size, *operands[images].shape[2:])
            whole = geometry._replace(x=(count * size, *geometry.x[1:]))
            return primitive.bind(*operands, geometry=whole).reshape(count, *shape(geometry)), 0

        def one(given: Any) -> jax.Array:
            each = dict(zip(mapped, given, strict=True))
            return primitive.bind(*(each.get(i, x) for i, x in enumerate(operands)), geometry=geometry)

        return jax.lax.map(one, tuple(operands[i] for i in mapped)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


# All channels with all.


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    shape = Geometry(x.shape, kernel.shape, stride, padding).y()
    if x.dtype == kernel.dtype == jnp.float32 and shape[3] % LANES == 0 and shape[2] >= NARROWEST:
        return _call("rkd_conv", shape, x, kernel, stride, padding)
    return _xla(x, kernel, stride, padding)


def _transpose_input(kernel: jax.Array, dy: jax.Array, shape: tuple, stride: int, padding: int) -> jax.Array:
    """The gradient of the input [B, H, W, K]: at stride 1, a convolution with the kernel turned by 180 degrees."""
    if stride == 1 and padding < len(kernel):
        return _forward(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, len(kernel) - 1 - padding)
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda x: _xla(x, kernel, stride, padding), x)(dy)[0]


def _transpose_kernel(x: jax.Array, dy: jax.Array, shape: tuple, stride: int, padding: int) -> jax.Array:
    """The gradient of the kernel [k, k, K, C]."""
    size, _, channels, features = shape
    if (size, stride, padding) == (1, 1, 0) and (channels % 32 or features % LANES):
        return jnp.einsum("bhwi,bhwo->io", x, dy)[None, None]
    if x.dtype == dy.dtype == jnp.float32 and channels % LANES == features % LANES == channels % min(channels, 32) == 0:
        return _call("rkd_conv_gradient", shape, x, dy, stride, padding)
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _xla(x, kernel, stride, padding), kernel)(dy)[0]


def _xla(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    if kernel.shape[:2] == (1, 1) and stride == 1 and not padding:
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=numbers)


_conv = _bilinear("rkd_conv", _forward, _transpose_input, _transpose_kernel)


# Depthwise: one filter a channel, kernel [k, k, 1, C].


def _depthwise_products(stride: int, padding: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The sum of k * k shifted products, which XLA fuses into one loop."""
    size, (batch, height, width, channels) = len(kernel), x.shape
    precise = jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x.astype(precise), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((side + 2 * padding - size) // stride * stride + 1 for side in (height, width))
    total = sum(
        kernel[i, j, 0].astype(precise)
        * jax.lax.slice(padded, (0, i, j, 0), (batch, i + rows, j + columns, channels), (1, stride, stride, 1))
        for i in range(size)
        for j in range(size)
    )
    return total.astype(x.dtype)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    shape = Geometry(x.shape, kernel.shape, stride, padding).y()
    return _call("rkd_depthwise", shape, x, kernel, stride, padding, dilation=1)


def _depthwise_input(kernel: jax.Array, dy: jax.Array, shape: tuple, stride: int, padding: int) -> jax.Array:
    """The gradient of the input: a convolution of dy, zeros between its pixels, with the kernel turned."""
    turned, padding = jnp.flip(kernel, (0, 1)), len(kernel) - 1 - padding
    return _call("rkd_depthwise", shape, dy, turned, 1, padding, dilation=stride)


def _depthwise_kernel(x: jax.Array, dy: jax.Array, shape: tuple, stride: int, padding: int) -> jax.Array:
    return _call("rkd_depthwise_gradient", shape, x, dy, stride, padding)


_depthwise = _bilinear("rkd_depthwise", _depthwise_forward, _depthwise_input, _depthwise_kernel)


# The library.


def _call(name: str, shape: tuple, x: jax.Array, other: jax.Array, stride: int, padding: int, **more: int) -> jax.Array:
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    numbers = {"stride": stride, "padding": padding} | more
    return call(x, other, **{key: np.int64(number) for key, number in numbers.items()})


@functools.cache
def available() -> bool:
    """Whether this process has one CPU device and the kernels for it; compiles them where they are not yet."""
    if (wanted := os.environ.get("RKD_JAX_CONV", "")) not in ("", "xla"):
        raise ValueError(f"RKD_JAX_CONV={wanted} in the environment: take xla, or unset it")
    if wanted == "xla" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        logging.warning("Convolutions are XLA's, about half as fast: no working C++ compiler, see CXX (%s)", error)
        return False
    for name in ("rkd_conv", "rkd_conv_gradient", "rkd_depthwise", "rkd_depthwise_gradient"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _compiled() -> Path:
    """The shared library of _conv.cc for this processor and this jaxlib, in the user's cache."""
    compiler = os.environ.get("CXX", "c++")
    macros = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]  # GCC's and Clang's, by processor
    native = subprocess.run(macros, capture_output=True, check=True).stdout
    facts = SOURCE.read_bytes(), native, " ".join(FLAGS).encode(), jax.lib.__version__.encode()
    folder = _files.cache()
    library = folder / f"conv_{hashlib.sha256(b''.join(facts)).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            output = Path(fresh) / library.name
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True)
            output.replace(library)
    return library
