"""What the user writes: networks, methods and optimizers outside the package, named "my_module:attribute"."""

import importlib
from typing import Any


def load(name: str, field: str, what: str) -> Any:
    """What "my_module:attribute" names; ValueError, by the config's `field`, where it cannot be imported.

    `what` stands for the attribute in the error: "factory", "Class".
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{field}={name!r} cannot be imported: {error}; write it as my_module:{what}, with my_module.py in the "
            "working directory or installed"
        ) from error
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{field}={name!r}: {module} cannot be imported, mend it there: {error}") from error
