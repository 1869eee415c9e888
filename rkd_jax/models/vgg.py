"""VGG networks with batch normalisation (Simonyan and Zisserman 2015, arXiv:1409.1556) for small images.

features: the five blocks after their last ReLU, before the pooling; preactivations: the same before that ReLU. The
fourth pooling is for images of 64 pixels and up; the last is a global average.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models import Cuts, Outputs
from rkd_jax.models.layers import Cut, conv_bn, head


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, of 64, 128, 256, 512 and 512 channels."""

    num_classes: int
    convolutions: tuple[int, ...]  # per block
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Images [B, H, W, K] of 8 pixels and up, normalised; train: use and update the batch statistics."""
        side = min(images.shape[1:3])
        if side < 8:
            raise ValueError(f"vgg halves the image three times: {side} pixels are too few, it takes 8 and up")
        x, features, preactivations = images.astype(self.dtype), [], []
        for block, (count, channels) in enumerate(zip(self.convolutions, (64, 128, 256, 512, 512), strict=True)):
            if block in (1, 2, 3) or (block == 4 and side >= 64):
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
            for i in range(count):
                names = (f"block{block}_{3 * i}", f"block{block}_{3 * i + 1}")  # a ReLU takes the third number
                preactivation = conv_bn(x, train, channels, names, bias_init=nn.initializers.zeros)
                if i == count - 1:
                    preactivation = Cut(block)(preactivation)
                x = nn.relu(preactivation)
            features.append(x)
            preactivations.append(preactivation)
        logits, embedding, class_maps, x = head(x, self.num_classes, "classifier", std=0.01)
        cuts = Cuts(preactivations, activated=False)
        return Outputs.of(logits, features, embedding, preactivations, class_maps, x, cuts)


NETWORKS = {
    "vgg8": functools.partial(VGG, convolutions=(1, 1, 1, 1, 1)),
    "vgg11": functools.partial(VGG, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": functools.partial(VGG, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": functools.partial(VGG, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": functools.partial(VGG, convolutions=(2, 2, 4, 4, 4)),
}
