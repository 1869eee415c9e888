"""What the commands have in common: their flags' types, and their errors."""

import argparse
import contextlib
import difflib
import functools
import keyword
import os
import re
import select
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

HERE = Path(__file__).resolve().parent
DATA_DIR_HELP = "TFDS's folder; default: $TFDS_DATA_DIR or ~/tensorflow_datasets"
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse's `type`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def folder(text: str) -> Path:
    """A folder that is there, as argparse's `type`."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def names_config(argv: list[str]) -> bool:
    """Whether a command line names a config, and not only fields of one."""
    return any(re.match("--?config(=|$)", argument) for argument in argv[1:])


def parse_config(argv: list[str], config: flags.FlagHolder, default: str) -> list[str]:
    """Parses a command line with ml_collections' flag --config, a file of the default's folder; returns what is left.

    A field that the config lacks, or a config that cannot be read, ends the program in one sentence.
    """
    given = sys.argv
    _check_names(argv)
    if not names_config(argv):
        argv = sys.argv = [argv[0], f"--config={default}", *argv[1:]]  # config_flags reads sys.argv
    parser = flags.FLAGS[config.name].parser
    parser.parse = functools.partial(_parse_with_own_fields, parser.parse, argv)
    try:
        arguments = flags.FLAGS(argv)
        if config.value is None:
            sys.exit("Error: --config: get_config() of that file returns nothing; end it with `return config`")
        config.value.to_dict()  # raises where the file cannot be read and no flag set a field of it
        return arguments
    except flags.Error as error:
        cause = error
        while cause and not (place := own_code(cause)):  # what the config's file raised, if it was that
            cause = cause.__context__
        said = re.sub(r"\('Non-boolean argument.*\)", "not a boolean; write True or False", str(error))
        said = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is no whole number", said)
        said = re.sub(r"^flag --config=\S*: (?=config\.)", "", said)  # a method of one's own that cannot be loaded
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname in (config.value or ()):
            said = f"--{error.flagname} is no flag; write --config.{error.flagname}"
        if "before a value for --config was specified" in said:
            said = f"{said.rstrip('.')}; put --config=FILE first"
        which = "" if str(cause).startswith("config.") else "--config: "
        sys.exit("Error: " + (f"{which}{cause}\n(in {place})" if cause else said.removeprefix("flag ")))
    except SyntaxError as error:
        sys.exit(f"Error: --config: {error.filename}, line {error.lineno}: {error.msg}")
    except (AttributeError, KeyError) as error:  # ml_collections' words come quoted, once for each of its layers
        words = str(error).replace("\\n", ". ").replace("\\", "").replace("'", "").strip('"')
        words, _, others = words.partition(" Other fields present")
        key = re.search(r'Key "(\w+)"', words)
        near = difflib.get_close_matches(key[1], re.findall(r"(\w+): ", others), 1) if key else []
        words += f" Did you mean {near[0]!r}?" if near else ""
        where = "all are in configs/default.py, or are of a method of your own that config.method names"
        sys.exit(f"Error: no such field of the config: {words} ({where})")
    except Exception as error:  # a config is Python
        place = own_code(error)
        if not (place or isinstance(error, ValueError | OSError | ImportError)):
            raise
        if re.search(r"\[Errno (2|21)\]", str(error)):  # of its several lines, the one that names the file
            error = f"{str(error).splitlines()[-1].strip()}; name a file of {os.path.dirname(default)}"
        sys.exit(f"Error: --config: {error}" + (f"\n(in {place})" if place else ""))
    finally:
        sys.argv = given  # the command of the run's record


def _check_names(argv: list[str]) -> None:
    """Ends the program where a flag names a field by what can be none's name, which the parsers' words do not say."""
    for argument in argv[1:]:
        named = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if named and (not (name := named[1]).isidentifier() or keyword.iskeyword(name)):
            from rkd_jax import methods  # here, as below

            known = name.replace("-", "_")
            near = (
                [known] if known.isidentifier() and known != name else difflib.get_close_matches(name, methods.fields())
            )
            sys.exit(f"Error: no such field of the config: {name}" + (f". Did you mean {near[0]!r}?" if near else ""))


def _parse_with_own_fields(parse: Callable[[str], Any], argv: list[str], path: str) -> Any:
    """The config of a file; where flags or a sweep set what it lacks, with the fields of one's own methods, unset."""
    from ml_collections import ConfigDict  # here: what other commands need of this file starts without JAX
    from ml_collections.config_dict import placeholder

    from rkd_jax import methods

    config = parse(path)
    values: dict[str, str] = {}  # of fields, by flags
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if found := re.fullmatch(r"--?(?:no)?config\.(\w+)(?:=(.*))?", argument, re.DOTALL):
            values[found[1]] = following if found[2] is None else found[2]
    swept: dict[str, str] = {}  # likewise, a comma between the values
    for name, value in re.findall(r"(\w+)=([^\s;]*)", values.get("sweep", "")):
        swept[name] = f"{swept[name]},{value}" if name in swept else value
    if isinstance(config, ConfigDict) and {*values, *swept} - {*config}:
        known = config.to_dict() | values | swept
        named = filter(None, [values.get("method", config.get("method")), swept.get("method")])
        own = [
            name
            for method in ",".join(named).split(",")
            for found in methods.own(known | {"method": method})
            for name in found.split(",")
            if ":" in name
        ]
        with config.unlocked():
            config.update(
                {name: placeholder(kind) for name, kind in methods.fields(*own).items() if name not in config}
            )
    return config


def own_code(error: BaseException) -> str:
    """The line that an error, or what caused it, came through last of those in no package; "" where there is none.

    As "FILE, line N: CODE".
    """
    if error.__cause__ and (place := own_code(error.__cause__)):
        return place
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        if file.is_file() and not _packaged(file) and not _installed(file) and file != HERE.parent / "main.py":
            return f"{os.path.relpath(file)}, line {frame.lineno}: {frame.line}"
    return ""


def foreign(error: BaseException) -> bool:
    """Whether an installed package raised an error, and not this one; its words may name nothing of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    if any("JAX has removed its internal frames" in note for note in getattr(error, "__notes__", ())):
        return not frames[-1].line.startswith("raise ")  # but the call of what raised it
    files = [Path(frame.filename).resolve() for frame in frames]
    files = [file for file in files if STDLIB not in file.parents or _installed(file)]
    return bool(files) and _installed(files[-1]) and HERE not in files[-1].parents


def _packaged(file: Path) -> bool:
    """Whether a file is this package's, or Python's."""
    return HERE in file.parents or STDLIB in file.parents


def _installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & {*file.parts})


@contextlib.contextmanager
def one_sentence(arguments: argparse.Namespace, **names: str) -> Iterator[None]:
    """An error of the user's ends the command in one sentence and status 1, and names what the user wrote.

    A field of the config is the command's flag where it has one of that name: config.data_dir is --data_dir here;
    names: other names, by field, such as dataset="NAME" for a positional argument.
    """
    words = {name: f"--{name}" for name in vars(arguments)} | names
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError) as error:
        end_if_unread(error)
        said = re.sub(r"config\.(\w+)", lambda field: words.get(field[1], field[0]), str(error))
        sys.exit(f"Error: {said}" + (f"\n(in {place})" if (place := own_code(error)) else ""))


def end_if_unread(error: Exception) -> None:
    """Ends the program, without a word, where the error is that `| head` has seen enough."""
    if isinstance(error, BrokenPipeError) and _has_no_reader():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
        sys.exit(128 + signal.SIGPIPE)


def _has_no_reader() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
