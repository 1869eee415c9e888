"""The training step and the evaluation step: pure functions, and the only place that jits training.

One step: gather the batch from the set on the device, augment it into one image per view, apply the teacher to all
views and the student to each, let the method make its loss, and update. All of it is a function of the state, the step
number in it, and the run's key: nothing depends on where a run was interrupted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rkd_jax import losses
from rkd_jax.data import augment
from rkd_jax.methods import Context, Distiller
from rkd_jax.models import Outputs

ORDER, STEP, INIT = 0, 1, 2  # the streams that the run's key is folded into


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; what a checkpoint holds."""

    step: jax.Array  # int32: steps done
    params: dict[str, Any]  # "student", and "method": what the method trains
    batch_stats: Any  # the student's
    opt_state: optax.OptState
    method_state: Any
    bad_step: jax.Array  # int32: the first step whose loss or update was not finite; -1: none


class Inputs(NamedTuple):
    """What every step reads and none changes; on the device."""

    rng: jax.Array  # the run's key
    images: jax.Array  # [N, H, W, C] uint8: the whole training set
    labels: jax.Array  # [N] int32
    teacher: Any  # the teacher's variables, or None


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Recipe(NamedTuple):
    """What a step is made of beside the networks and the method."""

    views: tuple[str, ...]  # of augment.view: ("weak",), ("strong",), ("weak", "strong")
    view_reduction: str  # "sum" or "mean" over the views, of each term
    augmentation: dict[str, Any]  # options of augment.view
    batch_size: int
    steps_per_epoch: int
    num_steps: int
    student_normalization: Normalization
    teacher_normalization: Normalization | None


def data_mesh(batch_size: int) -> Mesh:
    """All devices on one "data" axis; ValueError where the batch does not divide among them."""
    if batch_size % jax.device_count():
        raise ValueError(
            f"config.batch_size={batch_size} does not divide among {jax.device_count()} devices; "
            f"take a multiple of {jax.device_count()}"
        )
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of host arrays to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def epoch_order(rng: jax.Array, epoch: int, num_examples: int) -> jax.Array:
    """The order in which an epoch visits the training set, [num_examples] int32."""
    key = jax.random.fold_in(jax.random.fold_in(rng, ORDER), epoch)
    return jax.random.permutation(key, num_examples)


def create_state(
    rng: jax.Array,
    student: nn.Module,
    teacher: nn.Module | None,
    teacher_variables: Any,
    method: Distiller,
    tx: optax.GradientTransformation,
    image_shape: Sequence[int],
    num_examples: int,
) -> TrainState:
    """The state before the first step. image_shape is [H, W, C]."""
    student_rng, method_rng = jax.random.split(jax.random.fold_in(rng, INIT))
    images = jnp.zeros((2, *image_shape), jnp.float32)

    @jax.jit
    def init():
        variables = student.init(student_rng, images, train=False)
        student_shapes = jax.eval_shape(lambda v: student.apply(v, images, train=False), variables)
        teacher_shapes = None
        if method.needs_teacher:
            teacher_shapes = jax.eval_shape(lambda v: teacher.apply(v, images, train=False), teacher_variables)
        method_params, method_state = method.init(method_rng, student_shapes, teacher_shapes, num_examples)
        params = {"student": variables["params"], "method": method_params}
        return variables.get("batch_stats", {}), params, method_state, tx.init(params)

    batch_stats, params, method_state, opt_state = init()
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        method_state=method_state,
        bad_step=jnp.int32(-1),
    )


@jax.jit
def _add(totals: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: totals.get(name, 0.0) + value for name, value in metrics.items()}


