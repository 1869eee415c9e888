"""Every field of a run, with its meaning. An experiment's config starts from here and overrides a few.

The config is locked: a misspelt field is an error that suggests the right one.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rkd_jax import methods

TEACHERS = Path(__file__).resolve().parents[1] / "teachers"


def shipped(network: str) -> str:
    """The folder of a CIFAR-100 teacher that the repository has under teachers/; "" where it has none."""
    folder = TEACHERS / network
    return os.path.relpath(folder) if (folder / "metadata.json").is_file() else ""


def get_config() -> ConfigDict:
    config = ConfigDict()

    # Data. None: all of it.
    config.dataset = "cifar100"  # a file of rkd_jax/data/, "tfds:NAME", or "folder:PATH"
    config.data_dir = ""  # where TFDS keeps its sets; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    config.image_size = placeholder(int)  # pixels a side, for "tfds:" and "folder:" alone
    config.num_train = placeholder(int)  # train on this many images, balanced over the classes
    config.num_test = placeholder(int)  # test on this many images

    # Networks: names of rkd_jax/models/, or "my_module:factory".
    config.student = "resnet8x4"
    config.teacher = "resnet32x4"
    config.teacher_checkpoint = ""  # a folder from `python -m rkd_jax.convert`, or another run's WORKDIR/best
    # Such a folder, with whose weights the student begins; its last layer is new for other classes. "": random.
    config.student_checkpoint = ""
    # Fold the teacher's batch norms into its convolutions, equal up to rounding. None: on GPU, TPU, except for fcfd.
    config.fold_teacher = placeholder(bool)

    # Method: a file of rkd_jax/methods/, or "my_module:Class".
    config.method = "ranking_alignment"
    # Its hyper-parameters (lam, eps, temperature, ...). None: its authors' value for this data set and these networks,
    # which `python -m rkd_jax.methods` lists, and which every run prints and saves.
    for name, kind in methods.fields().items():
        config[name] = placeholder(kind)

    # Views of each image, made on the device. "weak": crop and flip; "strong": then two operations of fourteen, and
    # Cutout; "both"; "my_module:view"; or several, "weak+my_module:view".
    config.views = "both"
    config.view_reduction = "sum"  # of each loss term over the views: "sum" or "mean"
    # The next three are of "weak", and of the crop and flip that "strong" begins with.
    config.crop_padding = 4  # pixels of zeros on each side before the random crop; 0: no crop
    config.flip = True  # mirror half of the images
    config.rotation = 0.0  # degrees, uniform in +- this; 0: none

    # Optimization.
    config.batch_size = 64
    config.num_epochs = 300
    config.num_steps = placeholder(int)  # stop after this many steps, whatever num_epochs says
    config.learning_rate = 0.025
    config.schedule = "step"  # of the rate: "step", "cosine", which falls to 0 at the end, or "my_module:factory"
    config.decay_epochs = (150, 180, 210)  # "step": after each of these, the rate falls
    config.decay_factor = 0.1  # to this fraction
    config.lr_warmup_epochs = 0.0  # through these, the rate first rises
    config.optimizer = "sgd"  # or "optax:adamw", or "my_module:factory"; given what it takes of the next three
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 5e-4  # of every parameter; "sgd" adds it to the gradient

    # The run.
    config.seed = 0
    config.data_seed = placeholder(int)  # of the order and augmentation of the images; None: seed
    config.sweep = ""  # "lam=0.1,1,5" or "eps=1,0.1 seed=0,1": all these students in one program, with one teacher
    config.dtype = "float32"  # of the networks' arithmetic in training, or "bfloat16"; tests and losses stay float32
    config.stream = placeholder(bool)  # read each batch from the host; None: where the set fills half of a device
    # Steps from one log to the next, over which its metrics are means. None: on CPU 50, else the largest whole part of
    # an epoch of 20 to 1,000 steps (all of it, for CIFAR-100 in batches of 64), or 50.
    config.log_every = placeholder(int)
    # Steps that the device does without the host. None: log_every, where epochs, tests and the run are whole numbers of
    # it, else (and where the set is streamed) 10; on CPU 1. Another number may round otherwise.
    config.steps_per_call = placeholder(int)
    config.eval_epochs = 1.0  # epochs from one evaluation to the next, in whole steps
    config.eval_batch_size = 500
    config.checkpoint_seconds = 60.0  # between saves of checkpoint, best/ and last/; the end and SIGTERM save too
    config.compare = False  # also train the teacher (where no checkpoint is named) and the student alone
    config.smoke = False  # a few steps on a few random images, to see that everything fits together

    return config.lock()
