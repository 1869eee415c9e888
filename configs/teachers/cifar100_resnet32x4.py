"""CIFAR-100, resnet32x4 by cross-entropy: a teacher of the paper, which has 79.42.

Here: 79.44 at the best of 225 epochs, in 801 s on one H100 (docs/findings.md).

python main.py --config configs/teachers/cifar100_resnet32x4.py --workdir runs/teachers/resnet32x4
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "resnet32x4"
    return config
