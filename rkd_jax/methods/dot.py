"""Distillation-oriented trainer (Zhao et al., ICCV 2023, arXiv:2307.08436).

L = that of `inner`; v_ce = (m - delta) * v_ce + g_ce + weight decay * theta; v_kd = (m + delta) * v_kd + g_kd;
theta -= rate * (v_ce + v_kd), g_ce the gradient of the label term, g_kd that of the other terms

m and the weight decay are the optimizer's. `inner` is any method with a teacher; its hyper-parameters are set as if it
were the method: config.method = "dot", config.inner = "dkd", config.beta = 2. Parameters that one of the two gradients
does not reach, here as long as it has been exactly 0, have the optimizer's plain momentum, as in the released code: of
a method that compares maps, the student's classifier and what the method trains for itself.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rkd_jax.methods import _around, base, kd


@dataclasses.dataclass(frozen=True)
class Method(_around.Around):
    inner: base.Distiller = dataclasses.field(default=kd.Method())  # the method whose two parts get a momentum each
    delta: float = base.non_negative(0.075)  # how far their momenta are from the optimizer's

    per_term_gradients: ClassVar[bool] = True

    def wrap_optimizer(self, tx):
        return two_momenta(super().wrap_optimizer(tx), self.delta)


class State(NamedTuple):
    """v_kd, the wrapped optimizer's state, whose trace is v_ce + v_kd, and which gradients reach which arrays."""

    distill: Any
    optimizer: optax.OptState
    reached: dict[str, Any]  # of "label" and "distill", bool []: whether the gradient has ever been other than 0


def two_momenta(tx: optax.GradientTransformation, delta: float) -> optax.GradientTransformationExtraArgs:
    """Splits the momentum of an SGD optimizer (optax.trace) in two, for the gradients of two terms.

    With v = v_ce + v_kd, the two rules add up to v = m * v + [g + delta * (v_kd - v_ce)] + weight decay * theta: the
    optimizer as it is, fed with what is in brackets. Where only one gradient is there to be split, delta is 0.
    """
    momentum = momentum_of(tx)
    if not 0 <= delta <= min(momentum, 1 - momentum):
        raise ValueError(
            f"config.delta={delta} puts a momentum of config.method='dot' out of [0, 1]; "
            f"with config.momentum={momentum:g}, take at most {min(momentum, 1 - momentum):g}"
        )

    def init(params):
        reached = {term: jax.tree.map(lambda _: jnp.array(False), params) for term in ("label", "distill")}
        return State(jax.tree.map(jnp.zeros_like, params), tx.init(params), reached)

    def update(grads, state, params=None, *, term_grads, **extra):
        trace = optax.tree_utils.tree_get(state.optimizer, "trace")
        reached = jax.tree.map(lambda before, g: before | jnp.any(g != 0), state.reached, term_grads)
        split = jax.tree.map(lambda *both: delta * jnp.all(jnp.stack(both)), *reached.values())
        fed = jax.tree.map(lambda g, kd, v, d: g + d * (2 * kd - v), grads, state.distill, trace, split)
        distill = jax.tree.map(lambda kd, g, d: (momentum + d) * kd + g, state.distill, term_grads["distill"], split)
        updates, optimizer = optax.with_extra_args_support(tx).update(fed, state.optimizer, params, **extra)
        return updates, State(distill, optimizer, reached)

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_of(tx: optax.GradientTransformation) -> float:
    """The momentum of an SGD optimizer, read off what a gradient of 1 leaves in its trace after another step.

    ValueError where it has no trace or several, or a large gradient does not go into it as it is: clipped, or scaled;
    and where a step is not along the trace: Nesterov's.
    """
    traces, moves = [], []
    with jax.ensure_compile_time_eval():
        params = jnp.zeros(())
        for first, then in ((1.0, 0.0), (1e6, 0.0), (1.0, 1.0)):
            state = tx.init(params)
            for gradient in (first, then):
                move, state = tx.update(jnp.float32(gradient), state, params)
                traces.append([trace for _, trace in optax.tree_utils.tree_get_all_with_path(state, "trace")])
                moves.append(move)
    if not traces[0]:
        raise ValueError(
            "config.method='dot' splits the momentum of SGD, and there is none; set config.momentum=0.9 and "
            "config.optimizer='sgd'"
        )
    if traces[0] != [1.0] or traces[2] != [1e6]:
        raise ValueError(
            "config.method='dot' splits the momentum of plain SGD, and this optimizer gathers the gradients in another "
            "way; set config.optimizer='sgd'"
        )
    if not jnp.allclose(moves[5] * traces[1][0], moves[1] * traces[5][0], rtol=1e-4):
        raise ValueError("config.method='dot' splits the momentum of plain SGD; set config.nesterov=False")
    return round(float(traces[1][0]), 6)
