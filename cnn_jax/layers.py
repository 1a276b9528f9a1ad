"""Convolution and max pooling whose gradients run fast on a CPU, also inside lax.scan.

XLA's CPU backend is quick at convolutions that read [batch, height, width, channels] and slow at
what autodiff makes of them: the filter gradient becomes a convolution with the batch as its
channels, the gradient of max pooling a serial scatter, and inside a loop both are slower still.
Here they are written as what is quick anywhere: matrix products and elementwise selection, a few
images at a time, so that what lies between them stays in the cache. A 3x3 convolution and both of
its gradients also take 2.25 times fewer multiplications, by Winograd's minimal filtering.

On other platforms all functions are XLA's own, cuDNN included.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from cnn_jax import devices

Padding = str | Sequence[tuple[int, int]]
Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
"""(low, high) of height and of width."""
Grid = Any
"""Arrays of one shape in rows and columns: Sequence[Sequence[Array]], or one stacked array."""

_NHWC = ("NHWC", "HWIO", "NHWC")

# Output pixels worked on at a time: what is computed from them should fit into a core's cache and
# still give matrices large enough to multiply at full speed.
_CHUNK_PIXELS = 1024

# F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), eq. 10:
# from 4x4 tiles of the input that overlap by two pixels, 2x2 tiles of the output.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

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

    On a CPU the case whose shapes stand above is fast, forward and in reverse mode (it has no
    forward mode): NHWC images, HWIO kernel, one group, no dilation. Anything else goes to lax.
    Sums are float32, so results differ from lax's by rounding alone.
    """
    fast = (
        lhs.ndim == 4
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and {*(lhs_dilation or ()), *(rhs_dilation or ())} <= {1}
        and all(value in (None, 1) for value in others.values())
    )
    if fast and on_cpu():
        strides = (window_strides[0], window_strides[1])
        return _conv(lhs, rhs, strides, _to_pads(padding, lhs.shape, rhs.shape[:2], strides))
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


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, strides: Pair, pads: Pads) -> Array:
    if _suits_winograd(kernel.shape, strides):
        return _winograd(x, kernel, pads)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_NHWC)


def _conv_forward(
    x: Array, kernel: Array, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, strides, pads), (x, kernel)


