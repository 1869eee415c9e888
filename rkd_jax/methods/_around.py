"""What the methods share that have another within, `config.inner`: they pass on what they do not change."""

import contextlib
import dataclasses

from rkd_jax import methods
from rkd_jax.methods import base, takd


@dataclasses.dataclass(frozen=True)
class Around(base.Distiller):
    """A method around another, its field `inner`, whose hyper-parameters are set as if it were the method."""

    def __post_init__(self):
        super().__post_init__()
        (default,) = (field.default for field in dataclasses.fields(self) if field.name == "inner")
        unset = f"unset, it is {methods.called(default)!r}"
        if not self.inner.needs_teacher:
            raise ValueError(f"config.inner has to be a method with a teacher; {unset}")
        if isinstance(self.inner, takd.Method):
            raise ValueError(f"config.inner cannot be 'takd', whose chain of runs it would leave out; {unset}")
        if self.inner.per_term_gradients:
            raise ValueError(f"config.inner cannot be 'dot', nor any other with gradients per term; {unset}")
        if isinstance(self.inner, Around):
            inner = methods.hyperparameters(self)["inner"]
            raise ValueError(f"config.inner cannot be {inner!r}, which has one of its own; {unset}")

    @property
    def joint_views(self):
        return self.inner.joint_views

    @property
    def resumes_teacher(self):
        return self.inner.resumes_teacher

    def init(self, *args):
        with named_inner():
            return self.inner.init(*args)

    def loss(self, *args):
        with named_inner():
            return self.inner.loss(*args)

    def deploy(self, *args):
        with named_inner():
            return self.inner.deploy(*args)

    def wrap_optimizer(self, tx):
        return self.inner.wrap_optimizer(tx)


@contextlib.contextmanager
def named_inner():
    """The inner method's errors name the field that chose it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("config.method=", "config.inner=")) from error
