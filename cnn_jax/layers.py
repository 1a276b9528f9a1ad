"""The layers of the networks: flax's, with the activation, the dropout and fast kernels inside.

A layer returns its value after its activation (and dropout), so a value has the name of the layer
that made it. `kernels` decides what computes it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnn_jax import kernels
from cnn_jax.kernels import Padding, Pair

Initializer = nn.initializers.Initializer

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": kernels.rectify,
    "relu6": nn.relu6,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "gelu": partial(nn.gelu, approximate=False),
}


def _param(layer: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...]) -> Array:
    """Returns a parameter of a layer.

    Of one that exists already, flax traces the initializer to compare shapes. Zeros have the same
    shape, and are traced many times as fast as random numbers: a quarter of what a large network
    takes until its program is there.
    """
    exists = layer.has_variable("params", name)
    return layer.param(name, nn.initializers.zeros_init() if exists else initializer, shape)


class Conv(nn.Module):
    """A convolution of NHWC images and its activation.

    It has the parameters of nn.Conv: `kernel` [height, width, in, out] and `bias` [out].
    """

    features: int
    kernel_size: Pair = (3, 3)
    strides: Pair = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    activation: str | None = None
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width in"], pool: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns feature maps of `dtype`; `pool` is for `conv_then_pool`."""
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = _param(self, "kernel", self.kernel_init, shape).astype(self.dtype)
        bias = None
        if self.use_bias:
            bias = _param(self, "bias", self.bias_init, (self.features,)).astype(self.dtype)
        x, relu = inputs.astype(self.dtype), self.activation == "relu"
        y = kernels.convolve(x, kernel, bias, self.strides, self.padding, relu, pool)
        return y if relu or self.activation is None else ACTIVATIONS[self.activation](y)


class DepthwiseConv(nn.Module):
    """A convolution of each channel of NHWC images with its own kernel.

    It has the parameter of nn.Conv with as many groups as channels: `kernel` [height, width, 1,
    channels].
    """

    kernel_size: Pair = (3, 3)
    strides: Pair = (1, 1)
    padding: Padding = "SAME"
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Returns feature maps of `dtype`."""
        shape = (*self.kernel_size, 1, inputs.shape[-1])
        kernel = _param(self, "kernel", self.kernel_init, shape).astype(self.dtype)
        x = inputs.astype(self.dtype)
        return kernels.convolve_depthwise(x, kernel, self.strides, self.padding)


class Dense(nn.Module):
    """A dense layer, its activation and its dropout.

    It has the parameters of nn.Dense, `kernel` [in, out] and `bias` [out], and with dropout a
    submodule `dropout`.
    """

    features: int
    use_bias: bool = True
    activation: str | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch in"], train: bool = False
    ) -> Float[Array, "*batch out"]:
        """Returns values of `dtype`; `train` turns dropout on, which needs a "dropout" key."""
        shape = (inputs.shape[-1], self.features)
        kernel = _param(self, "kernel", self.kernel_init, shape)
        y = kernels.matmul(inputs.astype(self.dtype), kernel)
        if self.use_bias:
            bias = _param(self, "bias", self.bias_init, (self.features,)).astype(self.dtype)
            y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
        y = y if self.activation is None else ACTIVATIONS[self.activation](y)
        if self.dropout:
            y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
        return y


class MaxPool(nn.Module):
    """The maximum of each window and channel, by default of 2x2 windows that do not overlap."""

    window: Pair = (2, 2)
    strides: Pair = (2, 2)
    padding: Padding = "VALID"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width channels"], is_pooled: bool = False
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Returns the maxima; `is_pooled` is for `conv_then_pool`: the inputs are the maxima."""
        if is_pooled:
            return inputs
        return kernels.max_pool(inputs, self.window, self.strides, self.padding)


class AveragePool(nn.Module):
    """The mean of each 2x2 window and channel; an odd last row or column is left out."""

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Returns the means."""
        n, height, width, channels = inputs.shape
        rows, columns = height // 2, width // 2
        whole = inputs[:, : 2 * rows, : 2 * columns]
        return jnp.mean(whole.reshape(n, rows, 2, columns, 2, channels), axis=(2, 4))


def conv_then_pool(
    conv: Conv,
    pool: MaxPool | AveragePool,
    x: Float[Array, "batch height width in"],
    train: bool,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns `pool(conv(x))`, in training computed as one operation if the kernels have it.

    Then `conv` returns the pool's value, and `pool` passes it on: whoever intercepts modules finds
    the value of each in evaluation, and in training that of the pool alone.
    """
    if (
        train
        and isinstance(pool, MaxPool)
        and pool.window == pool.strides == (2, 2)
        and pool.padding == "VALID"
        and conv.activation in (None, "relu")
    ):
        return pool(conv(x, pool=True), is_pooled=True)
    return pool(conv(x))


def adaptive_average_pool(
    inputs: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch side side channels"]:
    """Returns the means of side x side windows that cover the inputs, as PyTorch's of that name.

    Window i of n pixels runs from floor(i n / side) to ceil((i + 1) n / side), so windows overlap
    or repeat pixels where `side` does not divide n.
    """
    for axis in (1, 2):
        n = inputs.shape[axis]
        if n == side:
            continue
        means = np.zeros((n, side), np.float32)
        for i in range(side):
            start, stop = i * n // side, -(-(i + 1) * n // side)
            means[start:stop, i] = 1 / (stop - start)
        pooled = jnp.tensordot(inputs, jnp.asarray(means, inputs.dtype), ((axis,), (0,)))
        inputs = jnp.moveaxis(pooled, -1, axis)
    return inputs