def accumulate(totals: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds a step's metrics to the sums of the steps before it ({}: none), and 1 to "count"; on the device."""
    return _add(totals, metrics | {"count": np.float32(1)})


def _stack(outputs: Sequence[Outputs]) -> Outputs:
    """Outputs per view -> one Outputs whose arrays have a leading view axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def make_train_step(
    student: nn.Module,
    teacher: nn.Module | None,
    method: Distiller,
    tx: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
) -> Callable[[TrainState, Inputs, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns step(state, inputs, order) -> (state, metrics); order is that of the state's epoch (epoch_order).

    The state is donated. The metrics are scalars of this step: "loss", each of the method's terms and metrics, and
    "accuracy", the student's top-1 on its augmented views.
    """
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def objective(params, state, inputs, batch, views, rng):
        """The label term and the sum of the others, each reduced over the views, and everything else as auxiliary."""
        stacked = jnp.concatenate(views)
        teachers: list[Any] = [None] * len(views)
        if method.needs_teacher:
            normalized = augment.normalize(stacked, *recipe.teacher_normalization)
            outputs = jax.lax.stop_gradient(teacher.apply(inputs.teacher, normalized, train=False))
            teachers = [jax.tree.map(lambda x, i=i: jnp.split(x, len(views))[i], outputs) for i in range(len(views))]

        students, batch_stats = [], state.batch_stats
        for i, view in enumerate(views):
            outputs, updated = student.apply(
                {"params": params["student"], "batch_stats": batch_stats},
                augment.normalize(view, *recipe.student_normalization),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(rng, i)},
            )
            batch_stats = updated.get("batch_stats", {})
            students.append(outputs)

        def loss(method_state, student_outputs, teacher_outputs, i):
            context = Context(
                rng=jax.random.fold_in(rng, len(views) + i),
                step=state.step,
                epoch=state.step / recipe.steps_per_epoch,
                progress=state.step / recipe.num_steps,
            )
            return method.loss(params["method"], method_state, student_outputs, teacher_outputs, batch, context)

        method_state = state.method_state
        if method.joint_views:
            terms, method_state, metrics = loss(method_state, _stack(students), _stack(teachers), 0)
        else:
            parts = []
            for i in range(len(views)):
                terms, method_state, metrics = loss(method_state, students[i], teachers[i], i)
                parts.append((terms, metrics))
            scale = 1 / len(views)
            weight = scale if recipe.view_reduction == "mean" else 1.0
            terms = jax.tree.map(lambda *x: weight * sum(x), *(terms for terms, _ in parts))
            metrics = jax.tree.map(lambda *x: scale * sum(x), *(metrics for _, metrics in parts))

        label = terms.get("label", jnp.float32(0))
        distill = sum((value for name, value in terms.items() if name != "label"), start=jnp.float32(0))
        correct = jnp.stack([outputs.logits.argmax(-1) == batch["label"] for outputs in students])
        metrics = {"loss": label + distill, **terms, **metrics, "accuracy": correct.mean()}
        return (label, distill), (batch_stats, method_state, metrics)

    def gradients(params, *arguments):
        """The gradient of the loss, the optimizer's extra arguments, the auxiliary outputs."""
        (label, _), pullback, auxiliary = jax.vjp(lambda p: objective(p, *arguments), params, has_aux=True)
        one, zero = jnp.ones_like(label), jnp.zeros_like(label)
        if not method.per_term_gradients:
            return pullback((one, one))[0], {}, auxiliary
        term_grads = {"label": pullback((one, zero))[0], "distill": pullback((zero, one))[0]}
        return jax.tree.map(jnp.add, *term_grads.values()), {"term_grads": term_grads}, auxiliary

    def train_step(state: TrainState, inputs: Inputs, order: jax.Array):
        rng = jax.random.fold_in(jax.random.fold_in(inputs.rng, STEP), state.step)
        start = (state.step % recipe.steps_per_epoch) * recipe.batch_size
        index = jax.lax.dynamic_slice(order, (start,), (recipe.batch_size,))
        index = jax.lax.with_sharding_constraint(index, split)
        batch = {"label": inputs.labels[index], "index": index}
        images = inputs.images[index]
        views = [
            augment.view(name, jax.random.fold_in(rng, i), images, **recipe.augmentation)
            for i, name in enumerate(recipe.views)
        ]
        grads, extra, (batch_stats, method_state, metrics) = gradients(
            state.params, state, inputs, batch, views, jax.random.fold_in(rng, len(views))
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)
        finite = jax.tree.reduce(
            jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), (metrics["loss"], updates))
        )
        bad = (state.bad_step < 0) & ~finite
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            method_state=method_state,
            bad_step=jnp.where(bad, state.step, state.bad_step),
        )
        return state, metrics

    return jax.jit(train_step, donate_argnums=0, in_shardings=whole, out_shardings=whole)


def make_eval_step(network: nn.Module, normalization: Normalization) -> Callable[..., dict[str, jax.Array]]:
    """Returns step(variables, images, labels) -> sums over the batch; a label below 0 marks padding.

    The sums: "top1", "top5" (images whose label is among the 1, 5 highest logits), "loss" (cross-entropy), "count".
    """

    @jax.jit
    def eval_step(variables: Any, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        logits = network.apply(variables, augment.normalize(images, *normalization), train=False).logits
        real = labels >= 0
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == labels[:, None]) & real[:, None]
        cross_entropy = losses.cross_entropy(logits, jnp.maximum(labels, 0))
        return {
            "top1": hits[:, 0].sum(),
            "top5": hits.sum(),
            "loss": jnp.where(real, cross_entropy, 0).sum(),
            "count": real.sum(),
        }

    return eval_step


def evaluate(
    eval_step: Callable, variables: Any, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and the mean cross-entropy, over a whole set of uint8 images."""
    total: dict[str, Any] = {}
    for start in range(0, len(images), batch_size):
        chunk, chunk_labels = images[start : start + batch_size], labels[start : start + batch_size]
        padding = min(batch_size, len(images)) - len(chunk)
        chunk = np.pad(chunk, [(0, padding)] + [(0, 0)] * 3)
        sums = eval_step(variables, chunk, np.pad(chunk_labels, (0, padding), constant_values=-1))
        total = sums if not total else jax.tree.map(jnp.add, total, sums)
    total = jax.device_get(total)
    count = float(total["count"])
    return {
        "top1": 100 * float(total["top1"]) / count,
        "top5": 100 * float(total["top5"]) / count,
        "loss": float(total["loss"]) / count,
    }
