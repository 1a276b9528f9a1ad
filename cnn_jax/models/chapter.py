"""The chapter's networks, `SimpleCNN` and `VGG`, and VGG16, which is a larger VGG."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import layers
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models.checks import check_dense, check_image_side
from cnn_jax.models.head import add_head
from cnn_jax.models.initializers import INITIALIZERS


class SimpleCNN(nn.Module):
    """Listing 6-1: 3x3 convolutions, one 2x2 pool, hidden dense layers, and the linear head."""

    config: ModelConfig
    n_classes: int

    last_block = r"conv\d+|fc\d+"
    """A regular expression for the names of the only block and the hidden dense layers."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; `train` turns dropout on, which needs a "dropout" key."""
        x = images.astype(self.config.dtype)
        x = convolve_and_pool(x, self.config.blocks[0], self.config, train)
        return classify(x, self.config, self.n_classes, train)


class VGGBlock(nn.Module):
    """3x3 convolutions `conv1`, `conv2`, ... of one resolution, then a 2x2 pool."""

    config: ModelConfig
    widths: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns feature maps of half the height and width (see `convolve_and_pool`)."""
        return convolve_and_pool(x, self.widths, self.config, train)


class VGG(nn.Module):
    """Listings 6-11 to 6-14: blocks of 3x3 convolutions, then dense layers with dropout.

    After Simonyan and Zisserman, "Very Deep Convolutional Networks" (2015).
    """

    config: ModelConfig
    n_classes: int
    grid: int = 0
    """Side that the last feature maps are averaged to before the dense layers; 0: no averaging."""

    @property
    def last_block(self) -> str:
        """A regular expression for the names of the last block and the hidden dense layers."""
        return rf"block{len(self.config.blocks)}|fc\d+"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; `train` turns dropout on, which needs a "dropout" key."""
        check_image_side(images, 2 ** len(self.config.blocks), self.config)
        x = images.astype(self.config.dtype)
        for i, widths in enumerate(self.config.blocks, start=1):
            x = VGGBlock(self.config, widths, name=f"block{i}")(x, train)
        if self.grid:
            x = layers.adaptive_average_pool(x, self.grid)
        return classify(x, self.config, self.n_classes, train)


def convolve_and_pool(
    x: Float[Array, "batch height width channels"],
    widths: tuple[int, ...],
    config: ModelConfig,
    train: bool,
) -> Float[Array, "batch new_height new_width out"]:
    """Adds the layers `conv1`, `conv2`, ..., `pool` to the module that calls this function.

    Height and width are halved: rounded down by a pool; rounded up by `model.pooling=stride`, where
    the last convolution has a stride of 2 and no pool follows.
    """
    conv = partial(
        layers.Conv,
        activation=config.activation,
        kernel_init=INITIALIZERS[config.initializer],
        dtype=jnp.dtype(config.dtype),
    )
    for i, width in enumerate(widths[:-1], start=1):
        x = conv(width, name=f"conv{i}")(x)
    last = partial(conv, widths[-1], name=f"conv{len(widths)}")
    if config.pooling == "stride":
        return last(strides=(2, 2))(x)
    pool = {"max": layers.MaxPool, "average": layers.AveragePool}[config.pooling]
    return layers.conv_then_pool(last(), pool(name="pool"), x, train)


def classify(
    x: Float[Array, "batch height width channels"],
    config: ModelConfig,
    n_classes: int,
    train: bool,
) -> Float[Array, "batch classes"]:
    """Adds `fc1`, `fc2`, ... and the linear `head` to the calling module, and returns the logits.

    Dropout, where the config has it, follows each hidden layer and is a part of it.
    """
    hidden = partial(
        layers.Dense,
        activation=config.activation,
        dropout=config.dropout,
        kernel_init=INITIALIZERS[config.initializer],
        dtype=jnp.dtype(config.dtype),
    )
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate(config.dense, start=1):
        x = hidden(width, name=f"fc{i}")(x, train)
    return add_head(x, config, n_classes, kernel_init=INITIALIZERS[config.initializer])


def simple_cnn(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns listing 6-1's network with the convolutions of the only block of `model.blocks`."""
    check_dense(config)
    if len(config.blocks) != 1:
        raise UserError("model.name=simple_cnn has one block; use model.name=vgg for more")
    return SimpleCNN(config, n_classes)


def vgg(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns a VGG with the convolutions of `model.blocks` and the layers of `model.dense`."""
    check_dense(config)
    if not config.blocks:
        raise UserError("model.name=vgg needs model.blocks, such as [[64,64],[128,128]]")
    return VGG(config, n_classes)


def vgg16(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns VGG16 as in torchvision: 13 convolutions, averages on a 7x7 grid, fc1, fc2, head.

    Because of the averages, images may have any size from 32x32 on, not only 224x224.
    """
    if (*map(len, config.blocks), len(config.dense)) != (2, 2, 3, 3, 3, 2):
        raise UserError(
            "model.name=vgg16 has blocks of 2, 2, 3, 3 and 3 convolutions and two dense layers"
        )
    return VGG(config, n_classes, grid=7)
