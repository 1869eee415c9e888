"""NORM, N-to-one representation matching (Liu et al., ICLR 2023, arXiv:2305.13803).

L = alpha * CE(logit_scale * N(s), y) + beta * w(epoch) * segments * mean (E - F_t)^2; E = b(W F_s) in `segments` parts,
each of which is to be F_t; s = the classifier of the average of F_s + b(V E), N(s) = (s - mean s) / std s

F_s is the map that the student's global average reads, F_t the teacher's last stage's, W and V are 1x1 convolutions, b
is batch normalisation. w is 0.1 for ten epochs, 0.5 to the 20th, 1 to the 180th, 0.5 to the 210th, and 0.1 after that,
as released for 240 epochs. W, V and b are linear once the statistics are fixed, and merge into the classifier: the
network that is tested and saved is the plain one. The paper has no b and no sum with F_s, the released code has both.
Its script tries alpha of 0.0625, 0.125, 0.25 and 0.5, and does not say which is whose. In wrn it has the convolutions
before the last batch normalisation, where they could not be merged; here they are behind it. Of two sides, the larger
map is brought to the smaller by its maxima, where it is a multiple.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from rkd_jax import losses, models
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import BatchNorm, kaiming_normal

WEIGHTS = {210: 0.1, 180: 0.5, 20: 1.0, 10: 0.5, 0: 0.1}  # w, from the epoch on that is the key


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(1.0)  # weight of the label loss
    beta: float = 1.0  # weight of the matched maps
    segments: int = base.positive(8)  # N: how many times over the student's expanded map is to hold the teacher's
    logit_scale: float = base.positive(2.5)  # standard deviation of the logits in the label loss

    def init(self, rng, student, teacher, num_examples):
        s, t = self._maps(student, teacher)
        variables = self._transform(t).lazy_init(rng, s, False)
        return variables["params"], variables["batch_stats"]

    def loss(self, params, state, student, teacher, batch, context):
        s, t = self._maps(student, teacher)
        variables = {"params": params, "batch_stats": state}
        (expanded, x), updated = self._transform(t).apply(variables, losses.promote(s), True, mutable=["batch_stats"])
        expanded, target = shrink(expanded, t), shrink(losses.promote(t), s)[..., None, :]
        expanded = expanded.reshape(*expanded.shape[:-1], self.segments, -1)
        weight = jnp.select([context.epoch >= epoch for epoch in WEIGHTS], list(WEIGHTS.values()))
        logits = losses.promote(context.resume_student(models.LAST, x).logits)
        centred = logits - logits.mean(axis=-1, keepdims=True)
        scaled = self.logit_scale * centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-7)
        terms = {
            "label": self.alpha * losses.cross_entropy(scaled, batch["label"]).mean(),
            "maps": self.beta * weight * self.segments * ((expanded - target) ** 2).mean(),
        }
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
        rows = jnp.eye(channels + 1, channels, -1)[
            :, None, None
        ]  # 0, then each channel's unit: what is affine is known
        _, rows = Transform(features).apply({"params": params, "batch_stats": state}, rows, False)
        constant, rows = rows[0, 0, 0], rows[1:, 0, 0] - rows[0, 0, 0]
        merged = {
            "kernel": jnp.einsum("kd,...dc->...kc", rows, kernel, precision="highest"),
            "bias": bias + jnp.einsum("d,dc->c", constant, kernel.reshape(channels, -1), precision="highest"),
        }
        flat |= {("params", *path, leaf): value for leaf, value in merged.items()}
        return traverse_util.unflatten_dict(flat)

    def _maps(self, student, teacher):
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