def _conv_backward(
    strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = _input_gradient(dy, kernel, x.shape, strides, pads)
    if _suits_winograd(kernel.shape, strides):
        return dx, _winograd_kernel_gradient(x, dy, pads)
    return dx, _kernel_gradient(x, dy, kernel.shape, strides, pads)


_conv.defvjp(_conv_forward, _conv_backward)


def _input_gradient(
    dy: Array, kernel: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Array:
    """Convolves dy, its pixels spread out by the strides, with the kernel turned by 180 degrees."""
    dy = _pad(dy, ((0, 0), (0, 0)), interior=(strides[0] - 1, strides[1] - 1))
    before = [kernel.shape[axis] - 1 - pads[axis][0] for axis in (0, 1)]
    after = [shape[axis + 1] + pads[axis][0] - dy.shape[axis + 1] for axis in (0, 1)]
    full = (before[0], after[0]), (before[1], after[1])
    return _conv(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), (1, 1), full)


def _kernel_gradient(x: Array, dy: Array, shape: Sequence[int], strides: Pair, pads: Pads) -> Array:
    """Multiplies the patches that the kernel saw with dy."""

    def multiply(x: Array, dy: Array) -> Array:
        windows = _windows(_pad(x, pads), shape[:2], strides, dy.shape[1:3])
        patches = jnp.concatenate([window for row in windows for window in row], axis=-1)
        return _sum_over_pixels(patches, dy)

    return _sum_over_chunks(multiply, x, dy).reshape(shape).astype(x.dtype)


def _suits_winograd(kernel_shape: Sequence[int], strides: Pair) -> bool:
    """With few channels the transformations cost more than they save."""
    return tuple(kernel_shape[:2]) == (3, 3) and strides == (1, 1) and min(kernel_shape[2:]) >= 16


def _winograd(x: Array, kernel: Array, pads: Pads) -> Array:
    """Returns the 3x3 convolution of stride 1.

    The barrier keeps XLA from computing the tiles anew inside each product.
    """
    height, width = (x.shape[axis + 1] + sum(pads[axis]) - 2 for axis in (0, 1))
    n_out = kernel.shape[-1]
    # Products of a multiple of 16 columns are much faster: 16 float32 fill an AVX-512 register.
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -n_out % 16)))
    kernels = _transform(_KERNEL, list(kernel), x.dtype)
    multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def convolve(x: Array, kernels: Grid) -> Array:
        tiles = _input_tiles(x, pads, (height, width), x.dtype)
        products = jax.tree.map(multiply, lax.optimization_barrier(tiles), kernels)
        products = jax.tree.map(lambda product: product[..., :n_out], products)
        (a, b), (c, d) = _transform(_OUTPUT, products, x.dtype)
        y = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
        n, rows, _, columns, _, channels = y.shape
        y = y.reshape(n, 2 * rows, 2 * columns, channels)[:, :height, :width]
        return _to_bits(y)

    def convolve_all(x: Array, kernels: Grid) -> Array:
        n = _chunk_size(len(x), height * width)

        def turn(i: Array, y: Array) -> Array:
            part = convolve(_chunk(x, i, n), kernels)
            return lax.dynamic_update_slice_in_dim(y, part, i * n, axis=0)

        like = jax.eval_shape(convolve, x[:n], kernels)
        y = jnp.zeros((len(x), *like.shape[1:]), like.dtype)
        return lax.bitcast_convert_type(lax.fori_loop(0, len(x) // n, turn, y), x.dtype)

    return devices.per_device(convolve_all, (x,), kernels)


def _winograd_kernel_gradient(x: Array, dy: Array, pads: Pads) -> Array:
    """Returns the 3x3 kernel's gradient: the same products, transposed."""
    size = dy.shape[1:3]

    def multiply(x: Array, dy: Array) -> Grid:
        # Rows are padded also where it need not be: without it XLA would slice dy anew, number by
        # number, for each of the 16 transformed gradients.
        padded = _pad(dy, ((0, 2 - size[0] % 2), (0, size[1] % 2)))
        quarters = _windows(padded, (2, 2), (2, 2), _halves(size))
        gradients = _transform(_transpose(_OUTPUT), quarters, dy.dtype)
        tiles = _input_tiles(x, pads, size, x.dtype)
        return jax.tree.map(_sum_over_pixels, *lax.optimization_barrier((tiles, gradients)))

    total = _sum_over_chunks(multiply, x, dy)
    return jnp.array(_transform(_transpose(_KERNEL), total, x.dtype))


def _input_tiles(x: Array, pads: Pads, size: Sequence[int], dtype: Any) -> list[list[Array]]:
    """Returns the transformed 4x4 tiles of x: a 4x4 grid of [batch, rows, columns, channels]."""
    (top, bottom), (left, right) = pads
    x = _pad(x, ((top, bottom + size[0] % 2), (left, right + size[1] % 2)))
    return _transform(_INPUT, _windows(x, (4, 4), (2, 2), _halves(size)), dtype)


def _halves(size: Sequence[int]) -> Pair:
    return -(-size[0] // 2), -(-size[1] // 2)


def _transpose(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return list(zip(*matrix, strict=True))


def _transform(matrix: Sequence[Sequence[float]], grid: Grid, dtype: Any) -> list[list[Array]]:
    """Returns matrix @ grid @ matrix.T for a grid of arrays, computed in float32."""
    half = [[_combine(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[_combine(row, line).astype(dtype) for row in matrix] for line in half]


def _combine(factors: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Returns the sum of factor * array, without multiplying by 0 or 1."""
    pairs = [(f, a.astype(jnp.float32)) for f, a in zip(factors, arrays, strict=True) if f]
    terms = [a if f == 1 else f * a for f, a in pairs]
    return sum(terms[1:], start=terms[0])


def _sum_over_pixels(a: Array, b: Array) -> Float[Array, "a_channels b_channels"]:
    """Contracts batch, height and width, flattened first: of more axes XLA transposes copies."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _sum_over_chunks(function: Callable[[Array, Array], Any], x: Array, dy: Array) -> Any:
    """Returns the sum of function(x, dy), a tree, over chunks of the batch."""

    def sum_all(x: Array, dy: Array) -> Any:
        n = _chunk_size(len(x), dy.shape[1] * dy.shape[2])
        like = jax.eval_shape(function, x[:n], dy[:n])
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

        def add(i: Array, total: Any) -> Any:
            part = function(_chunk(x, i, n), _chunk(dy, i, n))
            return jax.tree.map(jnp.add, total, part)

        return lax.fori_loop(0, len(x) // n, add, zeros)

    return devices.per_device(sum_all, (x, dy), total=True)


def _chunk_size(n_images: int, n_pixels: int) -> int:
    """Returns the images of a loop's turn, a divisor of all; an image has `n_pixels` outputs."""
    limit = max(1, min(n_images, _CHUNK_PIXELS // n_pixels))
    return next(n for n in range(limit, 0, -1) if n_images % n == 0)


def _chunk(batch: Array, i: Array, n: int) -> Array:
    """Returns the n images of turn i. As scan's slices the images would be copied before it."""
    part = lax.dynamic_slice_in_dim(_to_bits(batch), i * n, n)
    return lax.bitcast_convert_type(part, batch.dtype)


def _to_bits(x: Array) -> Array:
    """Returns bfloat16 as uint16, to be moved or selected; other types as they are.

    XLA's CPU backend would convert it to float32 and back, even all of an array to move a part, so
    that a loop's time would grow with the square of the batch.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _pad(x: Array, pads: Pads, value: float = 0.0, interior: Pair = (0, 0)) -> Array:
    """Pads height and width; less than nothing crops."""
    spread = [(*pad, between) for pad, between in zip(pads, interior, strict=True)]
    return lax.pad(x, jnp.array(value, x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])


def _windows(x: Array, window: Sequence[int], strides: Pair, size: Sequence[int]) -> Grid:
    """Returns, for each place in a window, what all `size` windows have there.

    x is padded already. The grid is the window's; its elements are [batch, *size, channels].
    """
    last = [(n - 1) * stride + 1 for n, stride in zip(size, strides, strict=True)]

    def place(i: int, j: int) -> Array:
        stop = (x.shape[0], i + last[0], j + last[1], x.shape[3])
        return lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1))

    return [[place(i, j) for j in range(window[1])] for i in range(window[0])]


def apply_if(wanted: Bool[Array, ""], function: Callable[[Any], Any], state: Any) -> Any:
    """Returns `function(state)` where `wanted`, else `state`, a tree of arrays.

    A loop of one turn or none, because on a CPU a loop waits for all that it reads. Without it XLA
    finds parts of the state, such as a kernel that the backward pass still reads, not yet free to
    be overwritten, and copies them first: all of fc1 and fc2 in every step of vgg1.
    """
    return lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, value: function(value), state)


def dot_general(
    lhs: Float[Array, "*batch in"],
    rhs: Float[Array, "in out"],
    dimension_numbers: Any,
    **others: Any,
) -> Float[Array, "*batch out"]:
    """Does what lax.dot_general does, for `nn.Dense(dot_general=...)`.

    On a CPU the products of a bfloat16 layer, also in its gradients, are float32 and then rounded:
    XLA takes twice as long for products that are bfloat16, and for transposed ones eight times.
    """
    dense = (((lhs.ndim - 1,), (0,)), ((), ()))
    if lhs.dtype == rhs.dtype == jnp.bfloat16 and dimension_numbers == dense and on_cpu():
        return _dense(lhs.reshape(-1, lhs.shape[-1]), rhs).reshape(*lhs.shape[:-1], rhs.shape[1])
    return lax.dot_general(lhs, rhs, dimension_numbers, **others)


@jax.custom_vjp
def _dense(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _dense_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    multiply = partial(lax.dot_general, preferred_element_type=jnp.float32)
    dx = multiply(dy, kernel, (((1,), (1,)), ((), ())))
    dkernel = multiply(x, dy, (((0,), (0,)), ((), ())))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_dense.defvjp(lambda x, kernel: (_dense(x, kernel), (x, kernel)), _dense_backward)


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
        self, inputs: Float[Array, "batch height width in"]
    ) -> Float[Array, "batch new_height new_width out"]:
        """Returns feature maps of `dtype`."""
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x, kernel = inputs.astype(self.dtype), kernel.astype(self.dtype)
        y = conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=_NHWC)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            y = add_bias(y, bias.astype(self.dtype))
        return y


def add_bias(
    x: Float[Array, "batch height width channels"], bias: Float[Array, "channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns x + bias; on a CPU, a bfloat16 bias has a gradient that is summed in float32.

    XLA makes of a sum of bfloat16 a reduce-window that runs on one core.
    """
    if x.dtype == bias.dtype == jnp.bfloat16 and on_cpu():
        return _add_bias(x, bias)
    return x + bias.reshape(1, 1, 1, -1)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.reshape(1, 1, 1, -1)


def _add_bias_backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy, axis=(0, 1, 2))


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


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
    if inputs.ndim != 4 or not on_cpu():
        return nn.max_pool(inputs, window_shape, strides, padding)  # pyright: ignore
    window = (window_shape[0], window_shape[1])
    steps = (strides[0], strides[1]) if strides else (1, 1)
    return _max_pool(inputs, window, steps, _to_pads(padding, inputs.shape, window, steps))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    return _max_pool_forward(x, window, strides, pads)[0]


def _max_pool_forward(
    x: Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the maxima, and the places in the window where they came from."""
    x_padded = _pad(x, pads, value=-jnp.inf)
    size = [(x_padded.shape[axis + 1] - window[axis]) // strides[axis] + 1 for axis in (0, 1)]
    grid = _windows(x_padded, window, strides, size)
    largest, *rest = (values for row in grid for values in row)
    place = jnp.zeros(largest.shape, jnp.uint8)
    for i, values in enumerate(rest, start=1):
        place = jnp.where(values > largest, jnp.uint8(i), place)
        largest = jnp.maximum(largest, values)
    return largest, (place, jnp.zeros((0, *x.shape[1:3]), x.dtype))


def _max_pool_backward(
    window: Pair, strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array]:
    """Adds up, for each place in the window, dy where the maximum came from there."""
    place, like_x = residuals
    if strides == window and pads == ((0, 0), (0, 0)):
        return (_spread_over_windows(place, dy, window, like_x.shape[1:]),)
    between = (strides[0] - 1, strides[1] - 1)
    span = [(dy.shape[axis + 1] - 1) * strides[axis] + 1 for axis in (0, 1)]
    dx = []
    for i in range(window[0]):
        for j in range(window[1]):
            before = i - pads[0][0], j - pads[1][0]
            after = [like_x.shape[axis + 1] - before[axis] - span[axis] for axis in (0, 1)]
            part = jnp.where(place == i * window[1] + j, dy, jnp.zeros((), dy.dtype))
            dx.append(_pad(part, ((before[0], after[0]), (before[1], after[1])), interior=between))
    return (sum(dx[1:], start=dx[0]),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _spread_over_windows(place: Array, dy: Array, window: Pair, size: Sequence[int]) -> Array:
    """Returns dx where windows do not overlap: dy at the place of the maximum, 0 elsewhere."""
    n, rows, columns, channels = dy.shape
    places = jnp.arange(window[0] * window[1], dtype=place.dtype)
    chosen = place.reshape(n, rows, 1, columns, 1, channels) == places.reshape(
        1, 1, window[0], 1, window[1], 1
    )
    bits = _to_bits(dy).reshape(n, rows, 1, columns, 1, channels)
    dx = lax.bitcast_convert_type(jnp.where(chosen, bits, jnp.zeros((), bits.dtype)), dy.dtype)
    dx = dx.reshape(n, rows * window[0], columns * window[1], channels)
    return _pad(dx, ((0, size[0] - dx.shape[1]), (0, size[1] - dx.shape[2])))


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
