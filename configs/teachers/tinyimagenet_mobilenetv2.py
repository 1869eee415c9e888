"""Tiny-ImageNet, MobileNetV2 by cross-entropy: a student alone, for which the paper has 56.28.

python main.py --config configs/teachers/tinyimagenet_mobilenetv2.py --workdir runs/alone/tinyimagenet_mobilenetv2
"""

from configs import tinyimagenet


def get_config():
    config = tinyimagenet.get_config()
    config.method = "cross_entropy"
    config.teacher = ""
    config.student = "MobileNetV2"
    config.views = "weak"
    return config
