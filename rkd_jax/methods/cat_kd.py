"""Class attention transfer (Guo et al., CVPR 2023, arXiv:2304.12777).

L = CE(s, y) + beta * mean (P(M_s) - P(M_t))^2, M = the classifier at each position of the map that the global
average reads, P = its average in map_resolution x map_resolution cells

Where `normalize_maps`, each class' cells are divided by their norm. The authors' networks have a classifier without
bias, whose weights begin 2 to 14 times as large (N(0, 2 / 100) but for the ShuffleNets and vgg8); here the networks
stay as they are, and M has the bias.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(15.0)  # weight of the class maps
    map_resolution: int = base.positive(2)  # cells along each side
    normalize_maps: bool = False  # each class' cells divided by their norm

    tuned: ClassVar = {
        "resnet56>resnet20": {"beta": 0.7},
        "resnet110>resnet32": {"beta": 1.8},
        "wrn_40_2>wrn_16_2": {"beta": 12.0},
        "wrn_40_2>wrn_40_1": {"beta": 1.5},
        "vgg13>vgg8": {"beta": 4.5},
        "vgg13>mobilenetv2": {"beta": 15.0, "normalize_maps": True},
        "resnet50>mobilenetv2": {"beta": 40.0, "normalize_maps": True},
        "wrn_40_2>shufflev1": {"beta": 80.0, "map_resolution": 4, "normalize_maps": True},
        "resnet32x4>shufflev1": {"beta": 600.0, "map_resolution": 4, "normalize_maps": True},
        "resnet32x4>shufflev2": {"beta": 600.0, "map_resolution": 4, "normalize_maps": True},
    }

    def init(self, rng, student, teacher, num_examples):
        _maps.both("cat_kd", student, teacher, "class_maps")
        return {}, {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = map(self._cells, _maps.both("cat_kd", student, teacher, "class_maps"))
        label = losses.cross_entropy(student.logits, batch["label"]).mean()
        return {"label": label, "class_maps": self.beta * ((s - t) ** 2).mean()}, state, {}

    def _cells(self, maps):
        """[B, H, W, C] -> [B, C, map_resolution^2]."""
        cells = jnp.moveaxis(_maps.pool(maps, (self.map_resolution,) * 2), -1, 1).reshape(len(maps), maps.shape[-1], -1)
        return _maps.unit(cells) if self.normalize_maps else cells
