"""CIFAR-100, ResNet50 by cross-entropy: a teacher of the paper, which has 79.34.

python main.py --config configs/teachers/cifar100_resnet50.py --workdir runs/teachers/resnet50
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "ResNet50"
    return config
