"""Tiny-ImageNet, ResNet18 > ShuffleV2: Table 3.

The paper: teacher 62.99, student alone 60.78, with ranking alignment 66.58 (lambda 10, eps 1).

    python main.py --config configs/tinyimagenet_res18_sv2.py --config.teacher_checkpoint=TEACHER
"""

from configs import tinyimagenet


def get_config():
    config = tinyimagenet.get_config()
    config.teacher = "ResNet18"
    config.student = "ShuffleV2"
    return config
