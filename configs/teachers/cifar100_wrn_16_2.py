"""CIFAR-100, wrn_16_2 by cross-entropy: a student alone, for which the paper has 73.26.

python main.py --config configs/teachers/cifar100_wrn_16_2.py --workdir runs/alone/wrn_16_2
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "wrn_16_2"
    return config
