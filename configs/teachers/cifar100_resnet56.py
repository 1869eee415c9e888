"""CIFAR-100, resnet56 by cross-entropy, weak views, 240 epochs: a teacher of Table 1 (the paper's: 72.34).

python main.py --config configs/teachers/cifar100_resnet56.py --workdir runs/teachers/resnet56
"""

from configs.teachers import cross_entropy


def get_config():
    return cross_entropy.get_config("resnet56")
