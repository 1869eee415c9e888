"""The offline default: scikit-learn's digits, 8 x 8 pixels, 10 classes.

A small teacher, the student alone, and the student with ranking alignment, in a table: `python main.py`. A toy that
shows the machinery at work in one to two minutes on two CPU cores; the paper has no such numbers.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "digits"
    config.teacher = "resnet20"
    config.student = "resnet8"
    config.views = "weak"
    config.crop_padding = 1
    config.flip = False  # a mirrored digit is another sign
    config.num_epochs = 30
    config.decay_epochs = (18, 24)
    config.learning_rate = 0.05
    config.eval_epochs = 5.0
    config.compare = True
    return config
