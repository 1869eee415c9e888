"""Function-consistent feature distillation (Liu et al., ICLR 2023, arXiv:2304.11832).

L = alpha * CE(s, y) + beta * D(s) + feature_weight * min(epoch / warmup_epochs, 1) * (A + sum over paths of F) +
mixture_weight * sum over paths of D(m), D(x) = T^2 * KL(softmax(t / T) || softmax(x / T))

A path goes through the first stages of one network and, behind a connector, through the rest of the other, to the
logits m: `extra_paths` of all, drawn anew each step. A = the sum over stages of mean (c(F_s) - F_t)^2, c a connector; F
= the same of the path's maps behind it, where it ends in the teacher. Of the last maps, the averages over positions
after the ReLU are compared as well. Connectors are trained beside the student: a 3x3 convolution (of stride 2, or a
transposed 4x4 one, where the sides differ), batch normalisation and, into a network whose stages hand on what comes
after their ReLU, a leaky ReLU. Their convolutions have no bias, which the batch normalisation would take away.
Batch normalisation on a path goes by the path's own batch. So it does, as released, where the teacher makes F_t and t,
except in its stem; with `teacher_in_training` off, the running averages are used there.

The authors' values for resnet56 > resnet20, vgg13 > vgg8, wrn_40_2 > wrn_16_2 and resnet32x4 > ShuffleV2 are here. The
others of Tables 1 and 2 have vgg13 > vgg8's, which may not be theirs: their files are not available. Theirs is
SGD with Nesterov's momentum, here config.nesterov, and passes over the connectors of paths that were not drawn, which
here have a gradient of 0: weight decay and momentum go on.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import kaiming_normal

leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.1)


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    alpha: float = base.non_negative(1.0)  # weight of the label loss
    beta: float = base.non_negative(1.0)  # weight of the teacher's logits for the student's
    temperature: float = base.positive(4.0)  # T
    feature_weight: float = base.non_negative(5.0)  # weight of the maps, A and F
    mixture_weight: float = base.non_negative(1.0)  # weight of the teacher's logits for the paths'
    extra_paths: int = base.non_negative(2)  # paths a step, of 4 in all, or of 6 between networks of five maps
    warmup_epochs: float = base.non_negative(20.0)  # epochs until the maps have their full weight
    teacher_in_training: bool = True  # the teacher's own maps and logits by the batch's statistics, as released

    resumes_teacher: ClassVar[bool] = True
    tuned: ClassVar = {
        "resnet56>resnet20": {"feature_weight": 0.02},
        "wrn_40_2>wrn_16_2": {"mixture_weight": 0.2},
        "resnet32x4>shufflev2": {"temperature": 8.0},
    }

    def init(self, rng, student, teacher, num_examples):
        s, t = _maps.both("fcfd", student, teacher, "cuts")
        rngs = iter(jax.random.split(rng, 2 * len(t.maps)))
        pairs = [(s.maps[i], t.maps[j]) for i, j in stages(s, t)]
        params = {
            "to_teacher": [_maps.init(connector(a, b, t.activated), next(rngs), a) for a, b in pairs],
            "to_student": [_maps.init(connector(b, a, s.activated), next(rngs), b) for a, b in pairs[:-1]],
        }
        return params, {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = _maps.both("fcfd", student, teacher, "cuts")
        if self.teacher_in_training:
            teacher = jax.lax.stop_gradient(context.resume_teacher(0, t.maps[0]))
            t = teacher.cuts
        places = stages(s, t)
        targets = [losses.promote(t.maps[j]) for _, j in places]
        connected = [
            _maps.apply(connector(s.maps[i], target, t.activated), own, s.maps[i])
            for own, (i, _), target in zip(params["to_teacher"], places, targets, strict=True)
        ]

        def distil(logits):
            return losses.kl(logits, teacher.logits, self.temperature).mean()

        def through_teacher(k):
            found = context.resume_teacher(places[k][1], connected[k])
            maps = [losses.promote(found.cuts.maps[j]) for _, j in places[k + 1 :]]
            return distance(maps, targets[k + 1 :]), distil(found.logits)

        def through_student(k):
            own = s.maps[places[k][0]]
            x = _maps.apply(connector(targets[k], own, s.activated), params["to_student"][k], targets[k])
            return 0.0, distil(context.resume_student(places[k][0], x).logits)

        # All are computed: a condition around convolutions costs a CPU more than it saves, and vmap takes both sides.
        found = [path(k) for path in (through_teacher, through_student) for k in range(len(places) - 1)]
        drawn = jax.random.permutation(context.rng, len(found)) < self.extra_paths
        functions, mixtures = (
            sum(jnp.where(taken, path[part], 0.0) for taken, path in zip(drawn, found, strict=True)) for part in (0, 1)
        )
        weight = self.feature_weight * context.warmup(self.warmup_epochs)
        terms = {
            "label": self.alpha * losses.cross_entropy(student.logits, batch["label"]).mean(),
            "distill": self.beta * distil(student.logits),
            "appearance": weight * distance(connected, targets),
            "function": weight * functions,
            "mixture": self.mixture_weight * mixtures,
        }
        return terms, state, {}


def stages(s, t):
    """The places of a student's and a teacher's maps that go together, without the stem's: from the last ones up."""
    count = min(len(s.maps), len(t.maps)) - 1
    if count < 1:
        raise ValueError(
            f"config.method='fcfd' compares the maps behind the stem's, and config.student has {len(s.maps)} in its "
            f"rkd_jax.models.Cuts, config.teacher {len(t.maps)}; two are the least"
        )
    return list(zip(range(len(s.maps))[-count:], range(len(t.maps))[-count:], strict=True))


def distance(found, targets):
    """The sum over maps of their mean squared differences, and that of the last ones' averages after the ReLU."""
    total = sum(((x - target) ** 2).mean() for x, target in zip(found, targets, strict=True))
    average = [nn.relu(maps[-1]).mean(axis=(1, 2)) for maps in (found, targets)]
    return total + ((average[0] - average[1]) ** 2).mean()


def connector(x, like, activated):
    """From a map to one of the other network's size."""
    mend = "a connector leads to the same side, its double or its half: take another pair"
    inits = kaiming_normal, _maps.transposed_default  # the released code sets the first alone
    return _maps.Connector.between(
        x,
        like,
        "config.method='fcfd' connects a map",
        mend,
        True,
        inits=inits,
        activation=leaky_relu if activated else None,
    )
