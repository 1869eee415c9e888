"""Tiny-ImageNet, ResNet18 by cross-entropy: the teacher of Table 3, which has 62.99.

python main.py --config configs/teachers/tinyimagenet_resnet18.py --workdir runs/teachers/resnet18
"""

from configs import tinyimagenet


def get_config():
    config = tinyimagenet.get_config()
    config.method = "cross_entropy"
    config.teacher = ""
    config.student = "ResNet18"
    config.views = "weak"
    return config
