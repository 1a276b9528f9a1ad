"""A residual network: He et al., "Deep Residual Learning for Image Recognition" (2015)."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import layers
from cnn_jax.config import ModelConfig
from cnn_jax.models.batch_norm import BatchNorm
from cnn_jax.models.checks import check_fixed_settings


class ResNet(nn.Module):
    """The CIFAR-10 network of section 4.2: `stem`, stages of residual blocks, `pool`, `head`.

    `model.blocks` holds one tuple for each stage and in it the width of each block. Every stage but
    the first begins by halving the height and width. Kernels of convolutions start as in He et al.,
    "Delving Deep into Rectifiers" (2015): normal with variance 2 / fan_in. The head's has variance
    1 / fan_in, as no ReLU follows it.
    """

    config: ModelConfig
    n_classes: int

    @property
    def last_block(self) -> str:
        """A regular expression for the name of the last stage."""
        return f"stage{len(self.config.blocks)}"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; with `train`, BatchNorm uses and records the batch's statistics."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = convolution(config.blocks[0][0], dtype=dtype, name="stem")(images)
        x = batch_norm(activation=config.activation, dtype=dtype, name="stem_norm")(x, not train)
        for i, widths in enumerate(config.blocks, start=1):
            stride = 1 if i == 1 else 2
            x = Stage(widths, stride, config.activation, dtype, name=f"stage{i}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return layers.Dense(self.n_classes, dtype=dtype, name="head")(x).astype(jnp.float32)


class Stage(nn.Module):
    """Residual blocks `block1`, `block2`, ... of one resolution; `stride` is the first block's."""

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
            x = ResidualBlock(width, stride, self.activation, self.dtype, name=f"block{i}")(
                x, train
            )
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
        strides = (self.stride, self.stride)
        y = conv(strides=strides, name="conv1")(x)
        y = norm(activation=self.activation, name="norm1")(y, not train)
        y = conv(name="conv2")(y)
        y = norm(name="norm2")(y, not train)
        if x.shape != y.shape:
            x = conv(kernel_size=(1, 1), strides=strides, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x, not train)
        return layers.ACTIVATIONS[self.activation](x + y)


class GlobalAveragePool(nn.Module):
    """The mean of each feature map."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch channels"]:
        """Returns the means over height and width."""
        return jnp.mean(x, axis=(1, 2))


# With linen's default of 0.99 the running statistics would lag behind in runs of a few epochs.
batch_norm = partial(BatchNorm, momentum=0.9)
# Without a bias, since the BatchNorm that follows subtracts the mean.
convolution = partial(layers.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


def resnet_small(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns the residual network of `model.blocks`; He et al. have 16, 32 and 64 filters."""
    check_fixed_settings(config)
    return ResNet(config, n_classes)
