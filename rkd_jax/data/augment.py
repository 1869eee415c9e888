"""Random views of uint8 images on the device, inside jit: [B, H, W, C] -> the same, C = 1 or 3.

weak    random crop of the zero-padded image, then a horizontal flip with probability 1/2
strong  the same, then two of fourteen operations, drawn uniformly with replacement, each with a uniform magnitude of
        its own, then Cutout: the pipeline of MLKD (Jin et al., CVPR 2023), after FixMatch's RandAugment

Operations keep the meaning of PIL, on which they were defined; tests/test_augment.py compares them, level by level. A
`switch` under vmap runs all fourteen for every image. Here they are three general ones: a gather from the nearest pixel
(Rotate, ShearX and Y, TranslateX and Y; the identity for others), a blend with another image (Brightness: black,
Contrast: its mean, Color: grey, Sharpness: smoothed), and maps of a pixel's level (AutoContrast, Equalize, ...).
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax import _own

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Identity",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Rotate",
    "ShearX",
    "ShearY",
    "Solarize",
    "TranslateX",
    "TranslateY",
)
RANGES = {  # of the uniform magnitudes; an operation that is not here has none
    "Brightness": (0.05, 0.95),  # factor of ImageEnhance, as in the next three
    "Color": (0.05, 0.95),
    "Contrast": (0.05, 0.95),
    "Sharpness": (0.05, 0.95),
    "Posterize": (4, 8),  # bits kept, truncated to an integer
    "Rotate": (-30, 30),  # degrees, counter-clockwise
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "Solarize": (0, 256),  # threshold
    "TranslateX": (-0.3, 0.3),  # of the width
    "TranslateY": (-0.3, 0.3),  # of the height
}
LEVELS = 4096  # of a magnitude: a grid finer than a pixel or a grey level can show
CUTOUT_SIDE = 0.5  # of the width: the largest
CUTOUT_FILL = (125, 123, 114)  # RGB


# The views.


def view(name: str, rng: jax.Array, images: jax.Array, **options) -> jax.Array:
    """The view "weak", "strong", "my_module:view" or, for benchmarks, "none" (the images as they are).

    The options are those of `weak`; one's own view is called without them, as view(rng, images). ValueError for another
    name, and where one's own cannot be called or returns anything but uint8 of the images' shape.
    """
    if ":" in name:
        return _own_view(name, rng, images)
    if name == "none":
        return images
    if name not in ("weak", "strong"):
        raise ValueError(f"{name!r} is no view; there are 'weak', 'strong', 'none' and my_module:view for your own")
    return {"weak": weak, "strong": strong}[name](rng, images, **options)


def _own_view(name: str, rng: jax.Array, images: jax.Array) -> jax.Array:
    function, field = _own.load(name, "config.views", "view"), f"config.views={name!r}"
    if inspect.isclass(function):
        raise ValueError(f"{field} is a class; name a function, or an instance that can be called")
    try:
        inspect.signature(function).bind(rng, images)
    except TypeError as error:
        raise ValueError(f"{field}: {error}; it is called as view(rng, images)") from error
    try:
        made = function(rng, images)
    except jax.errors.JAXTypeError as error:  # of what is not known before the program runs
        raise ValueError(
            f"{field} is compiled with the step, and cannot use NumPy, int() or `if` on its images; take jax.numpy, "
            f"and jnp.where ({str(error).partition(chr(10))[0]})"
        ) from error
    shape, dtype = getattr(made, "shape", None), getattr(made, "dtype", None)
    if shape != images.shape or dtype != jnp.uint8:
        found = type(made).__name__ if dtype is None else f"{dtype} of shape {shape}"
        raise ValueError(f"{field} returned {found}; return uint8 of the images' shape, {images.shape}")
    return made


def weak(rng: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True, rotation: float = 0.0) -> jax.Array:
    """Rotate by up to `rotation` degrees, crop after padding with `padding` zeros, flip; uint8 [B, H, W, C]."""
    batch, height, width, _ = images.shape
    unit = jax.random.uniform(rng, (4, batch, 1, 1))
    rows, columns, inside = _grid(height, width)
    row_offset, column_offset = _integer(unit[:2], 2 * padding + 1) - padding
    rows = rows + row_offset
    columns = jnp.where((unit[2] < 0.5) & flip, width - 1 - columns, columns) + column_offset
    if rotation:
        inside &= _inside(rows, columns, height, width)
        degrees = rotation * (2 * (np.arange(LEVELS) + 0.5) / LEVELS - 1)
        affine = jnp.asarray(_rotations(degrees, height, width))[_integer(unit[3, :, 0, 0], LEVELS)]
        rows, columns, inside = _through(affine, (rows, columns, inside))
    return _gather(images, (rows, columns, inside))


def strong(rng: jax.Array, images: jax.Array, **options: Any) -> jax.Array:
    """The weak view, of which the options are, two operations of fourteen, and Cutout; uint8 [B, H, W, C], C = 1, 3."""
    weak_key, strong_key = jax.random.split(rng)
    operation, level, square = draw(strong_key, images.shape)
    images = weak(weak_key, images, **options)
    images = operate(operate(images, operation[0], level[0]), operation[1], level[1])
    return cutout(images, *square)


def draw(rng: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """What a strong view of images of this shape does: operations [2, B], levels [2, B], Cutout's side and centre."""
    batch, height, width, _ = shape
    unit = jax.random.uniform(rng, (7, batch))  # one call: each takes a third of a second to compile
    operation, level = _integer(unit[:2], len(OPERATIONS)), _integer(unit[2:4], LEVELS)
    return operation, level, (unit[4] * (CUTOUT_SIDE * width), unit[5] * height, unit[6] * width)


