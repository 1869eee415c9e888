"""Distillation methods, one file each; the file's name is the method's.

>>> method = create("ranking_alignment", lam=5.0, eps=0.1)
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from rkd_jax.methods.base import Context, Distiller

__all__ = ["Context", "Distiller", "create", "fields", "load", "names", "resolve"]


@functools.cache
def names() -> tuple[str, ...]:
    """The methods of this package, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if name != "base" and not name.startswith("_")))


def load(name: str) -> type[Distiller]:
    """The class of a method: "kd" is rkd_jax/methods/kd.py, "my_module:Class" any class that can be imported."""
    if ":" in name:
        module, attribute = name.split(":", 1)
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config.method={name!r} cannot be imported: {error}; write it as module:Class") from error
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        raise ValueError(
            f"config.method={name!r} is no method" + (f"; did you mean {near[0]!r}?" if near else "")
            + f" There are {', '.join(names())}, and module:Class for your own."
        )
    return importlib.import_module(f"{__name__}.{name}").Method


def create(name: str, **fields: Any) -> Distiller:
    """A method by name, with some of its hyper-parameters given; TypeError-free: a field it lacks is a ValueError."""
    method = load(name)
    known = [field.name for field in dataclasses.fields(method)]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            raise ValueError(
                f"config.{field}={fields[field]!r} is set, but method {name!r} does not read it"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" It reads {', '.join(known) or 'no hyper-parameter'}."
            )
    return method(**fields)


def resolve(name: str, given: Mapping[str, Any], dataset: str = "", teacher: str = "", student: str = "") -> Distiller:
    """A method with the given fields (None: unset), and its authors' values for this data set and pair elsewhere."""
    method = load(name)
    tuned = {}
    for key in (dataset, student, f"{teacher}>{student}"):
        tuned |= method.tuned.get(key.lower(), {})
    return create(name, **tuned | {field: value for field, value in given.items() if value is not None})


def fields() -> dict[str, type]:
    """The name and type of every hyper-parameter of every method of this package: config fields, unset by default."""
    found: dict[str, type] = {}
    for name in names():
        for field in dataclasses.fields(load(name)):
            if found.setdefault(field.name, field.type) != field.type:
                raise TypeError(f"methods disagree about the type of {field.name!r}: {found[field.name]}, {field.type}")
    return found
