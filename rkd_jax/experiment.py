"""From a config to everything that a run is made of: where bad input is found, before anything is spent on it."""

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from rkd_jax import _trees, checkpoint, data, feed, methods, models, optim, steps
from rkd_jax.data import augment

VIEWS = ("weak", "strong")
MOST_SEED = 2**32 - 1  # jax.random.key would drop the bits above
MOST_STEPS = 2**31 - 1  # of the state's int32
SMOKE = {"batch_size": 8, "num_train": 32, "num_test": 16, "num_steps": 4, "log_every": 2, "eval_batch_size": 16}
# The fields, beside those of methods, that may be None; and what they are where they are not.
UNSET = {
    "image_size": int, "num_train": int, "num_test": int, "num_steps": int, "data_seed": int, "fold_teacher": bool,
    "stream": bool, "steps_per_call": int, "log_every": int,
}  # fmt: skip
LOG_EVERY = 50  # steps, on a CPU
VIEW_OPTIONS = ("crop_padding", "flip", "rotation")  # what the views of this package take
# Values that do nothing, of the fields that an optimizer, a schedule or the views may not take.
OFF = {
    "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "decay_epochs": (), "decay_factor": 1.0, "crop_padding": 0,
    "flip": False, "rotation": 0.0,
}  # fmt: skip
TEACHER_OFF = {"teacher": "", "teacher_checkpoint": "", "fold_teacher": False}  # likewise, of methods without a teacher
# What a run's config.json has beside the fields, so that it is not gone on with from something else.
FINGERPRINTS = {
    "teacher_fingerprint": "another network as its teacher",
    "teacher_normalization": "other normalisation of its teacher's images",
    "student_fingerprint": "another network to begin with",
    "data_fingerprint": "other images",
}


class Loop(NamedTuple):
    """When the training loop does what; all in steps but the last two."""

    steps_per_call: int
    log_every: int
    eval_every: int
    eval_batch_size: int  # images
    checkpoint_seconds: float


class Experiment(NamedTuple):
    """A run, ready to start."""

    config: dict[str, Any]  # every field with the value used, plain JSON; of the methods' fields, the chosen one's
    splits: data.Splits
    student: nn.Module
    student_variables: Any  # which it begins with; None, or a leaf that is None: those of its initialisation
    teacher: nn.Module | None
    teacher_variables: Any
    method: methods.Distiller
    recipe: steps.Recipe
    loop: Loop
    schedule: optax.Schedule
    tx: optax.GradientTransformation

    @property
    def learner(self) -> steps.Learner:
        """What `steps.make_train_step` makes a student's part of the step from."""
        return create_learner(self.student, self.method, self.tx, self.config["view_reduction"])

    @property
    def data_seed(self) -> int:
        """The seed of the order and the augmentation of the images."""
        return self.config["seed" if self.config["data_seed"] is None else "data_seed"]

    def create_state(self, rng: jax.Array, student_variables: Any = None) -> steps.TrainState:
        """The state before the first step; `steps.run_once` makes it, of `student_variables` where there are any."""
        images, labels = self.splits.train
        return steps.create_state(
            rng, self.student, self.teacher, self.teacher_variables, self.method, self.tx,
            image_shape=images.shape[1:], num_examples=len(labels), student_variables=student_variables,
        )  # fmt: skip


