"""Lists the methods: `python -m rkd_jax.methods`; and describes them by name. `--markdown`: docs/methods.md's table."""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap

from rkd_jax import _flags, methods

HEADER = "| method | paper | loss | hyper-parameters |\n|---|---|---|---|"


def page(name: str) -> tuple[str, str, str]:
    """The paper, the formula and the notes of a method's module docstring, its paragraphs one, two, and the rest."""
    text = inspect.getdoc(sys.modules[methods.load(name).__module__]) or ""
    paper, formula, notes = (*(" ".join(part.split()) for part in text.split("\n\n", 2)), "", "", "")[:3]
    return paper, formula, notes


def comments(method: type[methods.Distiller]) -> dict[str, str]:
    """What the source says beside each field."""
    found = dict.fromkeys(defaults(method), "")
    for cls in reversed(method.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    return found


def defaults(method: type[methods.Distiller]) -> dict[str, object]:
    """Each hyper-parameter and its default; a method within by its name."""
    values = methods.hyperparameters(method())
    return {field.name: values[field.name] for field in dataclasses.fields(method)}


def as_line(name: str) -> str:
    """A method and its paper."""
    return textwrap.fill(f"{name:19}{page(name)[0]}", 110, subsequent_indent=" " * 19, break_on_hyphens=False)


def as_text(name: str) -> str:
    """A method for the terminal."""
    method = methods.load(name)
    described = comments(method)
    wrap = lambda text, by: textwrap.fill(text, 110, initial_indent=by, subsequent_indent=by)  # noqa: E731
    lines = [name, *(wrap(part, "    ") for part in page(name) if part)]
    lines += [f"    config.{field} = {value!r}: {described[field]}" for field, value in defaults(method).items()]
    lines += [f"    {place}: {', '.join(_settings(values))}" for place, values in method.tuned.items()]
    return "\n".join(lines)


def as_row(name: str) -> str:
    """A method as a row of the Markdown table."""
    method = methods.load(name)
    described = comments(method)
    paper, formula, _ = page(name)
    fields = [f"`{field}` = {value!r}: {described[field]}" for field, value in defaults(method).items()]
    fields += [f"{place}: {', '.join(_settings(values))}" for place, values in method.tuned.items()]
    formula = formula.replace("`", "")
    cells = (f"[{name}](../rkd_jax/methods/{name}.py)", paper, f"`{formula}`", "<br>".join(fields))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _settings(values) -> list[str]:
    return [f"{field} = {value!r}" for field, value in values.items()]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rkd_jax.methods", description="Lists the distillation methods.")
    parser.add_argument("names", nargs="*", metavar="NAME", help='methods to describe, also "my_module:Method"')
    parser.add_argument("--markdown", action="store_true", help="the table of docs/methods.md")
    options = parser.parse_args(arguments)
    with _flags.one_sentence(options, method="NAME"):
        if options.markdown:
            rows = [HEADER, *map(as_row, options.names or methods.names())]
        elif options.names:
            rows = ["\n\n".join(map(as_text, options.names))]
        else:
            rows = [*map(as_line, methods.names()), "\npython -m rkd_jax.methods NAME: its formula, fields and notes"]
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
