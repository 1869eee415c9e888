"""Every operation against PIL on real images, level by level; the views' distributions; shapes and errors."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SLOW
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_images

from rkd_jax import data
from rkd_jax.data import augment

PREPARED = Path(__file__).parents[2] / "shared" / "data" / "tfds"
LEVELS = np.linspace(0, augment.LEVELS - 1, 128).round().astype(np.int32)  # the whole range, its ends included


# What PIL does.


def affine(image, a, b, c, d, e, f):
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


PIL_OPERATIONS = {
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Identity": lambda image, m: image,
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(m),
    "Posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "Rotate": lambda image, m: image.rotate(m),
    "ShearX": lambda image, m: affine(image, 1, m, 0, 0, 1, 0),
    "ShearY": lambda image, m: affine(image, 1, 0, 0, m, 1, 0),
    "Solarize": lambda image, m: ImageOps.solarize(image, m),
    "TranslateX": lambda image, m: affine(image, 1, 0, m * image.width, 0, 1, 0),
    "TranslateY": lambda image, m: affine(image, 1, 0, 0, 0, 1, m * image.height),
}


def to_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pil(image):
    return np.asarray(image).reshape(image.height, image.width, -1)


def pil_operation(image, operation, level):
    magnitude = float(augment.magnitudes()[operation, level])
    return from_pil(PIL_OPERATIONS[augment.OPERATIONS[operation]](to_pil(image), magnitude))


def pil_cutout(image, side, row, column):
    """MLKD's, as FixMatch's RandAugment has it: one corner truncated, the other one drawn by PIL."""
    pil = to_pil(image)
    x, y = int(max(0, column - side / 2)), int(max(0, row - side / 2))
    fill = augment.CUTOUT_FILL if pil.mode == "RGB" else Image.new("RGB", (1, 1), augment.CUTOUT_FILL).convert("L")
    corner = min(pil.width, x + side), min(pil.height, y + side)
    ImageDraw.Draw(pil).rectangle((x, y, *corner), fill if pil.mode == "RGB" else fill.getpixel((0, 0)))
    return from_pil(pil)


# Real images.


@functools.cache
def photographs(count, height, width):
    """Crops of scikit-learn's two photographs, at scales from pixel to half the photograph, some dim or flat."""
    rng, pair = np.random.default_rng(0), load_sample_images().images
    found = []
    for i in range(count):
        photograph = pair[i % 2]
        scale = rng.uniform(1, min(photograph.shape[0] / height, photograph.shape[1] / width))
        h, w = int(height * scale), int(width * scale)
        y, x = rng.integers(photograph.shape[0] - h + 1), rng.integers(photograph.shape[1] - w + 1)
        crop = Image.fromarray(photograph[y : y + h, x : x + w]).resize((width, height), Image.Resampling.BOX)
        found.append(np.asarray(crop) // (1 + i % 3))
    found[-1] = np.full_like(found[-1], 77)
    return np.stack(found)


@functools.cache
def cifar100():
    if not PREPARED.exists():
        pytest.skip("no prepared CIFAR-100 at ../shared/data/tfds")
    return np.asarray(data.load("cifar100", str(PREPARED)).test.images[:128])


def images(kind):
    if kind == "cifar100":
        return cifar100()
    if kind == "digits":
        return (load_digits().images[:128] * (255 / 16)).astype(np.uint8)[..., None]
    height, width = {"square": (32, 32), "wide": (24, 40), "tall": (33, 27)}[kind]
    return photographs(128, height, width)


operate = jax.jit(augment.operate)
weak_view = jax.jit(augment.weak, static_argnames=("padding", "flip", "rotation"))
strong_view = jax.jit(augment.strong, static_argnames=("padding", "flip", "rotation"))


# The operations.


@pytest.mark.parametrize("kind", ["square", "wide", SLOW("tall"), "digits", SLOW("cifar100")])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operation_is_pils(kind, name):
    batch, operation = images(kind), augment.OPERATIONS.index(name)
    found = np.asarray(operate(batch, np.full(len(batch), operation), LEVELS))
    wanted = np.stack([pil_operation(image, operation, level) for image, level in zip(batch, LEVELS, strict=True)])
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_equalize_is_pils_for_every_step():
    """Histograms of few and of many pixels: steps 0 and 1, levels that would pass 255, the brightest level alone."""
    rng = np.random.default_rng(0)
    for height, width in ((8, 8), (15, 17), (16, 16), (20, 20), (64, 64)):
        batch = np.stack([rng.integers(0, top, (height, width, 3)) for top in (2, 3, 30, 256)]).astype(np.uint8)
        batch[1][batch[1] == 2] = 255
        found = operate(batch, np.full(4, augment.OPERATIONS.index("Equalize")), np.zeros(4, int))
        for image, result in zip(batch, np.asarray(found), strict=True):
            np.testing.assert_array_equal(result, from_pil(ImageOps.equalize(to_pil(image))))


def test_autocontrast_is_pils_for_every_range():
    """Of all 256 * 255 / 2 ranges of levels, every 17th."""
    low, high = np.triu_indices(256, 1)
    low, high = low[::17], high[::17]
    ramp = np.linspace(low, high, 64).round().astype(np.uint8).T.reshape(-1, 8, 8, 1)
    found = np.asarray(operate(ramp, np.zeros(len(ramp), int), np.zeros(len(ramp), int)))
    wanted = np.stack([from_pil(ImageOps.autocontrast(to_pil(image))) for image in ramp])
    np.testing.assert_array_equal(found, wanted)
    assert (found.reshape(len(ramp), -1).max(1) == 254).any()  # where PIL's rounding loses the brightest level


@pytest.mark.parametrize("kind", ["square", "wide", "digits"])
def test_cutout_is_pils(kind):
    batch = images(kind)
    _, height, width, _ = batch.shape
    rng = np.random.default_rng(0)
    side = np.linspace(0, augment.CUTOUT_SIDE * width, len(batch)).astype(np.float32)
    row = (rng.random(len(batch)) * height).astype(np.float32)
    column = (rng.random(len(batch)) * width).astype(np.float32)
    row[:4], column[:4] = [0, height - 0.01, 0, height - 0.01], [0, 0, width - 0.01, width - 0.01]
    found = np.asarray(jax.jit(augment.cutout)(batch, side, row, column))
    squares = zip(batch[1:], side[1:].tolist(), row[1:].tolist(), column[1:].tolist(), strict=True)
    np.testing.assert_array_equal(found[1:], np.stack([pil_cutout(*square) for square in squares]))
    np.testing.assert_array_equal(found[0], batch[0])  # a side of 0 cuts nothing


def test_ranges_are_those_of_the_recipe():
    factors, geometry = (0.05, 0.95), (-0.3, 0.3)
    expected = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), factors)
    expected |= dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY"), geometry)
    expected |= {"Posterize": (4, 8), "Rotate": (-30, 30), "Solarize": (0, 256)}
    assert expected == augment.RANGES
    assert (augment.CUTOUT_SIDE, augment.CUTOUT_FILL) == (0.5, (125, 123, 114))


