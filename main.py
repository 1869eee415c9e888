"""Trains or tests a config, whose fields are flags: --config configs/cifar100_res32x4_res8x4.py --config.lam=5.0"""

import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the start-up, imports too; the loop saves before it obeys

from absl import app, flags, logging
from ml_collections import config_flags

from rkd_jax import _devices, _files, _flags, _memory, evaluate, processes, runs

sys.path.append(os.getcwd())  # for what the config names of one's own
CONFIGS = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs"))
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)
FLAGS = flags.FLAGS
NAMED = _flags.names_config(sys.argv)
CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; without it, configs/digits.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, also to resume it; default: runs/<config>[-smoke].")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or report the accuracy of what WORKDIR holds.")
DISTRIBUTED = flags.DEFINE_string("distributed", None, 'Of several processes: "auto", or HOST:PORT,INDEX,COUNT.')
TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, print the whole traceback.")


def main(argv):
    """Runs the config and turns errors of the user's into one sentence."""
    if len(argv) > 1:
        mend = f"--config={argv[1]}" if argv[1].endswith(".py") else "--config.FIELD=VALUE"
        sys.exit(f"Error: {argv[1]!r} is no flag; write {mend}")
    logging.set_verbosity(logging.WARNING)
    _memory.keep()
    _devices.cache_programs(_files.cache())
    name = os.path.basename(config_flags.get_config_filename(FLAGS["config"]))
    try:
        if DISTRIBUTED.value:
            processes.initialize(DISTRIBUTED.value)
        name = os.path.splitext(name)[0] + ("-smoke" if CONFIG.value.get("smoke") else "")
        given = config_flags.get_override_values(FLAGS["config"])
        workdir = os.path.expanduser(WORKDIR.value or os.path.join("runs", name))
        if MODE.value == "train":
            runs.run(CONFIG.value, workdir, given)
        else:
            evaluate.run(CONFIG.value, workdir, None if NAMED else given, given)
    except Exception as error:
        _flags.end_if_unread(error)
        processes.end_if_lost(error)
        foreseen, place = isinstance(error, EXPECTED), _flags.own_code(error)
        if TRACEBACK.value or not (foreseen or place):
            raise
        said = f"{error}" if foreseen else f"{type(error).__name__}: {error}"
        place = place or ("another package" if _flags.foreign(error) else "")
        sys.exit(f"Error: {said}" + (f"\n(in {place}; --traceback shows the way there)" if place else ""))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: _flags.parse_config(argv, CONFIG, os.path.join(CONFIGS, "digits.py")))
