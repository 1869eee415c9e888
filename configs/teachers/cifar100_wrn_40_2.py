"""CIFAR-100, wrn_40_2 by cross-entropy: a teacher of the paper, which has 75.61.

python main.py --config configs/teachers/cifar100_wrn_40_2.py --workdir runs/teachers/wrn_40_2
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "wrn_40_2"
    return config
