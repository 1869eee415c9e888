"""CIFAR-100, resnet110 > resnet32: Table 1, column 6.

The paper: teacher 74.31, student alone 71.14, with ranking alignment 75.29 (lambda 5, eps 1).

    python main.py --config configs/cifar100_res110_res32.py --config.teacher_checkpoint=TEACHER
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "resnet110"
    config.student = "resnet32"
    return config
