"""The training step and the evaluation step: pure functions, and the only place that jits training.

One step: gather the batch from the set on the device (or take the one that came from the host), augment it into one
image per view, apply the teacher to all views and the student to each, let the method make its loss, and update. All of
it is a function of the state, the step number in it, and the run's keys: nothing depends on where a run was
interrupted. Several students may share a program: one batch, one set of views and one pass through the teacher.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rkd_jax import _devices, _trees, losses, methods, models, optim
from rkd_jax.data import augment
from rkd_jax.methods import Context, Distiller

ORDER, STEP, INIT = 0, 1, 2  # the streams that the run's key is folded into
LOGGED = ("loss", "count", "step", "epoch", "kind", "learning_rate", "images_per_second")  # by the log itself
PACKED = 1 << 16  # elements at most of the float32 arrays that several steps of a call carry in one vector
FOR_ONCE = {"cpu": {"xla_backend_optimization_level": 2}}  # XLA's options, by platform, of what `run_once` compiles


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; what a checkpoint holds."""

    step: jax.Array  # int32: steps done
    params: dict[str, Any]  # "student", and "method": what the method trains
    batch_stats: Any  # the student's
    opt_state: optax.OptState
    method_state: Any
    bad_step: jax.Array  # int32: the first step whose loss was not finite, or after which the network was not; -1: none


class Inputs(NamedTuple):
    """What every step reads and none changes; on the device."""

    rng: jax.Array  # the key of the data: order and augmentation
    rngs: tuple[jax.Array, ...]  # the key of each student: what its network and its method draw
    images: jax.Array | None  # [N, H, W, C] uint8: the whole training set; None where batches come from the host
    labels: jax.Array | None  # [N] int32
    teacher: Any  # the teacher's variables, or None


class Batches(NamedTuple):
    """The batches of one call, from the host."""

    images: jax.Array  # [count, batch_size, H, W, C] uint8
    labels: jax.Array  # [count, batch_size] int32
    index: jax.Array  # [count, batch_size] int32: positions in the training set


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Learner(NamedTuple):
    """One student of a program, and how it learns."""

    network: nn.Module
    method: Distiller
    tx: optax.GradientTransformation
    view_reduction: str = "sum"  # or "mean" over the views, of each term
    # All views in one batch, half the kernels for a GPU to start, each still normalised by its own statistics; only for
    # the networks of `rkd_jax.models`.
    views_in_one_batch: bool = False


class Recipe(NamedTuple):
    """What a step is made of beside the networks and the methods: the same for all students of a program."""

    views: tuple[str, ...]  # of augment.view: ("weak",), ("strong",), ("weak", "strong")
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


