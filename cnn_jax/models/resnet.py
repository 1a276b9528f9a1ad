"""Residual networks: He et al., "Deep Residual Learning for Image Recognition" (2015)."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import layers
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models.batch_norm import BatchNorm
from cnn_jax.models.checks import check_fixed_settings, check_image_side
from cnn_jax.models.head import add_head

_EXPANSION = 4
"""Times the width of a bottleneck block that its result is wide."""

WIDTHS = {
    "resnet18": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2),
    "resnet34": ((64,) * 3, (128,) * 4, (256,) * 6, (512,) * 3),
    "resnet50": ((64,) * 3, (128,) * 4, (256,) * 6, (512,) * 3),
}
"""Table 1: the width of each block of each stage."""


class ResNet(nn.Module):
    """`stem`, stages of residual blocks, `pool`, `head`: for small images or for photos.

    `blocks` holds one tuple for each stage and in it the width of each block. Every stage but the
    first begins by halving the height and width. Kernels of convolutions start as in He et al.,
    "Delving Deep into Rectifiers" (2015): normal with variance 2 / fan_in. The head's has variance
    1 / fan_in, as no ReLU follows it.
    """

    config: ModelConfig
    n_classes: int
    blocks: tuple[tuple[int, ...], ...]
    for_photos: bool = False
    """Whether the stem is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2, instead of
    a 3x3 convolution."""
    bottleneck: bool = False
    """Whether blocks have three convolutions, of which the middle one is 3x3, instead of two."""

    @property
    def last_block(self) -> str:
        """A regular expression for the name of the last stage."""
        return f"stage{len(self.blocks)}"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; `train` turns dropout and the batch's own statistics on."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x, stem = images, partial(convolution, self.blocks[0][0], dtype=dtype, name="stem")
        if self.for_photos:
            check_image_side(images, 32, config)
            x = stem(kernel_size=(7, 7), strides=(2, 2), padding=((3, 3), (3, 3)))(x)
        else:
            x = stem()(x)
        x = batch_norm(activation=config.activation, dtype=dtype, name="stem_norm")(x, not train)
        if self.for_photos:
            x = layers.MaxPool((3, 3), (2, 2), ((1, 1), (1, 1)), name="stem_pool")(x)
        block = BottleneckBlock if self.bottleneck else ResidualBlock
        for i, widths in enumerate(self.blocks, start=1):
            stride = 1 if i == 1 else 2
            x = Stage(block, widths, stride, config.activation, dtype, name=f"stage{i}")(x, train)
        return classify_means(x, config, self.n_classes, train)


class Stage(nn.Module):
    """Residual blocks `block1`, `block2`, ... of one resolution; `stride` is the first block's."""

    block: type[nn.Module]
    widths: tuple[int, ...]
    stride: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns the last block's feature maps; height and width are divided by the stride."""
        for i, width in enumerate(self.widths, start=1):
            stride = self.stride if i == 1 else 1
            x = self.block(width, stride, self.activation, self.dtype, name=f"block{i}")(x, train)
        return x


class ResidualBlock(nn.Module):
    """The basic block: two 3x3 convolutions, whose result is added to the block's input.

    Where the two shapes differ, the input passes through a 1x1 convolution `shortcut` and a
    `shortcut_norm` first (option B of He et al., section 4.1).
    """

    width: int
    stride: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns activation(shortcut(x) + norm2(conv2(activation(norm1(conv1(x))))))."""
        conv = partial(convolution, self.width, dtype=self.dtype)
        norm = partial(batch_norm, dtype=self.dtype)
        y = _conv3x3(conv, self.stride, "conv1")(x)
        y = norm(activation=self.activation, name="norm1")(y, not train)
        y = conv(name="conv2")(y)
        y = norm(name="norm2")(y, not train)
        x = _shortcut(x, y.shape, self.stride, self.dtype, train)
        return layers.ACTIVATIONS[self.activation](x + y)


class BottleneckBlock(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, the last four times as wide, added to the block's input.

    The 3x3 convolution has the stride, as in torchvision's networks; the paper gives it to the
    first 1x1 convolution. The shortcut is that of `ResidualBlock`.
    """

    width: int
    stride: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns activation(shortcut(x) + norm3(conv3(...norm1(conv1(x)))))."""
        conv = partial(convolution, dtype=self.dtype)
        norm = partial(batch_norm, dtype=self.dtype)
        y = conv(self.width, kernel_size=(1, 1), name="conv1")(x)
        y = norm(activation=self.activation, name="norm1")(y, not train)
        y = _conv3x3(partial(conv, self.width), self.stride, "conv2")(y)
        y = norm(activation=self.activation, name="norm2")(y, not train)
        y = conv(_EXPANSION * self.width, kernel_size=(1, 1), name="conv3")(y)
        y = norm(name="norm3")(y, not train)
        x = _shortcut(x, y.shape, self.stride, self.dtype, train)
        return layers.ACTIVATIONS[self.activation](x + y)


def _conv3x3(conv: partial[layers.Conv], stride: int, name: str) -> layers.Conv:
    """Returns a 3x3 convolution with a border of one zero on every side, as the paper pads."""
    if stride == 1:
        return conv(name=name)
    return conv(strides=(stride, stride), padding=((1, 1), (1, 1)), name=name)


def _shortcut(
    x: Array, shape: tuple[int, ...], stride: int, dtype: jnp.dtype, train: bool
) -> Array:
    """Adds `shortcut` and `shortcut_norm` to the calling module where x has another shape."""
    if x.shape == shape:
        return x
    strides = (stride, stride)
    x = convolution(shape[-1], kernel_size=(1, 1), strides=strides, dtype=dtype, name="shortcut")(x)
    return batch_norm(dtype=dtype, name="shortcut_norm")(x, not train)


class GlobalAveragePool(nn.Module):
    """The mean of each feature map."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch channels"]:
        """Returns the means over height and width."""
        return jnp.mean(x, axis=(1, 2))


def classify_means(
    x: Float[Array, "batch height width channels"],
    config: ModelConfig,
    n_classes: int,
    train: bool,
) -> Float[Array, "batch classes"]:
    """Adds `pool`, `dropout` if the config has it, and `head` to the calling module.

    Returns the logits, from the mean of each feature map.
    """
    x = GlobalAveragePool(name="pool")(x)
    if config.dropout:
        x = nn.Dropout(config.dropout, name="dropout")(x, deterministic=not train)
    return add_head(x, config, n_classes)


# With linen's default of 0.99 the running statistics would lag behind in runs of a few epochs.
batch_norm = partial(BatchNorm, momentum=0.9)
# Without a bias, since the BatchNorm that follows subtracts the mean.
convolution = partial(layers.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


def resnet_small(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns the network of section 4.2; He et al. have stages of 16, 32 and 64 filters."""
    check_fixed_settings(config)
    if not config.blocks:
        raise UserError("model.name=resnet_small needs model.blocks, such as [[16,16],[32,32]]")
    return ResNet(config, n_classes, config.blocks)


def resnet(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns the network of table 1 that `config.name` names, or one of widths `model.blocks`."""
    check_fixed_settings(config)
    blocks = config.blocks or WIDTHS[config.name]
    bottleneck = config.name == "resnet50"
    return ResNet(config, n_classes, blocks, for_photos=True, bottleneck=bottleneck)
