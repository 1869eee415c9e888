"""Trees of arrays: what their leaves are called, and where two differ."""

from collections.abc import Callable
from typing import Any

import jax


def name(path: Any) -> str:
    """A leaf's, from its path in the tree: "params/conv1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def difference(found: Any, expected: Any, form: Callable[[Any], Any]) -> tuple[str, Any, Any] | None:
    """The first leaf, by name, at which `form` differs: (name, `form` in found, in expected); None where they agree.

    A name is "params/conv1/kernel"; a leaf that one tree lacks has the form "nothing" there.
    """
    ours, theirs = (
        {path: form(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (found, expected)
    )
    for path in {**theirs, **ours}:
        if (pair := tuple(side.get(path, "nothing") for side in (ours, theirs)))[0] != pair[1]:
            return name(path), *pair
    return None