def local_mesh() -> Mesh:
    """The devices of this process on one "data" axis."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays, the same in every process, to every device of the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, whole, lambda where: x[where])

    return jax.tree.map(put, tree)


def epoch_order(rng: jax.Array, epoch: int, num_examples: int) -> jax.Array:
    """The order in which an epoch visits the training set, [num_examples] int32."""
    key = jax.random.fold_in(jax.random.fold_in(rng, ORDER), epoch)
    return jax.random.permutation(key, num_examples)


def epoch_of(step: jax.Array, steps_per_epoch: int) -> jax.Array:
    """How many epochs are over before a step (int32, from 0), float32; its whole part is right at any step.

    step / steps_per_epoch alone is not: XLA multiplies by the reciprocal, and 97 * (1 / 97) is below 1.
    """
    whole, part = step // steps_per_epoch, step % steps_per_epoch
    return jnp.minimum(whole + part / steps_per_epoch, jnp.nextafter(jnp.float32(whole + 1), jnp.float32(0)))


def create_state(
    rng: jax.Array,
    student: nn.Module,
    teacher: nn.Module | None,
    teacher_variables: Any,
    method: Distiller,
    tx: optax.GradientTransformation,
    image_shape: Sequence[int],
    num_examples: int,
    student_variables: Any = None,
) -> TrainState:
    """The state before the first step. To be compiled: see `run_once`.

    image_shape is [H, W, C]; student_variables are those to begin with (None, or a leaf that is None: of the student's
    initialisation).
    """
    student_rng, method_rng = jax.random.split(jax.random.fold_in(rng, INIT))
    images = jnp.zeros((2, *image_shape), jnp.float32)
    variables = student.init(student_rng, images, train=False)
    if student_variables:
        variables = jax.tree.map(
            lambda given, made: made if given is None else given,
            student_variables,
            variables,
            is_leaf=lambda x: x is None,
        )
    if others := sorted(set(variables) - {"params", "batch_stats"}):
        raise ValueError(
            f"config.student has variables {' and '.join(map(repr, others))}, and none but 'params' and 'batch_stats' "
            "(in NNX: Param and BatchStat) are carried on and saved; keep what changes in those"
        )
    student_shapes = jax.eval_shape(lambda v: student.apply(v, images, train=False), variables)
    teacher_shapes = None
    if method.needs_teacher:
        teacher_shapes = jax.eval_shape(lambda v: teacher.apply(v, images, train=False), teacher_variables)
    initial = method.init(method_rng, student_shapes, teacher_shapes, num_examples)
    method_params, method_state = _initialised(method, initial)
    if "params" not in variables:
        raise ValueError("config.student has no parameters, and so nothing to train; name another network")
    params = {"student": variables["params"], "method": method_params}
    # What cannot be deployed is an error here, and not after the first epoch.
    deployed = jax.eval_shape(functools.partial(method.deploy, student, images), variables, method_params, method_state)
    _check_like(deployed, variables, f"{methods.called(method)}.deploy returned the student's variables")
    with optim.used():
        opt_state = tx.init(params)
    for field, tree in (("config.optimizer", opt_state), (f"config.method={methods.called(method)!r}", method_state)):
        if any(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{field} keeps a jax.random.key in its state, which a checkpoint cannot hold; keep its "
                "jax.random.key_data, or a jax.random.PRNGKey"
            )
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=opt_state,
        method_state=method_state,
        bad_step=jnp.int32(-1),
    )


def run_once(program: Callable[..., Any], *args: Any) -> Any:
    """Compiles a program and runs it, with less optimisation on a CPU: the same bits in a third to 0.9 of the time."""
    return jax.jit(lambda *x: program(*x), compiler_options=FOR_ONCE.get(jax.default_backend()))(*args)


@jax.jit
def accumulate(totals: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds the metrics of a call to the sums of the calls before it ({}: none); on the device."""
    return {name: totals.get(name, 0.0) + value for name, value in metrics.items()}