def test_grey_is_pils_where_it_is_about_to_round():
    red, green = np.meshgrid(np.arange(256), np.arange(256))
    sums = 19595 * red[..., None] + 38470 * green[..., None] + 7471 * np.arange(256)
    green, red, blue = np.nonzero(np.abs(sums % 65536 - 0x8000) <= 1)
    pixels = np.stack([red, green, blue], axis=-1).astype(np.uint8)[:, None]
    assert len(pixels) > 100
    found = augment.to_grey(jnp.asarray(pixels.transpose(2, 0, 1)[None]))
    np.testing.assert_array_equal(found[0, 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_magnitudes_fill_their_ranges():
    table = augment.magnitudes()
    for name, (low, high) in augment.RANGES.items():
        row = table[augment.OPERATIONS.index(name)]
        if name == "Posterize":
            assert np.unique(row, return_counts=True)[1].tolist() == [augment.LEVELS // 4] * 4
            assert set(row) == {4, 5, 6, 7}
            continue
        assert low <= row[0] < low + (high - low) / augment.LEVELS
        assert high - (high - low) / augment.LEVELS < row[-1] <= high
        np.testing.assert_allclose(np.diff(row), (high - low) / augment.LEVELS, rtol=1e-3, atol=1 / 65536)


# The views.


@pytest.mark.parametrize("kind", ["square", SLOW("digits")])
def test_strong_view_is_pils(kind):
    """Weak view, two operations, Cutout, as PIL does them one after the other."""
    batch, key = images(kind), jax.random.key(3)
    weak_key, strong_key = jax.random.split(key)
    found = np.asarray(strong_view(key, batch))
    operation, level, square = jax.tree.map(np.asarray, augment.draw(strong_key, batch.shape))
    wanted = []
    for i, image in enumerate(np.asarray(weak_view(weak_key, batch))):
        for j in range(2):
            image = pil_operation(image, operation[j, i], level[j, i])
        wanted.append(pil_cutout(image, *(float(value[i]) for value in square)))
    np.testing.assert_array_equal(found, np.stack(wanted))


def coordinates(batch, height=32, width=32):
    """Images whose pixels say where they come from: row + 1, column + 1."""
    rows, columns = np.mgrid[1 : height + 1, 1 : width + 1]
    return np.broadcast_to(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8), (batch, height, width, 3))


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), SLOW(64, 64, 8), (20, 28, 2)])
def test_weak_view_is_a_uniform_crop_and_flip(height, width, padding):
    batch = 4000
    views = np.asarray(weak_view(jax.random.key(0), coordinates(batch, height, width), padding=padding))
    padded = np.pad(coordinates(1, height, width)[0], ((padding, padding), (padding, padding), (0, 0)))
    middle = views[:, height // 2, width // 2 - 1 : width // 2 + 1].astype(int)
    flipped = middle[:, 1, 1] < middle[:, 0, 1]
    down = middle[:, 0, 0] - 1 - height // 2 + padding
    right = np.where(flipped, middle[:, 1, 1], middle[:, 0, 1]) - 1 - (width // 2 - 1) + padding
    for view, y, x, mirrored in zip(views[:300], down, right, flipped, strict=False):
        crop = padded[y : y + height, x : x + width]
        np.testing.assert_array_equal(view, crop[:, ::-1] if mirrored else crop)
    cells = 2 * padding + 1
    for offset in (down, right):
        counts = np.bincount(offset, minlength=cells)
        assert len(counts) == cells
        assert np.abs(counts - batch / cells).max() < 5 * np.sqrt(batch / cells)
    joint = np.bincount(down * cells + right, minlength=cells**2)
    assert ((joint - batch / cells**2) ** 2 / (batch / cells**2)).sum() < cells**2 + 6 * np.sqrt(2) * cells  # chi^2
    assert abs(flipped.mean() - 0.5) < 0.04
    for offset in (down, right):  # whatever the crop
        assert abs(flipped[offset > padding].mean() - 0.5) < 0.06


def test_weak_view_switches():
    batch = coordinates(64)
    key = jax.random.key(0)
    np.testing.assert_array_equal(weak_view(key, batch, padding=0, flip=False), batch)
    only_flip = np.asarray(weak_view(key, batch, padding=0))
    mirrored = (only_flip != batch).any((1, 2, 3))
    assert 0 < mirrored.sum() < 64
    np.testing.assert_array_equal(only_flip[mirrored], batch[mirrored, :, ::-1])


def test_weak_rotation_is_pils():
    """torchvision's RandomRotation(20): every view is PIL's for one of the angles, of which all parts are reached."""
    degrees = 20 * (2 * (np.arange(augment.LEVELS) + 0.5) / augment.LEVELS - 1)
    image = photographs(4, 24, 24)[0]
    level_of = {from_pil(to_pil(image).rotate(angle)).tobytes(): i for i, angle in enumerate(degrees)}
    batch = np.broadcast_to(image, (200, *image.shape))
    key = jax.random.key(0)
    views = np.asarray(weak_view(key, batch, padding=0, flip=False, rotation=20.0))
    levels = np.array([level_of[view.tobytes()] for view in views])
    assert np.histogram(levels, 4, (0, augment.LEVELS))[0].min() > 25

    mirrored = (np.asarray(weak_view(key, batch, padding=0, rotation=20.0)) != views).any((1, 2, 3))
    for half in (levels < augment.LEVELS / 2, levels >= augment.LEVELS / 2):  # flipped whatever the angle
        assert 0.25 < mirrored[half].mean() < 0.75


def test_weak_view_crops_and_flips_what_it_has_rotated():
    """What rotation leaves of the corners is black in the padding's, too."""
    batch, key = photographs(16, 24, 24), jax.random.key(0)
    rotated = weak_view(key, batch, padding=0, flip=False, rotation=20.0)
    moved = weak_view(key, rotated, padding=3)
    np.testing.assert_array_equal(weak_view(key, batch, padding=3, rotation=20.0), moved)


def test_operations_are_drawn_uniformly_with_replacement():
    batch, count = 28_000, len(augment.OPERATIONS)
    operation, level, (side, row, column) = jax.tree.map(
        np.asarray, augment.draw(jax.random.key(0), (batch, 32, 48, 3))
    )
    pairs = np.bincount(operation[0] * count + operation[1], minlength=count**2)
    expected = batch / count**2
    assert ((pairs - expected) ** 2 / expected).sum() < count**2 + 6 * np.sqrt(
        2
    ) * count  # chi^2: any pair, equal ones too
    uniforms = [level[0] / augment.LEVELS, level[1] / augment.LEVELS, side / 24, row / 32, column / 48]
    for value in uniforms:
        counts = np.histogram(value, 16, (0, 1))[0]
        assert counts.sum() == batch
        assert np.abs(counts - batch / 16).max() < 5 * np.sqrt(batch / 16)
    assert np.abs(np.corrcoef([*uniforms, operation[0], operation[1]]) - np.eye(7)).max() < 0.03


def test_view():
    batch, key = photographs(8, 16, 16), jax.random.key(1)
    assert augment.view("none", key, batch) is batch
    np.testing.assert_array_equal(augment.view("weak", key, batch, padding=2), weak_view(key, batch, padding=2))
    strong = jax.jit(augment.view, static_argnums=0)("strong", key, batch)
    np.testing.assert_array_equal(strong, strong_view(key, batch))
    assert strong.shape == batch.shape
    assert strong.dtype == jnp.uint8
    assert (np.asarray(strong_view(jax.random.key(2), batch)) != np.asarray(strong)).any()
    with pytest.raises(ValueError, match=r"'storng' is no view; there are 'weak', 'strong'"):
        augment.view("storng", key, batch)
    with pytest.raises(ValueError, match="images have 4 channels"):
        strong_view(key, jnp.zeros((2, 8, 8, 4), jnp.uint8))


def test_strong_view_hands_its_options_to_the_weak_one(monkeypatch):
    given, options = {}, {"padding": 8, "flip": False, "rotation": 5.0}
    monkeypatch.setattr(augment, "weak", lambda rng, images, **options: given.update(options) or images)
    view = functools.partial(augment.view, "strong", **options)
    jax.eval_shape(view, jax.random.key(0), jnp.zeros((2, 8, 8, 3), jnp.uint8))
    assert given == options


def by_two(rng, images):  # views of one's own
    return augment.weak(rng, images, padding=2, flip=False)


def scaled(rng, images):
    return images / 255


def short(rng, images):
    return images[:-1]


def nothing(rng, images):
    pass


def without_rng(images):
    return images


def by_numpy(rng, images):
    return np.flip(np.asarray(images), 2)


def by_if(rng, images):
    return images if jax.random.uniform(rng) < 0.5 else images[:, :, ::-1]


class AClass:
    def __init__(self, rng, images):
        pass


def test_own_view_is_called_without_the_options():
    key = jax.random.key(0)
    found = augment.view("test_augment:by_two", key, photographs(4, 8, 8), padding=4, flip=True, rotation=5.0)
    np.testing.assert_array_equal(found, by_two(key, photographs(4, 8, 8)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scaled", r" returned float32 of shape \(2, 8, 8, 3\); return uint8 of the images' shape, \(2, 8, 8, 3\)"),
        ("short", r" returned uint8 of shape \(1, 8, 8, 3\); return uint8 of"),
        ("nothing", " returned NoneType; return uint8 of"),
        ("by_numpy", r" is compiled with the step, .* take jax.numpy, and jnp.where \("),
        ("by_if", r" is compiled with the step, "),
        ("AClass", " is a class; name a function"),
        ("without_rng", ": too many positional arguments; it is called as view.rng, images."),
    ],
)
def test_own_view_that_cannot_be(name, message):
    view = functools.partial(augment.view, f"test_augment:{name}")
    with pytest.raises(ValueError, match=rf"^config\.views='test_augment:{name}'{message}"):
        jax.eval_shape(view, jax.random.key(0), jnp.zeros((2, 8, 8, 3), jnp.uint8))


def test_normalize():
    batch = photographs(4, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    found = augment.normalize(batch, mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (batch / 255 - mean) / std, atol=1e-6)
