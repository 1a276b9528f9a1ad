"""The layers of the networks: as flax's and lax's, but fast in training on a CPU too.

There they are made of `cpu_kernels`. On other platforms all are XLA's own, cuDNN included.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from cnn_jax import cpu_kernels, devices
from cnn_jax.cpu_kernels import Pads, Pair

Padding = str | Sequence[tuple[int, int]]
_portable = contextvars.ContextVar("portable", default=False)


def on_cpu() -> bool:
    """The one place where the platform decides; asked when a function is traced."""
    return jax.default_backend() == "cpu" and not _portable.get()


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside the block, functions are traced to what runs on every platform, of any batch size."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def conv_general_dilated(
    lhs: Float[Array, "batch height width in"],
    rhs: Float[Array, "kernel_height kernel_width in out"],
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **others: Any,
) -> Float[Array, "batch new_height new_width out"]:
    """Does what lax.conv_general_dilated does, for `nn.Conv(conv_general_dilated=...)`.

    On a CPU the case whose shapes stand above is fast, forward and in reverse mode: NHWC images,
    HWIO kernel, one group, no dilation, float32 or bfloat16. It has no forward mode, and second
    derivatives in float32 alone. Anything else goes to lax. Sums are float32, so results differ
    from lax's by rounding alone.
    """
    fast = (
        lhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.bfloat16)
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, cpu_kernels.NHWC)
        and {*(lhs_dilation or ()), *(rhs_dilation or ())} <= {1}
        and all(value in (None, 1) for value in others.values())
    )
    if fast and on_cpu():
        strides = (window_strides[0], window_strides[1])
        return cpu_kernels.conv(
            lhs, rhs, strides, _to_pads(padding, lhs.shape, rhs.shape[:2], strides)
        )
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        **others,
    )


def _to_pads(padding: Padding, shape: Sequence[int], window: Sequence[int], strides: Pair) -> Pads:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(shape[1:3], window, strides, padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def apply_if(wanted: Bool[Array, ""], function: Callable[[Any], Any], state: Any) -> Any:
    """Returns `function(state)` where `wanted`, else `state`, a tree of arrays.

    A loop of one turn or none, because on a CPU a loop waits for all that it reads. Without it XLA
    finds parts of the state, such as a kernel that the backward pass still reads, not yet free to
    be overwritten, and copies them first: all of fc1 and fc2 in every step of vgg1.
    """
    return lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, value: function(value), state)


class Dense(nn.Module):
    """The dense layer of nn.Dense, with its parameters `kernel` and `bias`."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns products of `dtype`."""
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = dense(inputs.astype(self.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
            y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def dense(
    x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]
) -> Float[Array, "*batch out"]:
    """Returns the product with the kernel, rounded to the type of x.

    On a CPU the kernel's gradient of bfloat16 products stays float32, where autodiff would round it
    to bfloat16 and then convert it: of a large kernel each of these takes as long as the product.
    """
    if x.dtype == jnp.bfloat16 and on_cpu():
        product = cpu_kernels.dense(x.reshape(-1, x.shape[-1]), kernel)
        return product.reshape(*x.shape[:-1], kernel.shape[1])
    divided = on_cpu() and devices.is_divided(kernel.shape)
    x = devices.spread(x, axis=x.ndim - 1) if divided else x
    y = lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    return devices.spread(y) if divided else y


class Conv(nn.Module):
    """The convolution of nn.Conv, with its parameters `kernel` and `bias`, for NHWC images."""

    features: int
    kernel_size: Pair = (3, 3)
    strides: Pair = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width in"], relu: bool = False, pool: bool = False
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns feature maps of `dtype`; if wanted, past ReLU, and then past MaxPool()."""
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        x = inputs.astype(self.dtype)
        return conv_relu_pool(x, kernel, bias, self.strides, self.padding, relu, pool)


def conv_relu_pool(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    bias: Float[Array, "out"] | None = None,
    strides: Pair = (1, 1),
    padding: Padding = "SAME",
    relu: bool = False,
    pool: bool = False,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the convolution plus bias; if wanted, past ReLU, and then past a 2x2 max pool.

    On a CPU, training takes less time and memory for this than for each on its own. Results are the
    same up to the rounding of sums.
    """
    if kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == "SAME" and on_cpu():
        suits_winograd = cpu_kernels.suits_winograd(kernel.shape, strides)
        if suits_winograd and (relu or pool):
            return cpu_kernels.conv_relu_pool(x, kernel, bias, relu, pool)
        if relu and not pool:
            return cpu_kernels.conv_relu(x, kernel, bias)
    y = conv_general_dilated(x, kernel, strides, padding, dimension_numbers=cpu_kernels.NHWC)
    y = y if bias is None else add_bias(y, bias)
    y = nn.relu(y) if relu else y
    return max_pool(y, (2, 2), (2, 2)) if pool else y


def add_bias(
    x: Float[Array, "batch height width channels"], bias: Float[Array, "channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns x + bias; on a CPU, a bfloat16 bias has a gradient that is summed in float32.

    XLA makes of a sum of bfloat16 a reduce-window that runs on one core.
    """
    if x.dtype == bias.dtype == jnp.bfloat16 and on_cpu():
        return cpu_kernels.add_bias(x, bias)
    return x + bias.reshape(1, 1, 1, -1)


def max_pool(
    inputs: Float[Array, "batch height width channels"],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "batch new_height new_width channels"]:
    """Does what nn.max_pool does; like there, strides are 1 unless given.

    Where several inputs of a window are its maximum, the first in row-major order gets the whole
    gradient. So does XLA's own, which means that results do not depend on the platform.
    """
    if inputs.ndim != 4 or not jnp.issubdtype(inputs.dtype, jnp.floating) or not on_cpu():
        return nn.max_pool(inputs, window_shape, strides, padding)  # pyright: ignore
    window = (window_shape[0], window_shape[1])
    steps = (strides[0], strides[1]) if strides else (1, 1)
    return cpu_kernels.max_pool(
        inputs, window, steps, _to_pads(padding, inputs.shape, window, steps)
    )


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


def average_pool(
    inputs: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the means of windows of side x side that do not overlap, VALID as nn.avg_pool."""
    n, height, width, channels = inputs.shape
    rows, columns = height // side, width // side
    whole = inputs[:, : rows * side, : columns * side]
    return jnp.mean(whole.reshape(n, rows, side, columns, side, channels), axis=(2, 4))


class AveragePool(nn.Module):
    """average_pool of 2x2 as a module, so that it has a name in a summary."""

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Returns the mean of each window and channel."""
        return average_pool(inputs, 2)


class MaxPool(nn.Module):
    """max_pool as a module, so that it has a name in a summary."""

    window: Pair = (2, 2)
    strides: Pair = (2, 2)
    padding: Padding = "VALID"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Returns the largest input of each window and channel."""
        return max_pool(inputs, self.window, self.strides, self.padding)
