"""EfficientNet-Lite: Tan and Le, "EfficientNet: Rethinking Model Scaling" (2019), made for phones.

The Lite networks, of the TensorFlow authors, leave out squeeze-and-excitation and use ReLU6.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import layers
from cnn_jax.config import ModelConfig
from cnn_jax.models.batch_norm import BatchNorm
from cnn_jax.models.checks import check_fixed_settings, check_image_side
from cnn_jax.models.resnet import classify_means, convolution

STEM, TOP = 32, 1280
"""Filters of the first and of the last convolution, the same in all Lite networks."""


class Stage(NamedTuple):
    """A row of the paper's table 1."""

    width: int
    repeats: int
    kernel: int
    stride: int
    """Of the first block."""
    expansion: int
    """The factor by which a block widens its input before the depthwise convolution."""


STAGES = (
    Stage(16, 1, 3, 1, 1),
    Stage(24, 2, 3, 2, 6),
    Stage(40, 2, 5, 2, 6),
    Stage(80, 3, 3, 2, 6),
    Stage(112, 3, 5, 1, 6),
    Stage(192, 4, 5, 2, 6),
    Stage(320, 1, 3, 1, 6),
)
_FACTORS = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1)}
_FACTORS["efficientnet_lite2"] = (1.1, 1.2)


def widths(name: str) -> tuple[tuple[int, ...], ...]:
    """Returns the width of each block of a Lite network, a tuple for each stage.

    Widths are scaled to the nearest multiple of 8 that is not more than a tenth too small, depths
    are rounded up; the Lite networks leave the depth of the first and the last stage as it is.
    """
    wider, deeper = _FACTORS[name]

    def scaled(index: int, stage: Stage) -> tuple[int, ...]:
        exact = stage.width * wider
        width = max(8, int(exact + 4) // 8 * 8)
        width += 8 if width < 0.9 * exact else 0
        inner = 0 < index < len(STAGES) - 1
        return (width,) * (math.ceil(stage.repeats * deeper) if inner else stage.repeats)

    return tuple(scaled(index, stage) for index, stage in enumerate(STAGES))


class EfficientNet(nn.Module):
    """A 3x3 convolution `stem`, seven stages of inverted residuals, a 1x1 `top`, `pool`, `head`.

    `model.blocks` holds one tuple for each stage and in it the width of each block.
    """

    config: ModelConfig
    n_classes: int
    blocks: tuple[tuple[int, ...], ...]

    @property
    def last_block(self) -> str:
        """A regular expression for the names of the last stage and of what follows it."""
        return rf"stage{len(self.blocks)}|top|top_norm"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; `train` turns dropout and the batch's own statistics on."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        check_image_side(images, 32, config)
        conv = partial(convolution, dtype=dtype)
        norm = partial(batch_norm, activation="relu6", dtype=dtype)
        x = conv(STEM, strides=(2, 2), name="stem")(images)
        x = norm(name="stem_norm")(x, not train)
        for i, (stage, block_widths) in enumerate(zip(STAGES, self.blocks, strict=True), start=1):
            x = InvertedStage(stage, block_widths, dtype, name=f"stage{i}")(x, train)
        x = conv(TOP, kernel_size=(1, 1), name="top")(x)
        x = norm(name="top_norm")(x, not train)
        return classify_means(x, config, self.n_classes, train)


class InvertedStage(nn.Module):
    """Blocks `block1`, `block2`, ... of one kernel size; the first has the stage's stride."""

    stage: Stage
    widths: Sequence[int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns the last block's feature maps; height and width are divided by the stride."""
        for i, width in enumerate(self.widths, start=1):
            stage = self.stage if i == 1 else self.stage._replace(stride=1)
            x = InvertedBlock(stage, width, self.dtype, name=f"block{i}")(x, train)
        return x


class InvertedBlock(nn.Module):
    """A 1x1 convolution that widens, a depthwise one, and a 1x1 one that narrows, without ReLU.

    The block's input is added to the result where the two have the same shape (Sandler et al.,
    "MobileNetV2", 2018). With an expansion of 1 there is no widening convolution.
    """

    stage: Stage
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns x + project_norm(project(depthwise(expand(x)))), with norms and ReLU6 between."""
        kernel, stride, expansion = self.stage.kernel, self.stage.stride, self.stage.expansion
        conv = partial(convolution, kernel_size=(1, 1), dtype=self.dtype)
        norm = partial(batch_norm, dtype=self.dtype)
        inputs = x
        if expansion > 1:
            x = conv(x.shape[-1] * expansion, name="expand")(x)
            x = norm(activation="relu6", name="expand_norm")(x, not train)
        x = layers.DepthwiseConv(
            kernel_size=(kernel, kernel),
            strides=(stride, stride),
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            name="depthwise",
        )(x)
        x = norm(activation="relu6", name="depthwise_norm")(x, not train)
        x = conv(self.width, name="project")(x)
        x = norm(name="project_norm")(x, not train)
        return inputs + x if inputs.shape == x.shape else x


# TensorFlow's epsilon, to which the trained weights belong; of the momentum see `resnet`.
batch_norm = partial(BatchNorm, momentum=0.9, epsilon=1e-3)


def efficientnet(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns the network that `config.name` names, or one of the widths of `model.blocks`."""
    check_fixed_settings(config, activation=True)
    blocks = config.blocks or widths(config.name)
    return EfficientNet(config, n_classes, blocks)
