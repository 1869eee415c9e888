"""CIFAR-100, wrn_40_2 > wrn_40_1: Table 1, column 4.

The paper: teacher 75.61, student alone 71.98, with ranking alignment 75.98 (lambda 5, eps 1).

    python main.py --config configs/cifar100_wrn40_2_wrn40_1.py --config.teacher_checkpoint=TEACHER
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "wrn_40_2"
    config.student = "wrn_40_1"
    return config
