"""What the commands' flags have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse's `type`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
