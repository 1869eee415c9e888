"""CIFAR-100, resnet32x4 by cross-entropy, weak views, 240 epochs: a teacher of Table 1 (the paper's: 79.42).

python main.py --config configs/teachers/cifar100_resnet32x4.py --workdir runs/teachers/resnet32x4
"""

from configs.teachers import cross_entropy


def get_config():
    return cross_entropy.get_config("resnet32x4")
