"""Knowledge review (Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044).

L = CE(s, y) + beta * min(epoch / warmup_epochs, 1) * sum over levels of HCL(R(F_s), F_t); HCL = the weighted mean of
the maps' mean squared differences as they are and averaged to 4 x 4, 2 x 2 and 1 x 1, with weights 1, 1/2, 1/4, 1/8

The levels are the stages and the embedding, a map of one position. From the deepest up, R brings a level of the student
to the embedding's channels (at most 512), mixes in what came from the level below by two maps of attention, and from
this makes a map of the teacher's size. The student's maps are as it hands them on, the teacher's before their
activation. Averages to no fewer cells than a map has are left out. The epochs count from 1, as in mdistiller. beta is
the authors', who had batches of 128 and Nesterov's momentum, but for vgg8 and MobileNetV2, for which they publish none.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import torch_default, torch_default_bias

he_uniform_linear = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # Kaiming-uniform, a = 1


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(5.0)  # weight of the reviewed maps
    warmup_epochs: float = base.non_negative(20.0)  # epochs until they have their full weight

    tuned: ClassVar = {"resnet20": {"beta": 0.6}, "resnet32": {"beta": 1.0}, "shufflev2": {"beta": 8.0}}

    def init(self, rng, student, teacher, num_examples):
        ours, theirs = jax.eval_shape(levels, student, teacher)
        return _maps.init(Review.of(theirs), rng, *ours), {}

    def loss(self, params, state, student, teacher, batch, context):
        ours, theirs = levels(student, teacher)
        reviewed = _maps.apply(Review.of(theirs), params, *ours)
        total = sum(map(hierarchical_distance, reviewed, theirs))
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "review": self.beta * context.warmup(self.warmup_epochs) * total,
        }
        return terms, state, {}


def levels(student, teacher):
    """The student's maps and the teacher's, from the deepest up: the embeddings, as maps of one position, first."""
    stages = _maps.pairs("reviewkd", student, teacher, theirs="preactivations")
    ours, theirs = zip(*reversed(stages), strict=True)
    s, t = _maps.both("reviewkd", student, teacher, "embedding")
    return (s[:, None, None], *ours), (t[:, None, None], *theirs)


def hierarchical_distance(s, t):
    """HCL; [B, H, W, K], [B, H, W, K] -> []."""
    t = losses.promote(t)
    total, weights = ((s - t) ** 2).mean(), 1.0
    for i, side in enumerate(side for side in (4, 2, 1) if side < min(s.shape[1:3])):
        weight = 0.5 ** (i + 1)
        total += weight * (_maps.pool(s - t, (side, side)) ** 2).mean()
        weights += weight
    return total / weights


class Review(nn.Module):
    """Attention-based fusion of the levels, from the deepest up."""

    sizes: tuple[tuple[int, int], ...]  # height and width of the teacher's maps
    channels: tuple[int, ...]

    @classmethod
    def of(cls, theirs) -> "Review":
        """For maps of the teacher, [B, H, W, K] each."""
        return cls(tuple(t.shape[1:3] for t in theirs), tuple(t.shape[-1] for t in theirs))

    @nn.compact
    def __call__(self, *maps):
        """The student's maps -> as many, each of the teacher's size."""
        width, below, reviewed = min(512, maps[0].shape[-1]), None, []
        for x, size, channels in zip(maps, self.sizes, self.channels, strict=True):
            x = _maps.BatchNorm()(nn.Dense(width, use_bias=False, kernel_init=he_uniform_linear)(x))
            if below is not None:
                below = _maps.nearest(below, x.shape[1:3])
                both = jnp.concatenate([x, below], axis=-1)
                mix = nn.Dense(2, kernel_init=torch_default, bias_init=torch_default_bias(2 * width))(both)
                mix = nn.sigmoid(mix)
                x = x * mix[..., :1] + below * mix[..., 1:]
            below = _maps.nearest(x, size)
            convolve = nn.Conv(channels, (3, 3), padding=1, use_bias=False, kernel_init=he_uniform_linear)
            reviewed.append(_maps.BatchNorm()(convolve(below)))
        return reviewed
