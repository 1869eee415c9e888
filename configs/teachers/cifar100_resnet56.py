"""CIFAR-100, resnet56 by cross-entropy: a teacher of the paper, which has 72.34.

python main.py --config configs/teachers/cifar100_resnet56.py --workdir runs/teachers/resnet56
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet56"
    return config
