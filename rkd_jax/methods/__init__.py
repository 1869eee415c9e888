"""Distillation methods, one file each; the file's name is the method's.

>>> method = create("ranking_alignment", lam=5.0, eps=0.1)
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any

from rkd_jax import _own
from rkd_jax.methods.base import Context, Distiller

__all__ = ["Context", "Distiller", "called", "create", "fields", "hyperparameters", "load", "names", "own", "resolve"]


@functools.cache
def names() -> tuple[str, ...]:
    """The methods of this package, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if name != "base" and not name.startswith("_")))


def load(name: str, field: str = "config.method") -> type[Distiller]:
    """The class of a method: "kd" is rkd_jax/methods/kd.py, "my_module:Class" any class that can be imported.

    `field` is the config field that gave the name, for the error.
    """
    if ":" in name:
        method = _own.load(name, field, "Class")
        if not (isinstance(method, type) and issubclass(method, Distiller)):
            raise ValueError(f"{field}={name!r} is no distillation method; derive it from methods.Distiller")
        if complaint := _complaint(method):
            raise ValueError(f"{field}={name!r} {complaint}")
        return method
    if name not in names():
        raise ValueError(
            f"{field}={name!r} is no method{_nearest(name, names())} There are {', '.join(names())}, "
            "and module:Class for your own."
        )
    return importlib.import_module(f"{__name__}.{name}").Method


def _complaint(method: type[Distiller]) -> str:
    """What a class lacks to be a method, and the mend; "" where nothing."""
    known = {field.name: field for field in dataclasses.fields(method)}
    for name, kind in inspect.get_annotations(method).items():
        if name not in known and "ClassVar" not in str(kind):
            return f"has {name!r}, which is no field; write @dataclasses.dataclass(frozen=True) above the class"
    for name, field in known.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            return f"has {name!r} without a default; give it one"
    try:
        kinds = _kinds(method)
    except NameError as error:
        return f"has a field of a type that is not defined: {error}"
    for name, kind in kinds.items():
        if not isinstance(kind, type):
            return f"has {name!r} as {kind}, which a flag cannot be; make it one type, such as float, or float | None"
    if method.loss is Distiller.loss:
        return "has no loss; write one"
    for name in ("init", "loss", "deploy", "wrap_optimizer"):
        given = inspect.signature(getattr(Distiller, name))
        try:
            inspect.signature(getattr(method, name)).bind(*given.parameters)
        except TypeError as error:
            names = ", ".join(given.parameters)
            return f"has a {name} that cannot be called ({error}); write def {name}({names})"
    return ""


def create(name: str, **fields: Any) -> Distiller:
    """A method by name, with some of its hyper-parameters given; ValueError for one that it does not read."""
    return _create(load(name), fields, ())


def resolve(name: str, given: Mapping[str, Any], dataset: str = "", teacher: str = "", student: str = "") -> Distiller:
    """A method with the given fields (None: unset), and its authors' values for this data set and pair elsewhere."""
    given = {field: value for field, value in given.items() if value is not None}
    return _create(load(name), given, (dataset, student, f"{teacher}>{student}"))


def fields(*others: str) -> dict[str, type]:
    """The name and type of every hyper-parameter of this package's methods, and of `others` ("my_module:Method").

    They are the config's fields, unset by default; a method within a method is given by its name, a str.
    """
    found: dict[str, type] = {}
    for name in (*names(), *others):
        for field, kind in _kinds(load(name)).items():
            kind = str if kind is Distiller else kind
            if (known := found.setdefault(field, kind)) != kind:
                raise ValueError(
                    f"config.method={name!r} has {field!r} as {_word(kind)}, which others have as {_word(known)}; "
                    f"make it {_word(known)}, or name it otherwise"
                )
    return found


@functools.cache
def _kinds(method: type[Distiller]) -> dict[str, Any]:
    """The type of each field of a method, also where its module has `from __future__ import annotations`.

    float of `float | None`, for every field may be unset; tuple of `tuple[int, ...]`.
    """
    hints = typing.get_type_hints(method)
    return {field.name: _kind(hints[field.name]) for field in dataclasses.fields(method)}


def _kind(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return _kind(kinds[0]) if len(kinds) == 1 else hint
    return origin if isinstance(origin := typing.get_origin(hint), type) else hint


def _word(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def own(values: Mapping[str, Any]) -> list[str]:
    """The methods of the user's own ("my_module:Class") that a config names: its method, and one within that."""
    within = (name for name, kind in _kinds(load(values["method"])).items() if kind is Distiller)
    return [name for name in (values["method"], *map(values.get, within)) if name and ":" in name]


def hyperparameters(method: Distiller) -> dict[str, Any]:
    """A method's fields and their values, as `create` takes them: a method within by its name, beside its fields."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Distiller):
            found = hyperparameters(value) | found | {field.name: _name(type(value))}
        else:
            found[field.name] = value
    return found


def called(method: Distiller) -> str:
    """How a config names a method, for errors: "kd", "my_module:Class", "dot of kd"."""
    within = (value for value in vars(method).values() if isinstance(value, Distiller))
    return " of ".join([_name(type(method)), *map(called, within)])


def _create(method: type[Distiller], given: Mapping[str, Any], places: tuple[str, ...], within: str = "") -> Distiller:
    """A method with its values for these places, then the given ones; those it lacks go to the method within.

    `within`: for the errors of a method within another, that one.
    """
    values: dict[str, Any] = {}
    for place in places:
        values |= method.tuned.get(place.lower(), {})
    values |= given
    known = {field.name: field for field in dataclasses.fields(method)}
    foreign = {name: values.pop(name) for name in list(values) if name not in known}
    for name, kind in _kinds(method).items():
        if kind is Distiller:
            if isinstance(values.get(name), Distiller):  # which has its fields
                continue
            inner = load(values[name], f"config.{name}") if name in values else type(known[name].default)
            values[name], foreign = _create(inner, foreign, places, f"within {_name(method)!r} (config.{name}), "), {}
    for name, value in foreign.items():
        if name not in given:
            raise ValueError(f"{_name(method)}.tuned has {name!r}, which is no field of it{_nearest(name, known)}")
        raise ValueError(
            f"config.{name}={value!r} is set, but {within}method {_name(method)!r} does not read it"
            f"{_nearest(name, known)} It reads {', '.join(known) or 'no hyper-parameter'}."
        )
    made = method(**values)
    for name, weight in method.weighted_by.items():
        if name in given and weight not in given and not getattr(made, weight):
            raise ValueError(
                f"config.{name}={given[name]!r} changes nothing until config.{weight} is set; set it, too (0: none)"
            )
    return made


def _name(method: type[Distiller]) -> str:
    package, _, module = method.__module__.rpartition(".")
    return module if package == __name__ else f"{method.__module__}:{method.__qualname__}"


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
