"""CIFAR-100, resnet20 by cross-entropy: a student alone, for which the paper has 69.06.

python main.py --config configs/teachers/cifar100_resnet20.py --workdir runs/alone/resnet20
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet20"
    return config
