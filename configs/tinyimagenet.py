"""What the Tiny-ImageNet configs share: the paper's recipe for 64x64 images, its Table 3.

The paper does not state the augmentation. The default here is both views, as on CIFAR-100 (--config.views=weak is
one), with a crop of 64 from 8 pixels of padding, and a flip, as in CRLD. mdistiller has a rotation by up to 20 degrees
and a flip, and for DOT a schedule of its own: --config.views=weak --config.rotation=20 --config.crop_padding=0
--config.batch_size=256 --config.learning_rate=0.2 --config.num_epochs=200 --config.decay_epochs="(60,120,160)".

    python main.py --config configs/tinyimagenet.py --config.teacher_checkpoint=TEACHER
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "tiny_imagenet"
    config.teacher = "ResNet18"
    config.student = "MobileNetV2"
    config.batch_size = 128
    config.learning_rate = 0.05
    config.num_epochs = 240
    config.crop_padding = 8
    return config
