"""What the CIFAR-100 configs of this folder share: 240 epochs of cross-entropy on weak views, as in RepDistiller.

python main.py --config configs/teachers/cross_entropy.py --config.student=resnet14 --workdir runs/alone/resnet14
"""

from configs import default


def get_config():
    config = default.get_config()
    config.method = "cross_entropy"
    config.teacher = ""
    config.views = "weak"
    config.num_epochs = 240
    config.learning_rate = 0.05
    return config
