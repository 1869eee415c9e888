"""CIFAR-100, wrn_40_2 > wrn_16_2: Table 1, column 3.

The paper: teacher 75.61, student alone 73.26, with ranking alignment 77.13 (lambda 5, eps 1).

    python main.py --config configs/cifar100_wrn40_2_wrn16_2.py --config.teacher_checkpoint=TEACHER
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "wrn_40_2"
    config.student = "wrn_16_2"
    return config