def _integer(unit: jax.Array, count: int) -> jax.Array:
    """0 ... count - 1, from uniform values in [0, 1)."""
    return (unit * count).astype(jnp.int32)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std; uint8 [..., C] -> float32 [..., C]."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


# The fourteen operations, and Cutout.


@functools.cache
def magnitudes() -> np.ndarray:
    """The magnitude of every level of every operation; float32 [14, LEVELS].

    It is the middle of the level's cell, rounded to 1/65536: the product with a grey level is then exact in float32, so
    that an image does not depend on whether a compiler fuses multiply and add.
    """
    unit = (np.arange(LEVELS) + 0.5) / LEVELS
    table = np.zeros((len(OPERATIONS), LEVELS))
    for name, (low, high) in RANGES.items():
        table[OPERATIONS.index(name)] = low + (high - low) * unit
    table[OPERATIONS.index("Posterize")] //= 1
    return (np.round(table * 65536) / 65536).astype(np.float32)


def operate(images: jax.Array, operation: jax.Array, level: jax.Array) -> jax.Array:
    """One operation an image; uint8 [B, H, W, C] -> the same.

    `operation` [B] are indices into OPERATIONS, `level` [B] are levels 0 ... LEVELS - 1 of their magnitudes.
    """
    _, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; the strong view is defined for grey (1) and RGB (3) images")
    affine = jnp.asarray(_affines(height, width))[jnp.asarray(_AFFINE)[operation], level]
    images = _gather(images, _through(affine, _grid(height, width)))

    planes = images.transpose(0, 3, 1, 2)  # XLA for CPU vectorises the last axis alone, which should not be of length 3
    magnitude = jnp.asarray(magnitudes())[operation, level][:, None, None, None]
    chosen = {name: (operation == i)[:, None, None, None] for i, name in enumerate(OPERATIONS)}
    values, grey = planes.astype(jnp.float32), to_grey(planes)
    enhanced = [chosen["Brightness"], chosen["Contrast"], chosen["Sharpness"]]
    degenerate = [jnp.zeros_like(grey), _mean(grey), smooth(planes)]
    if channels == 3:  # Color leaves a grey image alone
        enhanced, degenerate = [*enhanced, chosen["Color"]], [*degenerate, grey]
    planes = jnp.select(
        [*enhanced, *(chosen[name] for name in ("AutoContrast", "Equalize", "Posterize", "Solarize"))],
        [
            *(_blend(other.astype(jnp.float32), values, magnitude) for other in degenerate),
            _autocontrast(planes),
            _equalize(planes),
            planes & (-1 << (8 - magnitude.astype(jnp.int32))),
            jnp.where(values < magnitude, values, 255 - values),
        ],
        values,
    )
    return planes.astype(jnp.uint8).transpose(0, 2, 3, 1)


