"""What the user writes: networks, methods and optimizers outside the package, named "my_module:attribute"."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any


def load(name: str, field: str, what: str) -> Callable[..., Any]:
    """What "my_module:attribute" names, a class or a function; ValueError, by the config's `field`, where it cannot be.

    `what` stands for the attribute in the error: "factory", "Class".
    """
    module, _, attribute = name.partition(":")
    mend = f"write it as my_module:{what}, with my_module.py in the working directory or installed"
    inner, dot, last = attribute.rpartition(".")
    if dot:
        mend = f"write it as {module}.{inner}:{last}"
    if not module or not attribute:
        raise ValueError(f"{field}={name!r} is no name; {mend}")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{field}={name!r} cannot be imported: {error}; {mend}") from error
    except Exception as error:  # whatever stands in the module
        raise ValueError(f"{field}={name!r}: {module} cannot be imported, mend it there: {error}") from error
    if not hasattr(imported, attribute):
        raise ValueError(
            f"{field}={name!r} cannot be imported: module {module!r} has no attribute {attribute!r}; {mend}"
        )
    if not callable(found := getattr(imported, attribute)):
        raise ValueError(f"{field}={name!r} is a {type(found).__name__}, which cannot be called; {mend}")
    return found


def parameters(function: Callable[..., Any]) -> set[str]:
    """The names that a function, a class, or a partial of either takes, those that are taken on further included."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isclass(function):
        return {*inspect.signature(function).parameters}
    found: set[str] = set()
    for kind in function.__mro__:  # a metaclass's __call__ would be the class's signature
        if "__init__" in vars(kind):
            taken = inspect.signature(kind.__init__).parameters.values()
            found |= {parameter.name for parameter in taken}
            if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken):
                break
    return found
