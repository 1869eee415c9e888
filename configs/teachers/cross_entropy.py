"""What every config of this folder shares: 240 epochs of cross-entropy on weak views, as in RepDistiller."""

from configs import default


def get_config(network: str = "resnet8x4"):
    config = default.get_config()
    config.method = "cross_entropy"
    config.student = network
    config.teacher = ""
    config.views = "weak"
    config.num_epochs = 240
    config.learning_rate = 0.05
    config.decay_epochs = (150, 180, 210)
    return config
