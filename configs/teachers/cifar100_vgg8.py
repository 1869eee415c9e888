"""CIFAR-100, vgg8 by cross-entropy: a student alone, for which the paper has 70.36.

python main.py --config configs/teachers/cifar100_vgg8.py --workdir runs/alone/vgg8
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "vgg8"
    return config
