"""FitNets, "hints for thin deep nets" (Romero et al., ICLR 2015, arXiv:1412.6550).

L = CE(s, y) + beta * mean (r(F_s) - F_t)^2, F the map of stage `hint_stage`, r a convolution, batch normalisation and
ReLU

r is trained beside the student: a 3x3 convolution of stride 2 where the student's map has twice the teacher's side, a
transposed 4x4 one where it has half, and otherwise one without padding that is as large as the difference asks. As in
RepDistiller and mdistiller the hint is a term of the loss from the first step on; the paper trains with it first. Their
convolution's bias is left out, for the batch normalisation takes it away again.
"""

import dataclasses

import flax.linen as nn

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import torch_default

transposed_default = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # PyTorch's: it swaps in and out


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = 100.0  # weight of the hint
    hint_stage: int = 2  # the stage whose map is the hint; 0 is the stem

    def init(self, rng, student, teacher, num_examples):
        s, t = self._hints(student, teacher)
        return _maps.init(Regressor.between(s, t), rng, s), {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = self._hints(student, teacher)
        found = _maps.apply(Regressor.between(s, t), params, s)
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "hint": self.beta * ((found - losses.promote(t)) ** 2).mean(),
        }
        return terms, state, {}

    def _hints(self, student, teacher):
        sides = _maps.both("fitnets", student, teacher, "features")
        if not 0 <= self.hint_stage < (count := min(map(len, sides))):
            raise ValueError(f"config.hint_stage={self.hint_stage} is no stage of both networks; take 0 to {count - 1}")
        return sides[0][self.hint_stage], sides[1][self.hint_stage]


class Regressor(nn.Module):
    """From the student's map to one of the teacher's size."""

    features: int  # the teacher's channels
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    transposed: bool = False

    @classmethod
    def between(cls, s, t) -> "Regressor":
        """The regressor for two maps, [B, H, W, K] each; ValueError where none leads from one side to the other."""
        (height, width), (to_height, to_width), features = s.shape[1:3], t.shape[1:3], t.shape[-1]
        if (height, width) == (2 * to_height, 2 * to_width):
            return cls(features, (3, 3), stride=2, padding=1)
        if (2 * height, 2 * width) == (to_height, to_width):
            return cls(features, (4, 4), stride=2, padding=2, transposed=True)
        if height < to_height or width < to_width:
            raise ValueError(
                f"config.hint_stage names a map of {height} x {width} in config.student and of {to_height} x "
                f"{to_width} in config.teacher; a regressor leads to the same size, its double, or less: name another"
            )
        return cls(features, (1 + height - to_height, 1 + width - to_width))

    @nn.compact
    def __call__(self, x):
        """[B, H, W, K] -> [B, H', W', features]."""
        layer = nn.ConvTranspose if self.transposed else nn.Conv
        strides, padding = (self.stride,) * 2, ((self.padding,) * 2,) * 2
        init = transposed_default if self.transposed else torch_default
        convolve = layer(self.features, self.kernel, strides, padding, use_bias=False, kernel_init=init)
        return nn.relu(_maps.BatchNorm()(convolve(x)))
