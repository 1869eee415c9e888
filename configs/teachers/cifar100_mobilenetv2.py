"""CIFAR-100, MobileNetV2 by cross-entropy: a student alone, for which the paper has 64.60.

python main.py --config configs/teachers/cifar100_mobilenetv2.py --workdir runs/alone/mobilenetv2
"""

from configs.teachers import cross_entropy


def get_config():
    config = cross_entropy.get_config()
    config.student = "MobileNetV2"
    config.learning_rate = 0.01  # as the community does for this network
    return config
