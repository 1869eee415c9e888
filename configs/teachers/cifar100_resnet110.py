"""CIFAR-100, resnet110 by cross-entropy: a teacher of the paper, which has 74.31.

python main.py --config configs/teachers/cifar100_resnet110.py --workdir runs/teachers/resnet110
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet110"
    return config
