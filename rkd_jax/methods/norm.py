"""NORM, N-to-one representation matching (Liu et al., ICLR 2023, arXiv:2305.13803).

L = alpha * CE(Z(s), y) + beta * w(epoch) * segments * mean (E - F_t)^2 + kd_weight * T^2 * KL(softmax(Z(t) / T) ||
softmax(Z(s) / T)); E = b(W F_s) in `segments` parts, each of which is to be F_t; s = the classifier of the average of
F_s + b(V E), Z(x) = logit_scale * (x - mean x) / std x

F_s is the map that the student's global average reads, F_t the teacher's last stage's, W and V are 1x1 convolutions, b
is batch normalisation. The larger of two maps is max-pooled to the side of the smaller, which has to divide its own. w
is 0.1 for 10 epochs, 0.5 to the 20th, 1 to the 180th, 0.5 to the 210th, and 0.1 after that, of `schedule_epochs` =
240. W, V and b are linear once the statistics are fixed, and merge into the classifier: the network that is tested and
saved is the plain one.

The authors' page has alpha 0.1 for resnet32x4 > resnet8x4, their script tries 0.0625 to 0.5 for resnet110 > resnet32,
and no other pair's is known: 0.1 for all is ours. Tables 1 and 2 have their NORM+KD, of an unknown kd_weight. Their
ShuffleNets fail at the sum with F_s, which is the image there, and start W and V as PyTorch does by default; in wrn W
and V come before the last batch normalisation, where they could not be merged; their MobileNetV2 has no ReLU behind its
stem and its last convolution. Here all networks are as for other methods, and W and V start as in the authors' resnets.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from rkd_jax import losses, models
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import BatchNorm, kaiming_normal

WEIGHTS = {210: 0.1, 180: 0.5, 20: 1.0, 10: 0.5, 0: 0.1}  # w, from the epoch of 240 on that is the key


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(0.1)  # weight of the label loss
    beta: float = base.non_negative(1.0)  # weight of the matched maps
    segments: int = base.positive(8)  # N: how many times over the student's expanded map is to hold the teacher's
    logit_scale: float = base.positive(2.5)  # standard deviation of the logits in the losses
    schedule_epochs: float = base.positive(240.0)  # epochs over which w goes
    kd_weight: float = base.non_negative(0.0)  # weight of an added T^2 * KL term; 0: none
    temperature: float = base.positive(4.0)  # T of the added term

    weighted_by: ClassVar = {"temperature": "kd_weight"}

    def init(self, rng, student, teacher, num_examples):
        s, t = self._sides(student, teacher)
        variables = self._transform(t).lazy_init(rng, s, False)
        return variables["params"], variables["batch_stats"]

    def loss(self, params, state, student, teacher, batch, context):
        s, t = self._sides(student, teacher)
        variables = {"params": params, "batch_stats": state}
        (expanded, x), updated = self._transform(t).apply(variables, losses.promote(s), True, mutable=["batch_stats"])
        expanded, target = shrink(expanded, t), shrink(losses.promote(t), s)[..., None, :]
        expanded = expanded.reshape(*expanded.shape[:-1], self.segments, -1)
        past = [context.epoch >= epoch * self.schedule_epochs / 240 for epoch in WEIGHTS]
        weight = jnp.select(past, list(WEIGHTS.values()))
        logits = context.resume_student(models.LAST, x).logits
        terms = {
            "label": self.alpha * losses.cross_entropy(self._scaled(logits), batch["label"]).mean(),
            "maps": self.beta * weight * self.segments * ((expanded - target) ** 2).mean(),
        }
        if self.kd_weight:
            kl = losses.kl(self._scaled(logits), self._scaled(teacher.logits), self.temperature)
            terms["distill"] = self.kd_weight * kl.mean()
        return terms, updated["batch_stats"], {"top1": 100 * (logits.argmax(-1) == batch["label"]).mean()}

    def deploy(self, network, images, variables, params, state):
        try:
            path = models.classifier(network, variables, images)
            flat = traverse_util.flatten_dict(variables)
            kernel, bias = (flat["params", *path, leaf] for leaf in ("kernel", "bias"))
        except (KeyError, ValueError) as error:
            what = f"it has no {error.args[0][-1]}" if isinstance(error, KeyError) else error
            raise ValueError(f"config.method='norm' merges layers into config.student's classifier: {what}") from error
        features, channels = params["Dense_0"]["kernel"].shape[::-1]
        # What is affine is known by what it makes of 0 and of each channel's unit.
        rows = jnp.eye(channels + 1, channels, -1, jnp.float32)[:, None, None]
        with jax.default_matmul_precision("highest"):  # the constant cancels, and a GPU's or a TPU's rounding would not
            _, rows = Transform(features).apply({"params": params, "batch_stats": state}, rows, False)
        constant, rows = rows[0, 0, 0], rows[1:, 0, 0] - rows[0, 0, 0]
        merged = {
            "kernel": jnp.einsum("kd,...dc->...kc", rows, kernel, precision="highest"),
            "bias": bias + jnp.einsum("d,dc->c", constant, kernel.reshape(channels, -1), precision="highest"),
        }
        flat |= {("params", *path, leaf): value for leaf, value in merged.items()}
        return traverse_util.unflatten_dict(flat)

    def _scaled(self, logits):
        centred = losses.promote(logits) - losses.promote(logits).mean(axis=-1, keepdims=True)
        return self.logit_scale * centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-7)

    def _sides(self, student, teacher):
        s, t = _maps.both("norm", student, teacher, "last_map", "features")
        if any(max(sides) % min(sides) for sides in zip(s.shape[1:3], t[-1].shape[1:3], strict=True)):
            raise ValueError(
                f"config.method='norm' matches maps of {s.shape[1]} x {s.shape[2]} in config.student and of "
                f"{t[-1].shape[1]} x {t[-1].shape[2]} in config.teacher, neither a multiple; take another pair"
            )
        return s, t[-1]

    def _transform(self, t):
        return Transform(self.segments * t.shape[-1])


def shrink(x, like):
    """[B, H, W, K] -> [B, H', W', K], the maxima over what is one position of a smaller map `like`."""
    window = tuple(max(1, side // small) for side, small in zip(x.shape[1:3], like.shape[1:3], strict=True))
    return nn.max_pool(x, window, window)


class Transform(nn.Module):
    """Two 1x1 convolutions, each with batch normalisation, on the way to the classifier."""

    features: int  # in between

    @nn.compact
    def __call__(self, x, train):
        """[B, H, W, K] -> the map in between, [B, H, W, features], and x + what the second makes of it."""
        expanded = BatchNorm()(nn.Dense(self.features, use_bias=False, kernel_init=kaiming_normal)(x), train)
        contracted = nn.Dense(x.shape[-1], use_bias=False, kernel_init=kaiming_normal)(expanded)
        return expanded, x + BatchNorm()(contracted, train)
