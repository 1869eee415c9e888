"""The CPU's convolutions against XLA's own, their gradients in float64, and what falls back."""

import functools
import os
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SLOW

from rkd_jax import provenance
from rkd_jax.models import _conv

NUMBERS = ("NHWC", "HWIO", "NHWC")
KINDS = {  # side, channels, features, kernel, stride, padding, groups
    "stem": (32, 3, 16, 3, 1, 1, 1),
    "16": (32, 16, 16, 3, 1, 1, 1),
    "32": (16, 32, 32, 3, 1, 1, 1),
    "64": (8, 64, 64, 3, 1, 1, 1),
    "64 to 96, odd": (11, 64, 96, 3, 1, 1, 1),
    "80 to 64, padded by 0": (12, 80, 64, 3, 1, 0, 1),
    "64, padded by 2": (9, 64, 64, 3, 1, 2, 1),
    "512": (8, 512, 64, 3, 1, 1, 1),
    "48 to 16": (9, 48, 16, 3, 1, 1, 1),
    "narrow": (4, 32, 32, 3, 1, 1, 1),
    "strided": (32, 16, 32, 3, 2, 1, 1),
    "strided, odd": (17, 32, 64, 3, 2, 1, 1),
    "1x1": (8, 64, 32, 1, 1, 0, 1),
    "1x1 narrow": (2, 32, 64, 1, 1, 0, 1),
    "1x1 of 12 channels": (8, 12, 72, 1, 1, 0, 1),
    "1x1 strided": (16, 32, 64, 1, 2, 0, 1),
    "1x1 padded": (16, 32, 32, 1, 1, 1, 1),
    "depthwise": (8, 24, 24, 3, 1, 1, 24),
    "depthwise of whole vectors": (9, 32, 32, 3, 1, 1, 32),
    "depthwise strided": (17, 24, 24, 3, 2, 1, 24),
    "depthwise strided, even": (16, 32, 32, 3, 2, 1, 32),
    "depthwise, padded by 0": (8, 24, 24, 3, 1, 0, 24),
    "depthwise, padded by 2": (8, 24, 24, 3, 2, 2, 24),
    "depthwise, padded by 3": (8, 24, 24, 3, 1, 3, 24),
    "depthwise 5x5": (7, 6, 6, 5, 1, 2, 6),
    "grouped": (8, 24, 48, 1, 1, 0, 3),
}


