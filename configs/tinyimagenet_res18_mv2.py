"""Tiny-ImageNet, ResNet18 > MobileNetV2: Table 3.

The paper: teacher 62.99, student alone 56.28, with ranking alignment 64.30 (lambda 10, eps 1).

    python main.py --config configs/tinyimagenet_res18_mv2.py --config.teacher_checkpoint=TEACHER
"""

from configs import tinyimagenet


def get_config():
    config = tinyimagenet.get_config()
    config.teacher = "ResNet18"
    config.student = "MobileNetV2"
    return config
