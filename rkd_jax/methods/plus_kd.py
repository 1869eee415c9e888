"""Any method with a KD term beside it: CRD+KD (Tian et al., ICLR 2020, arXiv:1910.10699) and its like.

L = that of `inner` + kd_weight * T^2 * KL(softmax(t / T) || softmax(s / T)), T = kd_temperature

RepDistiller's `-a`. `inner` is any method with a teacher; its hyper-parameters are set as if it were the method:
config.method = "plus_kd", config.inner = "crd", config.beta = 0.8. ranking_alignment and norm have a kd_weight of their
own.
"""

import dataclasses

from rkd_jax import losses, methods
from rkd_jax.methods import _around, base, crd


@dataclasses.dataclass(frozen=True)
class Method(_around.Around):
    inner: base.Distiller = dataclasses.field(default=crd.Method())  # the method beside which KD stands
    kd_weight: float = base.non_negative(1.0)  # weight of the KD term
    kd_temperature: float = base.positive(4.0)  # T

    def __post_init__(self):
        super().__post_init__()
        if any(field.name == "kd_weight" for field in dataclasses.fields(self.inner)):
            raise ValueError(
                f"config.inner={methods.called(self.inner)!r} has a KD term of its own; set it as config.method, "
                "with config.kd_weight"
            )

    def loss(self, params, state, student, teacher, batch, context):
        terms, state, metrics = super().loss(params, state, student, teacher, batch, context)
        kl = losses.kl(student.logits, teacher.logits, self.kd_temperature)  # [B], or [V, B] of all views
        return terms | {"kd": self.kd_weight * kl.mean(axis=-1).sum()}, state, metrics