def operands(side, channels, features, kernel, stride, padding, groups, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, side, side, channels)).astype(dtype)
    w = rng.normal(size=(kernel, kernel, channels // groups, features)).astype(dtype)
    options = {
        "strides": (stride, stride), "padding": [(padding, padding)] * 2, "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1), "dimension_numbers": NUMBERS, "feature_group_count": groups, "precision": None,
    }  # fmt: skip
    return x, w, functools.partial(_conv.conv_general_dilated, **options)


def reference(convolve):
    options = dict(convolve.keywords)
    return lambda x, w: jax.lax.conv_general_dilated(x, w, options["strides"], options["padding"], **rest(options))


def rest(options):
    return {name: value for name, value in options.items() if name not in ("strides", "padding")}


def all_of(convolve, x, w):
    """The convolution, its derivative along (x, w), and the gradients of half its square."""
    y, tangent = jax.jvp(convolve, (x, w), (x, w))
    return y, tangent, *jax.grad(lambda x, w: (convolve(x, w) ** 2).sum() / 2, (0, 1))(x, w)


@pytest.mark.parametrize("kind", KINDS)
def test_convolution_and_gradients_are_xlas_in_float64(kind):
    x, w, convolve = operands(*KINDS[kind])
    with jax.enable_x64(True):
        wanted = jax.jit(functools.partial(all_of, reference(convolve)))(np.float64(x), np.float64(w))
    for found, exact in zip(jax.jit(functools.partial(all_of, convolve))(x, w), wanted, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


OF_ITS_OWN = """
import test_conv
from rkd_jax.models import _conv
assert _conv.available()
for kind in ("stem", "16", "32", "64 to 96, odd", "48 to 16", "strided", "1x1", "depthwise", "depthwise strided, even"):
    test_conv.test_convolution_and_gradients_are_xlas_in_float64(kind)
"""


def compiling_with(flags, folder):
    """The environment in which the kernels are compiled anew, in a folder, with more flags."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" {flags}\n')
    compiler.chmod(0o755)
    there = {"CXX": str(compiler), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | there


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("flags", ["", "-mno-avx", "-mno-avx -D__aarch64__"], ids=["native", "x86-64", "blocks of arm"])
def test_kernels_stay_within_their_arrays(flags, tmp_path):
    named = (["c++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so"))
    libraries = [subprocess.run(each, capture_output=True, text=True).stdout.strip() for each in named]
    if not all(map(os.path.isabs, libraries)):  # the compiler says a name alone of what it has not
        pytest.skip("the compiler has no AddressSanitizer")
    there = compiling_with(f"{flags} -fsanitize=address", tmp_path)
    there |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([sys.executable, "-c", OF_ITS_OWN], env=there, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:3000]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("flag", ["-mno-avx512f", SLOW("-mno-avx")])
def test_kernels_for_narrower_vectors_are_right_too(flag, tmp_path):
    if flag == "-mno-avx512f" and "avx512f" not in provenance.processor():
        pytest.skip("this processor has no AVX-512: the other tests are of these kernels")
    subprocess.run([sys.executable, "-c", OF_ITS_OWN], env=compiling_with(flag, tmp_path), check=True)
    (library,) = tmp_path.glob("rkd_jax/conv_*.so")
    widest = {"-mno-avx512f": "zmm", "-mno-avx": "ymm"}[flag]
    code = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert widest not in code


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_kernels_compiled_by_clang_are_right_too(tmp_path):
    there = {"CXX": "clang++", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", OF_ITS_OWN], env=os.environ | there, check=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, SLOW(jnp.float64)])
@pytest.mark.parametrize("kind", ["16", "strided", "1x1", SLOW("depthwise")])
def test_other_dtypes_are_xlas(kind, dtype):
    with jax.enable_x64(True):
        x, w, convolve = operands(*KINDS[kind], dtype=dtype)
        for found, wanted in zip(all_of(convolve, x, w), all_of(reference(convolve), x, w), strict=True):
            assert found.dtype == dtype
            scale, eps = float(jnp.abs(wanted).max()), float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.float64(found), np.float64(wanted), rtol=0, atol=16 * scale * eps)


def test_gradients_repeat_bit_for_bit():
    x, w, convolve = operands(*KINDS["32"])
    function = jax.jit(functools.partial(all_of, convolve))
    first = function(x, w)
    for _ in range(5):
        for a, b in zip(first, function(x, w), strict=True):
            np.testing.assert_array_equal(a, b)


def transformed(convolve, x, w):
    """What researchers take of a network: gradients of each image, of each of several networks, and of gradients."""

    def loss(x, w):
        return (convolve(x, w) ** 2).sum() / 2

    kernels, images = jnp.stack([w, -0.5 * w]), jnp.stack([x, x + 1])
    penalty = jax.grad(lambda x, w: (jax.grad(loss)(x, w) ** 2).sum(), (0, 1))
    return {
        "each kernel": jax.vmap(convolve, (None, 0))(x, kernels),
        "each of both": jax.vmap(convolve)(images, kernels),
        "gradient by image": jax.vmap(jax.grad(loss, 1), (0, None))(x[:, None], w),
        "gradients of several": jax.grad(lambda k: jax.vmap(loss, (None, 0))(x, k).sum())(kernels),
        "gradients of several images": jax.grad(lambda x: jax.vmap(loss, (0, None))(x, w).sum())(images),
        "gradient of a gradient": penalty(x, w),
        "forward over reverse": jax.jvp(jax.grad(loss, (0, 1)), (x, w), (w.sum() * x, w)),
        "by image, of a gradient": jax.vmap(penalty, (0, None))(x[:, None], w),
    }


@pytest.mark.parametrize(
    "kind", ["32", "1x1", "depthwise", *map(SLOW, ("stem", "strided, odd", "depthwise of whole vectors"))]
)
def test_transformations_are_those_of_xlas(kind):
    side, *others = KINDS[kind]
    x, w, convolve = operands(min(side, 10), *others)
    with jax.enable_x64(True):
        wanted = jax.jit(functools.partial(transformed, reference(convolve)))(np.float64(x), np.float64(w))
    found = jax.jit(functools.partial(transformed, convolve))(x, w)
    for name, exact in wanted.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)


def test_eval_shape():
    x, w, convolve = operands(*KINDS["16"])
    assert jax.eval_shape(convolve, x, w).shape == convolve(x, w).shape


@pytest.mark.parametrize("how", ["RKD_JAX_CONV", SLOW("CXX"), SLOW("devices")])
def test_without_the_kernels_it_is_xlas(how, tmp_path):
    environment = {
        "RKD_JAX_CONV": {"RKD_JAX_CONV": "xla"},
        "CXX": {"CXX": "no-such-compiler"},
        "devices": {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    }[how]
    code = "from rkd_jax.models import _conv; assert not _conv.available()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)
