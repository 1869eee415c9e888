"""Cross-entropy alone, with no teacher: how teachers and baseline students are trained.

L = CE(s, y)
"""

import dataclasses
from typing import ClassVar

from rkd_jax import losses
from rkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    needs_teacher: ClassVar[bool] = False

    def loss(self, params, state, student, teacher, batch, context):
        return {"label": losses.cross_entropy(student.logits, batch["label"]).mean()}, state, {}
