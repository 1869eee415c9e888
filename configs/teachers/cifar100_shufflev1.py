"""CIFAR-100, ShuffleV1 by cross-entropy: a student alone, for which the paper has 70.50.

python main.py --config configs/teachers/cifar100_shufflev1.py --workdir runs/alone/shufflev1
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "ShuffleV1"
    config.learning_rate = 0.01  # as the community does for this network
    return config
