"""The networks of airbench94 and airbench96.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), and its repository
KellerJordan/cifar10-airbench.
"""

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
from cnn_jax.models.initializers import fan_in_uniform, partial_identity


class Airbench(nn.Module):
    """A 2x2 convolution `whiten`, groups of 3x3 convolutions, a 3x3 max pool and a linear `head`.

    `whiten` has twice as many filters as a patch has numbers: it is meant to be set by
    `init.whiten` and then frozen.
    """

    config: ModelConfig
    n_classes: int
    residual: bool = False
    """Whether groups are those of airbench96."""

    @property
    def last_block(self) -> str:
        """A regular expression for the name of the last group."""
        return f"group{len(self.config.blocks)}"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits; with `train`, BatchNorm uses and records the batch's statistics."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        check_image_side(images, 3 * 2 ** len(config.blocks) + 1, config)
        patch = 2 * 2 * images.shape[-1]
        x = layers.Conv(
            2 * patch,
            kernel_size=(2, 2),
            padding="VALID",
            activation=config.activation,
            dtype=dtype,
            kernel_init=fan_in_uniform,
            bias_init=partial(fan_in_uniform, fan_in=patch),
            name="whiten",
        )(images)
        for i, widths in enumerate(config.blocks, start=1):
            group = Group(widths, config.activation, dtype, self.residual, name=f"group{i}")
            x = group(x, train)
        x = layers.MaxPool((3, 3), (3, 3), name="pool")(x)
        x = x.reshape((x.shape[0], -1))
        logits = add_head(x, config, self.n_classes, use_bias=False, kernel_init=fan_in_uniform)
        return logits if config.mean_head else logits / 9


class Group(nn.Module):
    """3x3 convolutions `conv1`, ..., each followed by a `norm1`, ...; `pool` follows `conv1`.

    With `residual`, the activations of the first convolution are added to the last norm, before
    its activation, and BatchNorm keeps 0.9 of its statistics instead of 0.6.
    """

    widths: tuple[int, ...]
    activation: str
    dtype: jnp.dtype
    residual: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns feature maps of half the height and width, rounded down."""
        conv = partial(layers.Conv, use_bias=False, dtype=self.dtype, kernel_init=partial_identity)
        norm = partial(
            BatchNorm,
            momentum=0.9 if self.residual else 0.6,
            epsilon=1e-12,
            use_scale=False,
            use_fast_variance=False,  # E[x^2] - E[x]^2 is too inexact for so small an epsilon.
            dtype=self.dtype,
        )
        first, last = x, len(self.widths) if self.residual else 0
        for i, width in enumerate(self.widths, start=1):
            if i == 1:
                pool = layers.MaxPool(name="pool")
                x = layers.conv_then_pool(conv(width, name="conv1"), pool, x, train)
            else:
                x = conv(width, name=f"conv{i}")(x)
            activation = None if i == last else self.activation
            x = norm(activation=activation, name=f"norm{i}")(x, use_running_average=not train)
            first = x if i == 1 else first
        return layers.ACTIVATIONS[self.activation](x + first) if last else x


def airbench(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns airbench94's network with the widths of `model.blocks`, one tuple per group."""
    check_fixed_settings(config)
    if config.dropout or not config.blocks:
        raise UserError(f"model.name={config.name} needs model.blocks, and has no dropout")
    return Airbench(config, n_classes)


def airbench_residual(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns airbench96's network with the widths of `model.blocks`, one tuple per group."""
    model = airbench(config, n_classes).clone(residual=True)
    if any(len(widths) < 2 or len(set(widths)) > 1 for widths in config.blocks):
        raise UserError(
            "model.name=airbench_residual needs two or more equal widths in each block of "
            "model.blocks, such as [[128,128,128],[384,384,384]]"
        )
    return model
