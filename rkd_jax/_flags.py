"""What the commands have in common: their flags' types, and their errors."""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse's `type`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


@contextlib.contextmanager
def one_sentence(flags: argparse.Namespace, **names: str) -> Iterator[None]:
    """An error of the user's ends the command in one sentence and status 1, and names what the user wrote.

    A field of the config is the command's flag where it has one of that name: config.data_dir is --data_dir here;
    names: other names, by field, such as dataset="NAME" for a positional argument.
    """
    words = {name: f"--{name}" for name in vars(flags)} | names
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError) as error:
        said = re.sub(r"config\.(\w+)", lambda field: words.get(field[1], field[0]), str(error))
        sys.exit(f"Error: {said}")
