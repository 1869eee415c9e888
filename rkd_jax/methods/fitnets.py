"""FitNets, "hints for thin deep nets" (Romero et al., ICLR 2015, arXiv:1412.6550).

L = CE(s, y) + beta * mean (r(F_s) - F_t)^2, F the map of stage `hint_stage`, r a convolution, batch normalisation and
ReLU

r is trained beside the student: a 3x3 convolution of stride 2 where the student's map has twice the teacher's side, a
transposed 4x4 one where it has half, and otherwise one without padding that is as large as the difference asks. As in
RepDistiller and mdistiller the hint is a term of the loss from the first step on; the paper trains with it first. Their
convolution's bias is left out, for the batch normalisation takes it away again.
"""

import dataclasses

from rkd_jax import losses
from rkd_jax.methods import _maps, base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(100.0)  # weight of the hint
    hint_stage: int = 2  # the stage whose map is the hint; 0 is the stem

    def init(self, rng, student, teacher, num_examples):
        s, t = self._hints(student, teacher)
        return _maps.init(regressor(s, t), rng, s), {}

    def loss(self, params, state, student, teacher, batch, context):
        s, t = self._hints(student, teacher)
        found = _maps.apply(regressor(s, t), params, s)
        terms = {
            "label": losses.cross_entropy(student.logits, batch["label"]).mean(),
            "hint": self.beta * ((found - losses.promote(t)) ** 2).mean(),
        }
        return terms, state, {}

    def _hints(self, student, teacher):
        sides = _maps.both("fitnets", student, teacher, "features")
        count = min(map(len, sides))
        if not 0 <= self.hint_stage < count:
            raise ValueError(f"config.hint_stage={self.hint_stage} is no stage of both networks; take 0 to {count - 1}")
        return sides[0][self.hint_stage], sides[1][self.hint_stage]


def regressor(s, t):
    """From the student's map to one of the teacher's size; ValueError where none leads there."""
    mend = "a regressor leads to the same size, its double, or less: name another"
    return _maps.Connector.between(s, t, "config.hint_stage names a map", mend)
