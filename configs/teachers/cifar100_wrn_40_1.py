"""CIFAR-100, wrn_40_1 by cross-entropy: a student alone, for which the paper has 71.98.

python main.py --config configs/teachers/cifar100_wrn_40_1.py --workdir runs/alone/wrn_40_1
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "wrn_40_1"
    return config
