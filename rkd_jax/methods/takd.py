"""Knowledge distillation via a teacher assistant (Mirzadeh et al., AAAI 2020, arXiv:1902.03393).

L = alpha * CE(s, y) + beta * T^2 * KL(softmax(t / T) || softmax(s / T)), for each link of teacher > assistant > student

Each link is a run of its own, of the same recipe: the first distils the teacher into the assistant, the next the
trained assistant, now config.teacher and config.teacher_checkpoint, into what follows; `links` names them in order. The
loss here is one link's. The assistants in `tuned` are ours, between the pair in size or accuracy: the papers that
report TAKD on these pairs do not name theirs.
"""

import dataclasses
import itertools
from typing import ClassVar

from rkd_jax.methods import kd


@dataclasses.dataclass(frozen=True)
class Method(kd.Method):
    assistant: str = ""  # a network between teacher and student, or several: "resnet56>resnet44"

    tuned: ClassVar = {
        "resnet56>resnet20": {"assistant": "resnet32"},
        "resnet32x4>resnet8x4": {"assistant": "wrn_40_2"},
        "wrn_40_2>wrn_16_2": {"assistant": "resnet110"},
        "wrn_40_2>wrn_40_1": {"assistant": "wrn_16_2"},
        "vgg13>vgg8": {"assistant": "vgg11"},
        "resnet110>resnet32": {"assistant": "resnet56"},
        "resnet32x4>shufflev2": {"assistant": "wrn_40_2"},
        "vgg13>mobilenetv2": {"assistant": "vgg8"},
        "resnet50>mobilenetv2": {"assistant": "vgg13"},
        "wrn_40_2>shufflev1": {"assistant": "wrn_16_2"},
        "resnet32x4>shufflev1": {"assistant": "wrn_40_2"},
    }

    def links(self, teacher: str, student: str) -> list[tuple[str, str]]:
        """The runs of the chain, (its teacher, its student) each; ValueError where no assistant is named."""
        if not self.assistant:
            raise ValueError(
                f"config.assistant is not set, and no assistant is known for {teacher}>{student}; "
                "name a network between the two, or several as 'resnet56>resnet44'"
            )
        assistants = [name.strip() for name in self.assistant.split(">")]
        if not all(assistants):
            raise ValueError(f"config.assistant={self.assistant!r} has an empty name; write, say, 'resnet56>resnet44'")
        chain = [teacher, *assistants, student]
        if repeated := [name for i, name in enumerate(chain[1:], 1) if name.lower() in map(str.lower, chain[1:i])]:
            raise ValueError(
                f"config.assistant={self.assistant!r}: {repeated[0]!r} is twice in the chain to {student!r}; each "
                "assistant is a network of its own"
            )
        return list(itertools.pairwise(chain))
