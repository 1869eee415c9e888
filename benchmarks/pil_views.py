"""The two views of an image as PyTorch's users make them, in PIL: what rkd_jax.data.augment does on the device.

It imports no JAX, so that the workers of a DataLoader start fast.
"""

import random

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

FILL = (125, 123, 114)


def _affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


OPERATIONS = (
    lambda image: ImageOps.autocontrast(image),
    lambda image: ImageOps.equalize(image),
    lambda image: image,
    lambda image: ImageEnhance.Brightness(image).enhance(random.uniform(0.05, 0.95)),
    lambda image: ImageEnhance.Color(image).enhance(random.uniform(0.05, 0.95)),
    lambda image: ImageEnhance.Contrast(image).enhance(random.uniform(0.05, 0.95)),
    lambda image: ImageEnhance.Sharpness(image).enhance(random.uniform(0.05, 0.95)),
    lambda image: ImageOps.posterize(image, int(random.uniform(4, 8))),
    lambda image: image.rotate(random.uniform(-30, 30)),
    lambda image: _affine(1, random.uniform(-0.3, 0.3), 0, 0, 1, 0)(image),
    lambda image: _affine(1, 0, 0, random.uniform(-0.3, 0.3), 1, 0)(image),
    lambda image: ImageOps.solarize(image, random.uniform(0, 256)),
    lambda image: _affine(1, 0, random.uniform(-0.3, 0.3) * image.width, 0, 1, 0)(image),
    lambda image: _affine(1, 0, 0, 0, 1, random.uniform(-0.3, 0.3) * image.height)(image),
)


def weak(image: Image.Image) -> Image.Image:
    """A random crop after padding with 4 zeros, and a flip of half of the images."""
    x, y = random.randrange(9), random.randrange(9)
    image = ImageOps.expand(image, 4).crop((x, y, x + image.width, y + image.height))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def strong(image: Image.Image) -> Image.Image:
    """The weak view, two operations of fourteen, and Cutout."""
    image = weak(image)
    for operation in random.choices(OPERATIONS, k=2):
        image = operation(image)
    side = random.uniform(0, 0.5) * image.width
    x, y = (int(max(0, random.uniform(0, extent) - side / 2)) for extent in image.size)
    ImageDraw.Draw(image).rectangle((x, y, min(image.width, x + side), min(image.height, y + side)), FILL)
    return image


class TwoViews(torch.utils.data.Dataset):
    """uint8 images [N, H, W, 3] as (weak view, strong view, label), normalised float tensors."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return tensor(weak(image)), tensor(strong(image)), int(self.labels[index])


def tensor(image: Image.Image) -> torch.Tensor:
    """[3, H, W], as torchvision's ToTensor and Normalize."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255) - 0.5).div_(0.25)