def _stack(outputs: Sequence[models.Outputs]) -> models.Outputs:
    """models.Outputs per view -> one models.Outputs whose arrays have a leading view axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def _unstack(tree: Any, num_views: int) -> list[Any]:
    """A tree whose arrays have a leading view axis -> one tree per view."""
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(num_views)]


def make_train_step(
    learners: Sequence[Learner], teacher: nn.Module | None, recipe: Recipe, mesh: Mesh
) -> Callable[..., tuple[tuple[TrainState, ...], tuple[dict[str, jax.Array], ...]]]:
    """Returns step(states, inputs, source, count=1) -> (states, metrics), `count` steps of every learner.

    There is one state and one dict of metrics a learner; all states are at the same step, and are donated. `source` is
    the order of their epoch (`epoch_order`), which the steps must not leave, or Batches from the host. The metrics are
    scalars, summed over the steps: "loss", each of the method's terms and metrics, "top1", the student's accuracy on
    its augmented views in percent, and "count", the number of steps.
    """
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    num_views = len(recipe.views)
    # In the teacher's batch, one device has a view after the other. Where devices share it, an image's views are
    # neighbours: each device keeps its images, and their maps.
    view_axis, apart = (0, (num_views, -1)) if mesh.size == 1 else (1, (-1, num_views))

    def train_step(states, inputs: Inputs, source):
        if isinstance(source, Batches):
            images, labels, index = source
        else:
            start = (states[0].step % recipe.steps_per_epoch) * recipe.batch_size
            index = jax.lax.dynamic_slice(source, (start,), (recipe.batch_size,))
            index = jax.lax.with_sharding_constraint(index, split)
            images, labels = inputs.images[index], inputs.labels[index]
        rng = _step_rng(inputs.rng, states[0].step)
        views = [
            augment.view(name, jax.random.fold_in(rng, i), images, **recipe.augmentation)
            for i, name in enumerate(recipe.views)
        ]
        views = jax.lax.optimization_barrier(views)  # else XLA may fuse the augmentation into each that reads it
        teachers: list[Any] = [None] * num_views
        resume_teacher = functools.partial(models.resume, teacher, inputs.teacher) if teacher else None
        if any(learner.method.needs_teacher for learner in learners):
            together = jnp.stack(views, view_axis).reshape(-1, *images.shape[1:])
            normalized = augment.normalize(together, *recipe.teacher_normalization)
            outputs = jax.lax.stop_gradient(teacher.apply(inputs.teacher, normalized, train=False))
            outputs = jax.tree.map(lambda x: x.reshape(*apart, *x.shape[1:]).swapaxes(0, view_axis), outputs)
            teachers = _unstack(outputs, num_views)
        views = [augment.normalize(view, *recipe.student_normalization) for view in views]
        batch = {"label": labels, "index": index}
        pairs = [
            _update(learner, recipe, state, _step_rng(key, state.step), batch, views, teachers, resume_teacher)
            for learner, state, key in zip(learners, states, inputs.rngs, strict=True)
        ]
        return tuple(state for state, _ in pairs), tuple(metrics for _, metrics in pairs)

    def train_steps(states: tuple[TrainState, ...], inputs: Inputs, source, count: int = 1):
        streamed = isinstance(source, Batches)
        if count == 1:  # not a scan of one: XLA's convolutions on CPU are slow in loops
            states, metrics = train_step(states, inputs, jax.tree.map(lambda x: x[0], source) if streamed else source)
            return tuple(map(_checked, states)), metrics

        pack, unpack = _packing(states)

        def body(packed, batch):
            states, metrics = train_step(unpack(packed), inputs, batch if streamed else source)
            return pack(states), metrics

        packed, metrics = jax.lax.scan(body, pack(states), source if streamed else None, count)
        return tuple(map(_checked, unpack(packed))), jax.tree.map(lambda x: x.sum(0), metrics)

    return jax.jit(
        train_steps, static_argnums=3, donate_argnums=0, in_shardings=(whole, whole, None), out_shardings=whole
    )


def _packing(states: tuple[TrainState, ...]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """pack and unpack, for states like these: with the small arrays of each field in one vector, and as they were.

    A GPU then updates the arrays of a field by one kernel, and not each by its own.
    """

    def one(tree: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        leaves, treedef = jax.tree.flatten(tree)
        small = [x.dtype == jnp.float32 and x.size <= PACKED for x in leaves]
        _, unravel = ravel_pytree(list(itertools.compress(leaves, small)))

        def pack(tree: Any) -> Any:
            leaves = jax.tree.leaves(tree)
            vector, _ = ravel_pytree(list(itertools.compress(leaves, small)))
            return vector, [x for x, packed in zip(leaves, small, strict=True) if not packed]

        def unpack(packed: Any) -> Any:
            inside, outside = iter(unravel(packed[0])), iter(packed[1])
            return treedef.unflatten([next(inside if packed else outside) for packed in small])

        return pack, unpack

    names = ("params", "batch_stats", "opt_state")
    ways = [{name: one(getattr(state, name)) for name in names} for state in states]

    def convert(which: int, states: tuple[TrainState, ...]) -> tuple[TrainState, ...]:
        return tuple(
            state._replace(**{name: way[name][which](getattr(state, name)) for name in names})
            for way, state in zip(ways, states, strict=True)
        )

    return functools.partial(convert, 0), functools.partial(convert, 1)


def _checked(state: TrainState) -> TrainState:
    """With bad_step set where the parameters are not finite: they stay so, hence it is enough to look once a call."""
    finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), state.params))
    return state._replace(bad_step=jnp.where((state.bad_step < 0) & ~finite, state.step - 1, state.bad_step))


def _step_rng(rng: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(rng, STEP), step)


def _returned(method: Distiller, found: Any) -> tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]:
    """What a method's loss returned; ValueError where it is not (terms, state, metrics) as methods/base.py has them."""
    returned = f"{methods.called(method)}.loss returned"
    if not isinstance(found, tuple | list) or len(found) != 3:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise ValueError(f"{returned} {what}; return three: the terms, the next state, and the metrics, {{}} for none")
    for what, values in (("term", found[0]), ("metric", found[2])):
        if not isinstance(values, Mapping):
            raise ValueError(f"{returned} a {type(values).__name__} for its {what}s; return a dict of named scalars")
        taken = (*LOGGED, "top1") if what == "term" else (*LOGGED, *found[0])  # a metric may be another top1
        for name, value in values.items():
            if name in taken:
                raise ValueError(f"{returned} the {what} {name!r}, a name that the log has already; choose another")
            if not isinstance(value, jax.Array | np.ndarray | np.number | float | int):
                raise ValueError(f"{returned} the {what} {name!r} as a {type(value).__name__}; return a scalar")
            if shape := jnp.shape(value):
                raise ValueError(f"{returned} the {what} {name!r} of shape {shape}; return a scalar, e.g. its .mean()")
    if "label" not in found[0]:
        terms = ", ".join(map(repr, found[0])) or "none"
        raise ValueError(f"{returned} no term 'label', but {terms}; name the cross-entropy with the labels so")
    return found