class Fields:
    """A config that remembers what was read of it: a field that nobody reads is an error, and one that it lacks too.

    So is one that is None, but for those that may be unset.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._config = dict(config)
        self._read: set[str] = set()
        self._methods: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name in self._methods:
            raise ValueError(
                f"config.method={self._config['method']!r} has a field {name!r}, and so has every config; name the "
                "method's otherwise"
            )
        if name not in self._config:
            raise ValueError(f"the config lacks the field {name!r}; start from configs/default.py, which has it")
        if self._config[name] is None and name not in UNSET:
            raise ValueError(f"config.{name} is None; give it a value, as configs/default.py does")
        value, kind = self._config[name], UNSET.get(name)
        if kind is bool and not (value is None or isinstance(value, bool)):
            raise ValueError(f"config.{name}={value!r} is neither True nor False; write one of them, or None")
        if kind is int and (isinstance(value, bool) or not isinstance(value, int | np.integer | None)):
            raise ValueError(f"config.{name}={value!r} is no whole number; write one, or None")
        self._read.add(name)
        return value

    def fill(self, values: Mapping[str, Any]) -> None:
        """Gives values to fields that are None."""
        self._config |= {name: value for name, value in values.items() if self._config.get(name, value) is None}

    def pass_over(self, names: Iterable[str], of_method: bool = False) -> None:
        """Counts fields as read, which someone else has done; of a method, they must be of no one else."""
        self._read.update(names)
        self._methods.update(names if of_method else ())

    def one_of(self, name: str, choices: Mapping[str, Any] | tuple[str, ...]) -> str:
        """The value of a field that names one of a few choices."""
        if (value := getattr(self, name)) not in choices:
            raise ValueError(f"config.{name}={value!r} is none of {', '.join(map(repr, choices))}")
        return value

    def at_least(self, name: str, least: float, most: float = math.inf) -> Any:
        """The value of a number that must not be below `least`, nor above `most`."""
        if not (value := getattr(self, name)) >= least:  # NaN neither
            what = "is too low" if value < least else "is no number"
            raise ValueError(f"config.{name}={value} {what}; take {least} or more")
        if value > most or value == math.inf:
            mend = "less" if most == math.inf else f"{most} or less"
            raise ValueError(f"config.{name}={value} is too high; take {mend}")
        return value

    def check_all_read(self) -> None:
        """ValueError where a field was not read."""
        for name in sorted(set(self._config) - self._read):
            near = difflib.get_close_matches(name, self._read, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]!r}?" if near else "take it away"
            raise ValueError(
                f"config.{name} is no field of configs/default.py, nor a hyper-parameter of config.method="
                f"{self._config.get('method')!r}; {hint}"
            )


def build(config: ConfigDict) -> Experiment:
    """Loads and creates what the config names; ValueError or FileNotFoundError, naming the field, where it cannot."""
    values = shrink(config)
    fields = Fields(values)

    method = create_method(config)
    fields.pass_over(_method_fields(values), of_method=True)
    fields.pass_over(["method"])
    views = _views(fields)
    dtype = jnp.dtype(fields.one_of("dtype", ("float32", "bfloat16")))
    if method.joint_views and len(views) == 1:
        raise ValueError(
            f"config.method={fields.method!r} compares the views of an image, and config.views={fields.views!r} gives "
            "one; set config.views to 'both', or to two with + between"
        )
    reduction = fields.one_of("view_reduction", ("sum", "mean"))
    if method.joint_views and reduction != "sum":
        raise ValueError(
            f"config.view_reduction={reduction!r} changes nothing of config.method={fields.method!r}, which reduces "
            "its terms over the views itself; leave it at 'sum'"
        )
    batch_size = fields.at_least("batch_size", 1)

    splits = load_splits(fields)
    steps_per_epoch, num_steps = _lengths(fields, splits.train, batch_size)
    batch = jax.ShapeDtypeStruct((batch_size, *splits.train.images.shape[1:]), jnp.uint8)
    for name in {*views} - {*VIEWS}:  # those of the user's own are tried
        jax.eval_shape(functools.partial(augment.view, name), jax.random.key(0), batch)

    student = models.create(fields.student, splits.num_classes, dtype, splits.train.images.shape[1], "config.student")
    student_variables, student_fingerprint = None, ""
    if fields.student_checkpoint:
        student_variables, student_fingerprint = _beginning(fields, student, splits)
    teacher, teacher_variables, metadata = _teacher(fields, splits, method, dtype)
    unused = _unused(fields)
    fields.fill(unused)  # which are None in a run's config.json
    schedule, tx = _optimization(fields, num_steps, steps_per_epoch)
    recipe = steps.Recipe(
        views=views,
        augmentation={
            "padding": fields.at_least("crop_padding", 0, splits.train.images.shape[1]),
            "flip": fields.flip,
            "rotation": fields.at_least("rotation", 0),
        },
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        student_normalization=steps.Normalization(splits.mean, splits.std),
        teacher_normalization=steps.Normalization(tuple(metadata["mean"]), tuple(metadata["std"])) if teacher else None,
    )
    loop = _loop(fields, splits.train, steps_per_epoch, num_steps)
    fields.at_least("seed", 0, MOST_SEED)
    if fields.data_seed is not None:
        fields.at_least("data_seed", 0, MOST_SEED)
    _ = fields.smoke, fields.compare, fields.sweep
    prints = {
        "teacher_fingerprint": metadata.get("fingerprint", ""),
        "teacher_normalization": f"mean {metadata['mean']}, std {metadata['std']}" if teacher else "",
        "data_fingerprint": data_fingerprint(splits),
    }
    if student_fingerprint:
        prints["student_fingerprint"] = student_fingerprint
    fields.pass_over(FINGERPRINTS)
    fields.check_all_read()
    if not fields.smoke:
        _check_fingerprints(values, prints)

    settled = {*_method_fields(values), *FINGERPRINTS}
    resolved = {name: value for name, value in values.items() if name not in settled}
    resolved |= dict.fromkeys(unused) | methods.hyperparameters(method) | prints
    resolved = json.loads(json.dumps(resolved))
    networks = student, student_variables, teacher, teacher_variables
    wrapped = method.wrap_optimizer(tx)
    if not isinstance(wrapped, optax.GradientTransformation):
        raise ValueError(
            f"config.method={fields.method!r}: its wrap_optimizer returned a {type(wrapped).__name__}; return an "
            "optax.GradientTransformation"
        )
    return Experiment(resolved, splits, *networks, method, recipe, loop, schedule, wrapped)


def _lengths(fields: Fields, split: data.Split, batch_size: int) -> tuple[int, int]:
    """The steps of an epoch, and of the run; ValueError where its images or their number do not suit."""
    if not (num_train := len(split.labels)):
        raise ValueError(f"config.dataset={fields.dataset!r} has images to test on alone; add train/")
    height, width = split.images.shape[1:3]
    if height != width:
        raise ValueError(
            f"config.dataset={fields.dataset!r} has images of {height} x {width} pixels, and networks are trained on "
            f"square ones; set config.image_size={min(height, width)}, say, to which they are resized"
        )
    if batch_size > num_train:
        raise ValueError(
            f"config.batch_size={batch_size} exceeds the {num_train} training examples of {fields.dataset}; lower it"
            + (" or raise config.num_train" if fields.num_train else "")
        )
    steps_per_epoch = num_train // batch_size
    num_steps = fields.at_least("num_epochs", 1, MOST_STEPS // steps_per_epoch) * steps_per_epoch
    if fields.num_steps is not None:
        num_steps = fields.at_least("num_steps", 1, MOST_STEPS)
    return steps_per_epoch, num_steps


def _loop(fields: Fields, split: data.Split, steps_per_epoch: int, num_steps: int) -> Loop:
    if not 0 < fields.eval_epochs < math.inf:
        raise ValueError(
            f"config.eval_epochs={fields.eval_epochs} is no number of epochs; take, say, 1.0, or as many as "
            "config.num_epochs to test at the end alone"
        )
    streams = feed.streams(fields.stream, split)
    on_cpu, eval_every = jax.default_backend() == "cpu", max(1, round(fields.eval_epochs * steps_per_epoch))
    if fields.log_every is not None:
        log_every = fields.at_least("log_every", 1)
    else:  # the largest whole part of an epoch; not more steps, for a signal waits for the end of a call
        parts = (n for n in range(20, 1001) if steps_per_epoch % n == 0 and not on_cpu)
        log_every = max(parts, default=LOG_EVERY)
    most = min(log_every, eval_every, steps_per_epoch, num_steps)  # a call ends with each of them
    # Where all calls can be of that length there is one program to compile, but what is streamed is held meanwhile.
    even = all(each % log_every == 0 for each in (eval_every, steps_per_epoch, num_steps))
    steps_per_call = log_every if even and not streams else 10
    if on_cpu:
        steps_per_call = 1  # XLA's convolutions on CPU are 20 times slower inside a loop
    if fields.steps_per_call is not None:
        steps_per_call = fields.at_least("steps_per_call", 1)
        if steps_per_call > most and not fields.smoke:
            raise ValueError(
                f"config.steps_per_call={steps_per_call} is more than the {most} steps between two logs "
                "(config.log_every), two tests (config.eval_epochs), or of an epoch or a run; lower it, or raise those"
            )
    return Loop(
        steps_per_call=min(most, steps_per_call),
        log_every=log_every,
        eval_every=eval_every,
        eval_batch_size=fields.at_least("eval_batch_size", 1),
        checkpoint_seconds=fields.at_least("checkpoint_seconds", 0),
    )


def data_fingerprint(splits: data.Splits) -> str:
    """Of all labels and up to 64 images of each split, as decoded, in hexadecimal."""
    digest = hashlib.sha256()
    for images, labels in (splits.train, splits.test):
        digest.update(f"{images.shape}".encode() + np.ascontiguousarray(labels).tobytes())
        digest.update(np.ascontiguousarray(images[:: len(images) // 64 + 1]).tobytes())
    return digest.hexdigest()[:16]


def _check_fingerprints(values: Mapping[str, Any], prints: Mapping[str, str]) -> None:
    """ValueError where a config that is a run's record names other networks or images than there are."""
    for name, found in prints.items():
        if found and values.get(name, "") not in ("", found):
            raise ValueError(
                f"config.{name}={values[name]!r} is of a run with {FINGERPRINTS[name]} than now, {found!r}; bring back "
                "those, or leave the field out"
            )


