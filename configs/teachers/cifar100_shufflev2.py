"""CIFAR-100, ShuffleV2 by cross-entropy: a student alone, for which the paper has 71.82.

python main.py --config configs/teachers/cifar100_shufflev2.py --workdir runs/alone/shufflev2
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "ShuffleV2"
    config.learning_rate = 0.01  # as the community does for this network
    return config