def _initialised(method: Distiller, found: Any) -> tuple[Any, Any]:
    """What a method's init returned; ValueError where it is not (parameters, state) as methods/base.py has them."""
    returned = f"{methods.called(method)}.init returned"
    if not isinstance(found, tuple | list) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise ValueError(f"{returned} {what}; return two: what it trains, and the state that it carries, {{}} for none")
    for path, leaf in jax.tree_util.tree_leaves_with_path(found[0]):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = _trees.name(path)
            raise ValueError(
                f"{returned} the parameter {name} of dtype {jnp.result_type(leaf)}, which cannot be trained; make it a "
                "float, or return it in the state"
            )
    return found[0], found[1]


def _check_like(found: Any, expected: Any, what: str) -> None:
    """ValueError where a tree that a method returned has not the names, shapes and dtypes of another."""
    if different := _trees.difference(found, expected, lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"):
        name, have, want = different
        raise ValueError(
            f"{what} with {name or 'the whole'} as {have} in place of {want}; return the same names, shapes and dtypes"
        )


def _resuming(method: Distiller, resume_teacher: Callable[..., models.Outputs]) -> Callable[..., models.Outputs]:
    """`resume_teacher` for a method that says that it uses it: else the teacher may be folded, and resume to others."""

    def refuse(*_, **__):
        raise ValueError(
            f"{methods.called(method)}.loss resumes the teacher, which its class does not say; set "
            "resumes_teacher = True there, so that the teacher keeps its batch normalisation"
        )

    return resume_teacher if method.resumes_teacher else refuse


def _student_outputs(
    learner: Learner, params: Any, batch_stats: Any, views: Sequence[jax.Array], rng: jax.Array
) -> tuple[list[models.Outputs], Any]:
    """The student's outputs on each view, and its batch statistics after the last."""

    def forward(batch_stats, view, rng):
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = learner.network.apply(
            variables, view, train=True, mutable=["batch_stats"], rngs={"dropout": rng}
        )
        updated = updated.get("batch_stats", {})
        _check_like(updated, batch_stats, "config.student returned batch statistics")
        return outputs, updated

    outputs, rngs = [], [jax.random.fold_in(rng, i) for i in range(len(views))]
    if learner.views_in_one_batch and len(views) > 1:
        stacked, after = jax.vmap(functools.partial(forward, batch_stats))(jnp.stack(views), jnp.stack(rngs))
        return _unstack(stacked, len(views)), models.in_turn(batch_stats, after)
    for view, key in zip(views, rngs, strict=True):
        out, batch_stats = forward(batch_stats, view, key)
        outputs.append(out)
    return outputs, batch_stats


def _over_views(
    learner: Learner,
    terms_of: Callable[..., tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]],
    method_state: Any,
    students: Sequence[models.Outputs],
    teachers: Sequence[models.Outputs | None],
) -> tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]:
    """The method's terms reduced over the views, its state after the last, and the means of its metrics.

    terms_of(method_state, student, teacher, i) has them for view i; of a method of joint views, i is 0 for all.
    """
    num_views = len(students)
    if learner.method.joint_views:
        return terms_of(method_state, _stack(students), _stack(teachers), 0)
    parts = []
    if learner.views_in_one_batch and num_views > 1 and not jax.tree.leaves(method_state):
        of_view = functools.partial(terms_of, method_state)
        terms, _, metrics = jax.vmap(of_view)(_stack(students), _stack(teachers), jnp.arange(num_views))
        parts = _unstack((terms, metrics), num_views)
    else:
        for i, (student, target) in enumerate(zip(students, teachers, strict=True)):
            terms, method_state, metrics = terms_of(method_state, student, target, i)
            parts.append((terms, metrics))
    scale = 1 / num_views
    weight = scale if learner.view_reduction == "mean" else 1.0
    terms = jax.tree.map(lambda *x: weight * sum(x), *(terms for terms, _ in parts))
    metrics = jax.tree.map(lambda *x: scale * sum(x), *(metrics for _, metrics in parts))
    return terms, method_state, metrics


