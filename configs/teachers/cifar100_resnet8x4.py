"""CIFAR-100, resnet8x4 by cross-entropy: a student alone, for which the paper has 72.50.

python main.py --config configs/teachers/cifar100_resnet8x4.py --workdir runs/alone/resnet8x4
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet8x4"
    return config
