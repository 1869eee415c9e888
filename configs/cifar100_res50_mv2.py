"""CIFAR-100, ResNet50 > MobileNetV2: Table 2, column 3.

The paper: teacher 79.34, student alone 64.60, with ranking alignment 72.31 (lambda 5, eps 1).

The rate is the paper's 0.025, which it states without exception; the community trains this student at 0.01.

    python main.py --config configs/cifar100_res50_mv2.py --config.teacher_checkpoint=TEACHER
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "ResNet50"
    config.student = "MobileNetV2"
    config.learning_rate = 0.025  # the community: 0.01
    return config
