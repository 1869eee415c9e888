"""Tiny-ImageNet, ShuffleV2 by cross-entropy: a student alone, for which the paper has 60.78.

python main.py --config configs/teachers/tinyimagenet_shufflev2.py --workdir runs/alone/tinyimagenet_shufflev2
"""

from configs import tinyimagenet


def get_config():
    config = tinyimagenet.get_config()
    config.method = "cross_entropy"
    config.teacher = ""
    config.student = "ShuffleV2"
    config.views = "weak"
    return config