def _update(
    learner: Learner,
    recipe: Recipe,
    state: TrainState,
    rng: jax.Array,
    batch: dict[str, jax.Array],
    views: Sequence[jax.Array],
    teachers: Sequence[models.Outputs | None],
    resume_teacher: Callable[..., models.Outputs] | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of one student, from its normalised views and the teacher's outputs on them."""
    method, num_views = learner.method, len(views)
    rng = jax.random.fold_in(rng, num_views)
    context = Context(
        rng=rng,
        step=state.step,
        epoch=epoch_of(state.step, recipe.steps_per_epoch),
        progress=state.step / recipe.num_steps,
    )
    blank = jnp.zeros_like(views[0])  # for resumed networks, which use its shape alone

    def terms_of(params, method_state, student, target, i):
        variables = {"params": params["student"], "batch_stats": state.batch_stats}
        resume_student = functools.partial(models.resume, learner.network, variables)
        # Dropout of this view: what is on in the student is on here.
        options = {"images": blank, "train": True, "rngs": {"dropout": jax.random.fold_in(rng, i)}}
        where = context._replace(
            rng=jax.random.fold_in(rng, num_views + i),
            resume_student=functools.partial(resume_student, **options),
            resume_teacher=resume_teacher and functools.partial(_resuming(method, resume_teacher), **options),
        )
        found = _returned(method, method.loss(params["method"], method_state, student, target, batch, where))
        _check_like(found[1], method_state, f"{methods.called(method)}.loss returned the state")
        return found

    def objective(params):
        """The label term and the sum of the others, each reduced over the views, and everything else as auxiliary."""
        students, batch_stats = _student_outputs(learner, params["student"], state.batch_stats, views, rng)
        of_view = functools.partial(terms_of, params)
        terms, method_state, metrics = _over_views(learner, of_view, state.method_state, students, teachers)
        label = terms["label"]
        distill = sum((value for name, value in terms.items() if name != "label"), start=jnp.float32(0))
        correct = jnp.stack([outputs.logits.argmax(-1) == batch["label"] for outputs in students])
        metrics = {"loss": label + distill, **terms, "top1": 100 * correct.mean(), **metrics, "count": 1.0}
        return (label, distill), (batch_stats, method_state, metrics)

    (label, _), pullback, (batch_stats, method_state, metrics) = jax.vjp(objective, state.params, has_aux=True)
    one, zero, extra = jnp.ones_like(label), jnp.zeros_like(label), {}
    if method.per_term_gradients:
        extra["term_grads"] = {"label": pullback((one, zero))[0], "distill": pullback((zero, one))[0]}
        grads = jax.tree.map(jnp.add, *extra["term_grads"].values())
    else:
        grads = pullback((one, one))[0]
    with optim.used():
        updates, opt_state = learner.tx.update(grads, state.opt_state, state.params, **extra)
        if different := _trees.difference(updates, state.params, np.shape):
            name, found, expected = different
            raise ValueError(f"its update of {name} has the shape {found}, where the parameter has {expected}")
    metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)
    bad = (state.bad_step < 0) & ~jnp.isfinite(metrics["loss"])
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        method_state=method_state,
        bad_step=jnp.where(bad, state.step, state.bad_step),
    )
    return state, metrics


