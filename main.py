"""Distils an image classifier: python main.py --config configs/cifar100_res32x4_res8x4.py --config.lam=5.0."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from rkd_jax import evaluate, runs

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept, and resumed from. Default: runs/<config>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or report the accuracy of what WORKDIR holds.")
TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, print where in the code it arose too.")


def main(argv):
    """Runs the config and turns errors of the user's into one sentence."""
    if len(argv) > 1:
        sys.exit(f"Error: {argv[1]!r} is no flag; write --config.FIELD=VALUE")
    logging.set_verbosity(logging.WARNING)
    source = config_flags.get_config_filename(FLAGS["config"])
    workdir = WORKDIR.value or os.path.join("runs", os.path.splitext(os.path.basename(source))[0])
    run = runs.run if MODE.value == "train" else evaluate.run
    try:
        run(CONFIG.value, workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        if TRACEBACK.value:
            raise
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main)
