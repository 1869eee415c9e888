"""CIFAR-100, resnet32 by cross-entropy: a student alone, for which the paper has 71.14.

python main.py --config configs/teachers/cifar100_resnet32.py --workdir runs/alone/resnet32
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet32"
    return config