def make_eval_step(network: nn.Module, normalization: Normalization, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """Returns step(variables, images, labels) -> sums over the batch; a label below 0 marks padding.

    The sums: "top1", "top5" (images whose label is among the 1, 5 highest logits), "loss" (cross-entropy), "count"; and
    by class, [C], "top1_of_class" and "count_of_class". The devices of the mesh share the batch, padded to a multiple
    of their number.
    """

    @jax.jit
    def eval_step(variables: Any, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        padding = -len(images) % mesh.size
        images = jnp.pad(images, [(0, padding)] + [(0, 0)] * 3)
        labels = jnp.pad(labels, (0, padding), constant_values=-1)
        images = jax.lax.with_sharding_constraint(images, NamedSharding(mesh, PartitionSpec("data")))
        with jax.default_matmul_precision("highest"):  # float32's products: the same accuracy on every device
            logits = network.apply(variables, augment.normalize(images, *normalization), train=False).logits
        real = labels >= 0
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == labels[:, None]) & real[:, None]
        classes = jnp.maximum(labels, 0)
        cross_entropy = losses.cross_entropy(logits, classes)

        def by_class(which: jax.Array) -> jax.Array:
            return jnp.zeros(logits.shape[-1], jnp.int32).at[classes].add(which)

        return {
            "top1": hits[:, 0].sum(),
            "top5": hits.sum(),
            "loss": jnp.where(real, cross_entropy, 0).sum(),
            "count": real.sum(),
            "top1_of_class": by_class(hits[:, 0]),
            "count_of_class": by_class(real),
        }

    return eval_step


def evaluate(
    eval_step: Callable, variables: Any, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, and the mean cross-entropy, over a whole set of uint8 images."""
    return means(total(eval_step, variables, images, labels, batch_size))


def means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What `evaluate` returns, of what `total` does."""
    scales = {"top1": 100, "top5": 100, "loss": 1}
    return {name: scale * float(sums[name]) / float(sums["count"]) for name, scale in scales.items()}


@_devices.memory("lower config.eval_batch_size")
def total(
    eval_step: Callable, variables: Any, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """What `eval_step` sums, over a whole set of uint8 images."""
    found: dict[str, Any] = {}
    for start in range(0, len(images), batch_size):
        chunk, chunk_labels = images[start : start + batch_size], labels[start : start + batch_size]
        padding = min(batch_size, len(images)) - len(chunk)
        chunk = np.pad(chunk, [(0, padding)] + [(0, 0)] * 3)
        sums = eval_step(variables, chunk, np.pad(chunk_labels, (0, padding), constant_values=-1))
        found = sums if not found else jax.tree.map(jnp.add, found, sums)
    return jax.device_get(found)