def rehearse(config: ConfigDict) -> None:
    """Says what is wrong about a run that others come before: builds it on random images, its teacher untrained."""
    copy = config.copy_and_resolve_references()
    copy.update(smoke=True, teacher_checkpoint="", compare=False, sweep="")
    jax.eval_shape(build(copy).create_state, jax.random.key(0))


def _views(fields: Fields) -> tuple[str, ...]:
    """The names of `augment.view` that config.views has."""
    views = tuple(("+".join(VIEWS) if fields.views == "both" else fields.views).split("+"))
    if not all(":" in name or name in VIEWS for name in views):
        raise ValueError(
            f"config.views={fields.views!r} is none of 'weak', 'strong' and 'both', nor my_module:view for your own, "
            "nor several of them with + between"
        )
    return views


def _optimization(
    fields: Fields, num_steps: int, steps_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    numbers = (isinstance(epoch, int | float) and not isinstance(epoch, bool) for epoch in fields.decay_epochs)
    if not all(numbers) or not all(0 < epoch < math.inf for epoch in fields.decay_epochs):
        raise ValueError(f"config.decay_epochs={fields.decay_epochs!r} are no epochs; take, say, (150, 180, 210)")
    falls = {"decay_epochs": fields.decay_epochs, "decay_factor": fields.at_least("decay_factor", 0, 1)}
    schedule = optim.create_schedule(
        fields.schedule, fields.at_least("learning_rate", 0), num_steps=num_steps, steps_per_epoch=steps_per_epoch,
        warmup_epochs=fields.at_least("lr_warmup_epochs", 0, fields.num_epochs), **falls,
    )  # fmt: skip
    options = {
        "momentum": fields.at_least("momentum", 0, 0.9999),
        "nesterov": fields.nesterov,
        "weight_decay": fields.at_least("weight_decay", 0),
    }
    return schedule, optim.create_optimizer(fields.optimizer, schedule, **options)


def _unused(fields: Fields) -> dict[str, Any]:
    """The fields that the optimizer, the schedule and the views do not take, with the values that do nothing."""
    used = {*optim.taken(fields.optimizer)}
    used.update(optim.schedule_takes(fields.schedule))
    if set(VIEWS) & set(_views(fields)):
        used.update(VIEW_OPTIONS)
    return {field: value for field, value in OFF.items() if field not in used}


def check_used(configs: Sequence[ConfigDict], given: Iterable[str]) -> None:
    """ValueError where a field that was given by hand, and not switched off, does nothing in any of the configs."""
    idle = [_idle(config) for config in configs]
    off = OFF | TEACHER_OFF | {"view_reduction": "sum"}
    for field in sorted(off.keys() & {*given} - {"weight_decay"}):  # which is an error, given or not
        on = (config[field] not in (None, off[field]) for config in configs)
        if all(on) and all(field in fields for fields in idle):
            owner = idle[0][field]
            raise ValueError(
                f"config.{field}={configs[0][field]!r} does nothing with config.{owner}={configs[0][owner]!r}; leave "
                "it out"
            )


def _idle(config: ConfigDict) -> dict[str, str]:
    """The fields that do nothing in a config, each with the field that makes it so."""
    fields = Fields(config.to_dict())
    owners = dict.fromkeys(optim.DECAY, "schedule") | dict.fromkeys(VIEW_OPTIONS, "views")
    idle = {field: owners.get(field, "optimizer") for field in _unused(fields)}
    if fields.optimizer == "sgd" and not fields.momentum:
        idle["nesterov"] = "momentum"
    if len(_views(fields)) == 1:
        idle["view_reduction"] = "views"
    return idle if methods.load(fields.method).needs_teacher else idle | dict.fromkeys(TEACHER_OFF, "method")


def create_learner(
    student: nn.Module, method: methods.Distiller, tx: optax.GradientTransformation, view_reduction: str = "sum"
) -> steps.Learner:
    """A student's part of a step; its views go through it in one batch where that is as right, and faster.

    A CPU gains nothing by it; several devices would exchange activations; and a network of the user's own may average
    the statistics of its batches in a way of its own.
    """
    own = isinstance(student, models.Adapter)
    one_batch = jax.default_backend() != "cpu" and jax.device_count() == 1 and not own
    return steps.Learner(student, method, tx, view_reduction, one_batch)


def shrink(config: ConfigDict) -> dict[str, Any]:
    """The config's fields, with config.smoke made so small, where they are not smaller, that a run takes seconds."""
    values = config.to_dict()
    if values.get("smoke"):
        fields = Fields(values)
        devices = jax.device_count()
        batch = -(-SMOKE["batch_size"] // devices) * devices  # which they can share
        for name, most in (SMOKE | {"batch_size": batch, "num_train": max(SMOKE["num_train"], batch)}).items():
            values[name] = most if getattr(fields, name) is None else min(most, values[name])
    return values


def alone(config: ConfigDict, network: str) -> ConfigDict:
    """The same run with no teacher: cross-entropy for one network, on the same views and epochs."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        for name in _method_fields(config) - set(methods.fields()):
            del copy[name]
        for name in methods.fields():
            copy[name] = None
        copy.update(method="cross_entropy", student=network, teacher="", teacher_checkpoint="", compare=False, sweep="")
    return copy


def forget_teacher(config: ConfigDict) -> None:
    """Leaves out of a run's record which teacher it had, for one that is trained here."""
    for name in ("teacher_fingerprint", "teacher_normalization"):
        if name in config:
            config[name] = ""


def drop_foreign(configs: Sequence[ConfigDict], keep: Sequence[Set[str]]) -> None:
    """Deletes from each config the fields of custom methods that its own method lacks, except those in its `keep`."""
    known = [_method_fields(config) for config in configs]
    own = set().union(*known) - set(methods.fields())
    for config, mine, kept in zip(configs, known, keep, strict=True):
        with config.unlocked():
            for name in own - mine - kept:
                del config[name]


def _method_fields(values: Mapping[str, Any]) -> set[str]:
    return set(values) & set(methods.fields(*methods.own(values)))


def kinds(config: ConfigDict) -> dict[str, type]:
    """The type of each field of a config, of those that are None too; a run's config.json says no more of these."""
    found = {name: config.get_type(name) for name in config}
    known = {name: type(value) for name, value in OFF.items()} | UNSET
    known |= methods.fields(*methods.own(config))
    return found | {name: known[name] for name, kind in found.items() if kind is type(None) and name in known}


def create_method(config: ConfigDict) -> methods.Distiller:
    """The config's method, with its hyper-parameters as set, or as its authors use them for this data set and pair."""
    fields = Fields(config.to_dict())
    names = fields.method, fields.dataset, fields.teacher, fields.student
    return methods.resolve(names[0], {name: config[name] for name in _method_fields(config)}, *names[1:])


def load_splits(fields: Fields) -> data.Splits:
    """The data set that the fields name; random images of its form under config.smoke."""
    name, data_dir = fields.dataset, fields.data_dir
    num_train, num_test, image_size = (
        None if getattr(fields, count) is None else fields.at_least(count, 1)
        for count in ("num_train", "num_test", "image_size")
    )
    if fields.smoke:
        return data.random(name, num_train, num_test, image_size, data_dir)
    return data.load(name, data_dir, num_train, num_test, image_size)


def _teacher(
    fields: Fields, splits: data.Splits, method: methods.Distiller, dtype: Any
) -> tuple[nn.Module | None, Any, dict[str, Any]]:
    """The teacher, its variables, its metadata; (None, None, {}) for a method that needs none."""
    name, path, fold = fields.teacher, fields.teacher_checkpoint, fields.fold_teacher
    if not method.needs_teacher:
        return None, None, {}
    if not name:
        raise ValueError(
            f"config.teacher='' is no network, and config.method={fields.method!r} needs a teacher; name its "
            "network, or train without one by config.method='cross_entropy'"
        )
    teacher = models.create(name, splits.num_classes, dtype, splits.train.images.shape[1], "config.teacher")
    if fields.smoke and not path:  # an untrained one will do
        variables = untrained(teacher, splits.train.images.shape[1:])
        metadata = {"mean": splits.mean, "std": splits.std}
    else:
        variables, metadata = _given(fields, "teacher", teacher, splits)
    if fold and method.resumes_teacher:
        raise ValueError(
            f"config.method={fields.method!r} trains through the teacher's batch normalisation, which "
            "config.fold_teacher=True takes away; leave it unset"
        )
    if not method.resumes_teacher and (jax.default_backend() != "cpu" if fold is None else fold):
        images = jax.ShapeDtypeStruct((1, *splits.train.images.shape[1:]), jnp.float32)
        variables = models.fold(teacher, variables, images)
    return teacher, variables, metadata


def _given(fields: Fields, role: str, network: nn.Module, splits: data.Splits) -> tuple[Any, dict[str, Any]]:
    """Variables and metadata of the folder that config.teacher_checkpoint, or the student's, names.

    A student's may be of other classes.
    """
    field, here = f"config.{role}_checkpoint", splits.train.images.shape[1]
    path, name = getattr(fields, f"{role}_checkpoint"), getattr(fields, role)
    canonical = models.resolve(name, here, f"config.{role}")
    classes = (splits.num_classes, splits.class_names) if role == "teacher" else ()
    variables, metadata = checkpoint.load_network(path, canonical, *classes, field=field)
    side = metadata.get("image_size")
    if fields.image_size is None and ":" in fields.dataset and side not in (None, here):
        raise ValueError(
            f"{field}={path!r} was trained on images of {side} pixels, and config.dataset={fields.dataset!r} gives "
            f"{here}; set config.image_size={side}, or {here} if it is to see those"
        )
    check_channels(
        metadata, splits.train.images.shape[-1], f"{field}={path!r}", f"config.dataset={fields.dataset!r} has"
    )
    if metadata["num_classes"] != splits.num_classes:
        network = models.create(name, metadata["num_classes"], image_size=here, field=f"config.{role}")
    check_variables(network, variables, splits.train.images.shape[1:], field)
    return variables, metadata


def check_channels(metadata: Mapping[str, Any], channels: int, network: str, others: str) -> None:
    """ValueError where a network's images had another number of channels; it and the `others` are named so."""
    if (there := len(metadata["mean"])) != channels:
        mend = "save these in RGB" if (channels, there) == (1, 3) else "name a network of such images"
        raise ValueError(
            f"{network} was trained on images of {there} channels, and {others} images of {channels}; {mend}"
        )


def _beginning(fields: Fields, student: nn.Module, splits: data.Splits) -> tuple[Any, str]:
    """The variables of the folder that config.student_checkpoint names, in the student's own tree; its fingerprint.

    None in place of an array whose shape follows the number of classes, where the folder's are others.
    """
    variables, metadata = _given(fields, "student", student, splits)
    shape = splits.train.images.shape[1:]
    expected, given, path_of = _shapes(student, shape), variables, jax.tree_util.tree_leaves_with_path
    kept = dict(path_of(variables))
    if difference := checkpoint.other_classes(metadata, splits.num_classes, splits.class_names):
        if metadata["num_classes"] == splits.num_classes:  # which are others by name
            given = _shapes(models.create(fields.student, splits.num_classes + 1, image_size=shape[0]), shape)
        shapes, wanted = ({path: np.shape(leaf) for path, leaf in path_of(tree)} for tree in (given, expected))
        kept = {path: leaf for path, leaf in kept.items() if shapes.get(path) == wanted.get(path)}
        if wanted.keys() <= kept.keys():
            raise ValueError(
                f"config.student_checkpoint={fields.student_checkpoint!r} was trained on {difference}: no array of "
                f"config.student={fields.student!r} follows the number of classes, to be made anew for these"
            )
    return jax.tree_util.tree_map_with_path(lambda path, _: kept.get(path), expected), metadata["fingerprint"]


def _shapes(network: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """The variables that a network has for such images, as shapes."""
    return jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def untrained(network: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """Random variables of a network, without compiling its initialisation: for smoke runs."""
    generator = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if len(leaf.shape) > 1:
            return generator.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, _shapes(network, image_shape))


def check_variables(network: nn.Module, variables: Any, image_shape: tuple[int, ...], field: str) -> None:
    """ValueError, naming the first difference, where the arrays are not those that the network has for such images."""
    if different := _trees.difference(variables, _shapes(network, image_shape), np.shape):
        name, have, want = different
        raise ValueError(
            f"{field} does not fit the network on images of {image_shape}: {name} is {have} in the checkpoint and "
            f"{want} in the network"
        )
