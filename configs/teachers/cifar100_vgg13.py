"""CIFAR-100, vgg13 by cross-entropy: a teacher of the paper, which has 74.64.

python main.py --config configs/teachers/cifar100_vgg13.py --workdir runs/teachers/vgg13
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "vgg13"
    return config