def cutout(images: jax.Array, side: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Fills a square of `side` [B] pixels about (`row`, `column`) [B], float32, of images uint8 [B, H, W, C].

    As in MLKD: the upper left corner is truncated to a pixel inside, the lower right one is that plus the side, and
    PIL's rectangle includes both.
    """
    _, height, width, channels = images.shape

    def covered(centre: jax.Array, extent: int) -> jax.Array:
        first = jnp.floor(jnp.maximum(centre - side / 2, 0))[:, None]
        pixel = jnp.arange(extent, dtype=jnp.float32)
        return (pixel >= first) & (pixel <= jnp.floor(first + side[:, None])) & (side[:, None] > 0)

    square = covered(row, height)[:, :, None, None] & covered(column, width)[:, None, :, None]
    fill = jnp.array(CUTOUT_FILL, jnp.uint8)
    if channels == 1:
        fill = to_grey(fill[None, :, None, None])[0, 0, 0].astype(jnp.uint8)
    return jnp.where(square, fill, images)


# Geometry: where a pixel of the output comes from. A map of pixels takes and returns their rows and columns, int32, and
# whether they lie inside, each of a shape that broadcasts to [B, H, W].


def _grid(height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :], jnp.ones((1, 1, 1), bool)


def _through(affine: jax.Array, pixels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """PIL's affine transform to the nearest pixel, in its 16.16 fixed point; int32 [B, 6]."""
    rows, columns, inside = pixels
    a, b, c, d, e, f = affine.T[:, :, None, None]
    return (d * columns + e * rows + f) >> 16, (a * columns + b * rows + c) >> 16, inside


def _inside(rows: jax.Array, columns: jax.Array, height: int, width: int) -> jax.Array:
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


def _gather(images: jax.Array, pixels: tuple[jax.Array, ...]) -> jax.Array:
    """The images' pixels at these places, zero outside."""
    batch, height, width, channels = images.shape
    rows, columns, inside = pixels
    inside &= _inside(rows, columns, height, width)
    index = jnp.where(inside, rows * width + columns, 0).reshape(batch, height * width)
    taken = jax.vmap(lambda image, i: image[i])(images.reshape(batch, height * width, channels), index)
    return jnp.where(inside[..., None], taken.reshape(images.shape), jnp.uint8(0))


# The affine operations, as tables made in float64 on the host: in float32 some pixels would not be PIL's.

_AFFINE_NAMES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_AFFINE = np.array([_AFFINE_NAMES.index(name) + 1 if name in _AFFINE_NAMES else 0 for name in OPERATIONS])


@functools.cache
def _affines(height: int, width: int) -> np.ndarray:
    """The affine parameters of every level: of none, and of the five operations; int32 [6, LEVELS, 6]."""
    m = {name: magnitudes()[OPERATIONS.index(name)].astype(np.float64) for name in _AFFINE_NAMES}
    return np.stack(
        [
            _fixed(1, 0, np.zeros(LEVELS), 0, 1, 0),
            _rotations(m["Rotate"], height, width),
            _fixed(1, m["ShearX"], 0, 0, 1, 0),
            _fixed(1, 0, 0, m["ShearY"], 1, 0),
            # Without rotation PIL scales instead, in floats: the shift to the nearest pixel, exactly.
            _fixed(1, 0, np.floor(m["TranslateX"] * width + 0.5), 0, 1, 0),
            _fixed(1, 0, 0, 0, 1, np.floor(m["TranslateY"] * height + 0.5)),
        ]
    )


def _rotations(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's Image.rotate, about the centre; float64 [L] -> int32 [L, 6]."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = width / 2, height / 2
    return _fixed(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _fixed(a, b, c, d, e, f) -> np.ndarray:
    """x' = a x + b y + c, y' = d x + e y + f of pixels' centres, as PIL's fixed point of pixels; int32 [L, 6]."""
    c, f = c + (a + b) * 0.5, f + (d + e) * 0.5
    return np.floor(np.stack(np.broadcast_arrays(a, b, c, d, e, f), axis=-1) * 65536 + 0.5).astype(np.int32)


# Grey levels. Division is of float32 that holds integers, which is faster than that of integers.


def to_grey(planes: jax.Array) -> jax.Array:
    """PIL's luminance (ITU-R 601-2, 16-bit weights); uint8 [B, C, H, W] -> int32 [B, 1, H, W]."""
    planes = planes.astype(jnp.int32)
    if planes.shape[1] == 1:
        return planes
    return (planes[:, :1] * 19595 + planes[:, 1:2] * 38470 + planes[:, 2:] * 7471 + 0x8000) >> 16


def smooth(planes: jax.Array) -> jax.Array:
    """PIL's SMOOTH: weights 1, 5 in the middle, of 13; the border stays; uint8 [B, C, H, W] -> int32."""
    _, _, height, width = planes.shape
    planes = planes.astype(jnp.int32)
    padded = jnp.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = sum(padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)) + 4 * planes
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    return jnp.where(border, planes, (2 * total + 13) // 26)


def _mean(grey: jax.Array) -> jax.Array:
    """The mean level, rounded half up; int32 [B, 1, H, W] -> int32 [B, 1, 1, 1]."""
    pixels = grey.shape[2] * grey.shape[3]
    return (2 * grey.sum((1, 2, 3), keepdims=True) + pixels) // (2 * pixels)


def _blend(degenerate: jax.Array, values: jax.Array, factor: jax.Array) -> jax.Array:
    """PIL's Image.blend for factors of 0..1, truncated."""
    return jnp.floor(degenerate + factor * (values - degenerate))


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator // denominator, 0 where that is 0, of float32 integers >= 0; exact for quotients of 0..255.

    A half more keeps rounding away from the next integer: the quotient is at least 1 / (2 denominator) from it.
    """
    return jnp.where(denominator > 0, jnp.floor((numerator + 0.5) / jnp.maximum(denominator, 1)), 0)


def _autocontrast(planes: jax.Array) -> jax.Array:
    """PIL's ImageOps.autocontrast: each channel stretched to 0..255; uint8 [B, C, H, W] -> float32."""
    low, high = planes.min((2, 3)).astype(jnp.int32), planes.max((2, 3)).astype(jnp.int32)
    short = jnp.repeat(jnp.asarray(_shortfalls())[low, high], 8, axis=-1) >> (np.arange(256) % 8).astype(np.uint8) & 1
    levels = planes.reshape(*planes.shape[:2], -1).astype(jnp.int32)
    short = jnp.take_along_axis(short, levels, axis=-1).reshape(planes.shape)
    low, high, values = (array.astype(jnp.float32) for array in (low[..., None, None], high[..., None, None], planes))
    return jnp.where(high > low, _quotient((values - low) * 255, high - low) - short, values)


@functools.cache
def _shortfalls() -> np.ndarray:
    """Where PIL's autocontrast, which computes in float64 and truncates, is one less than the exact quotient.

    Bit v of [low, high], from the least significant bit of the first byte; uint8 [256, 256, 32].
    """
    level, high = np.arange(256), np.arange(256)[:, None]
    table = np.zeros((256, 256, 32), np.uint8)
    for low in range(256):
        extent = np.maximum(high - low, 1)
        pil = (level * (255.0 / extent) + -low * (255.0 / extent)).astype(int)
        short = (pil < (level - low) * 255 // extent) & (low <= level) & (level <= high)
        table[low] = np.packbits(short, axis=-1, bitorder="little")
    return table


def _equalize(planes: jax.Array) -> jax.Array:
    """PIL's ImageOps.equalize: each channel through its cumulative histogram; uint8 [B, C, H, W] -> float32."""
    levels = planes.reshape(*planes.shape[:2], -1).astype(jnp.int32)
    histogram = jax.vmap(jax.vmap(lambda index: jnp.zeros(256, jnp.int32).at[index].add(1)))(levels)
    below = jnp.cumsum(histogram, axis=-1) - histogram  # the pixels darker than a level
    highest = jnp.take_along_axis(below, levels.max(-1, keepdims=True), axis=-1)
    step = (highest // 255).astype(jnp.float32)
    darker = jnp.take_along_axis(below, levels, axis=-1).astype(jnp.float32)
    equalized = jnp.minimum(_quotient(jnp.floor(step / 2) + darker, step), 255)
    return jnp.where(step > 0, equalized, levels.astype(jnp.float32)).reshape(planes.shape)
