"""Convolutions for a CPU, forward and backward, with ReLU and a max pool if wanted.

XLA's CPU backend is quick at convolutions that read [batch, height, width, channels] and slow at
the gradients that autodiff derives: the gradient of the kernel becomes a convolution that takes the
batch for its channels, and inside a loop it is slower still. Here gradients are matrix products,
computed for a few images at a time, so that intermediate arrays stay in the cache. Read it in this
order:

1. `conv`, a convolution with any window, strides and pads.
2. `conv_1x1`, a product of matrices.
3. `conv_relu`, 3x3 with ReLU, for the few channels of a first layer.
4. `conv_relu_pool`, 3x3 with ReLU, a 2x2 max pool, or both, for more channels.
5. Winograd's minimal filtering, with which 1 and 4 compute 3x3 convolutions of stride 1 and 16 or
   more channels each way, and their gradients, with 2.25 times fewer multiplications.

All of them share the loop over the batch in chunks.py.

Images are NHWC, kernels HWIO; both have the same type, float32 or bfloat16. Sums are float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.kernels.bits import (
    from_bits,
    matmul,
    matmul_right,
    matmul_transposed,
    round_to,
    to_bits,
    transpose,
    transpose_and_widen,
    widen,
)
from cnn_jax.kernels.chunks import chunked
from cnn_jax.kernels.pool import Pads, Pair, first_maximum, pad, windows

Grid = Sequence[Sequence[Array]]
"""Rows and columns of arrays, all of one shape."""

Product = Callable[[Array, Array], Array]

NHWC = ("NHWC", "HWIO", "NHWC")

# A product with fewer rows than this is computed in float32, because that takes less time than to
# transpose so few columns of bfloat16.
_FEW_ROWS = 64
# Channels in and out for which a 1x1 convolution works on as many pixels at a time as others do.
_CHANNELS = 256
# Zeros around an image with which a 3x3 convolution keeps its size.
_SAME: Pads = ((1, 1), (1, 1))


# 1. Any convolution


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the convolution of images with a kernel."""
    if not suits_winograd(kernel.shape, strides):
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)
    return _convolve_tiles(x, _transform_kernel(kernel), kernel.shape[-1], pads)


def _conv_forward(
    x: Array, kernel: Array, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return conv(x, kernel, strides, pads), (x, kernel)


def _conv_backward(
    strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    size, winograd = dy.shape[1:3], suits_winograd(kernel.shape, strides)

    def multiply(x: Array, dy: Array) -> tuple[None, Any]:
        if winograd:
            return None, _transformed_kernel_gradient(x, pads, size, _to_quarters(dy))
        return None, _patches_times_gradient(x, dy, kernel.shape, strides, pads)

    def finish(total: Any) -> Array:
        return _to_kernel_gradient(total, kernel.shape[-1]) if winograd else total

    _, total = chunked(multiply, (x, dy), n_pixels=size[0] * size[1], finish=finish)
    dx = _input_gradient(dy, kernel, x.shape, strides, pads)
    return dx, round_to(total.reshape(kernel.shape), kernel.dtype)


conv.defvjp(_conv_forward, _conv_backward)


def _input_gradient(
    dy: Array, kernel: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Float[Array, "batch height width in"]:
    """Returns the convolution of dy, spread by the strides, with the rotated kernel."""
    dy = pad(dy, ((0, 0), (0, 0)), interior=(strides[0] - 1, strides[1] - 1))
    before = [kernel.shape[axis] - 1 - pads[axis][0] for axis in (0, 1)]
    after = [shape[axis + 1] + pads[axis][0] - dy.shape[axis + 1] for axis in (0, 1)]
    pads = ((before[0], after[0]), (before[1], after[1]))
    if suits_winograd(kernel.shape, (1, 1)):
        return _convolve_tiles(dy, _transform_rotated(kernel), kernel.shape[2], pads, matmul_right)
    return conv(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), (1, 1), pads)


def _patches_times_gradient(
    x: Array, dy: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Float[Array, "window_and_in out"]:
    """Returns the gradient of the kernel: the patches that the kernel was applied to, times dy."""
    if math.prod(shape[:3]) < _FEW_ROWS:
        x, dy = widen(x), widen(dy)
    places = windows(pad(x, pads), shape[:2], strides, dy.shape[1:3])
    return _contract_pixels(jnp.concatenate([a for row in places for a in row], axis=-1), dy)


def _contract_pixels(a: Array, b: Array) -> Float[Array, "a_channels b_channels"]:
    """Contracts batch, height and width as one axis: with several XLA would transpose copies."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if a.dtype == jnp.bfloat16:
        return _contract_transposed(transpose(a), b)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _contract_transposed(
    a: Float[Array, "a_channels pixels"], b: Array
) -> Float[Array, "a_channels b_channels"]:
    """Returns what `_contract_pixels` returns; a is transposed and may have fewer pixels than b."""
    return matmul(a, b.reshape(-1, b.shape[-1])[: a.shape[1]])


# 2. 1x1 convolutions


@jax.custom_vjp
def conv_1x1(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "1 1 in out"]
) -> Float[Array, "batch height width out"]:
    """Returns the convolution of images with a 1x1 kernel of stride 1: a product of matrices.

    Products of float32 are computed at once. Those of bfloat16 are fast where the result is
    float32, so some rows of pixels at a time are multiplied and rounded in the cache.
    """
    weights = kernel[0, 0]
    if x.dtype == jnp.float32:
        return matmul(x, weights)

    def multiply(x: Array, weights: Array) -> tuple[Array, None]:
        return round_to(matmul(x, weights), x.dtype), None

    return _over_rows(multiply, (x,), weights)[0]


def _conv_1x1_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv_1x1(x, kernel), (x, kernel)


def _conv_1x1_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals

    def multiply(x: Array, dy: Array, weights: Array) -> tuple[Array, Array]:
        flat = dy.reshape(-1, dy.shape[-1])
        dx = round_to(matmul_transposed(flat, weights), x.dtype).reshape(x.shape)
        if x.dtype == jnp.bfloat16 and x.shape[-1] > dy.shape[-1]:  # Transposes fewer numbers.
            return dx, lax.optimization_barrier(_contract_pixels(dy, x)).T
        return dx, _contract_pixels(x, dy)

    if x.dtype == jnp.float32:
        dx, dkernel = multiply(x, dy, kernel[0, 0])
    else:
        dx, dkernel = _over_rows(multiply, (x, dy), kernel[0, 0])
    return dx, round_to(dkernel.reshape(kernel.shape), kernel.dtype)


conv_1x1.defvjp(_conv_1x1_forward, _conv_1x1_backward)


def _over_rows(
    function: Callable[..., tuple[Any, Any]], batches: Sequence[Array], weights: Array
) -> tuple[Any, Any]:
    """Returns function(*batches, weights), computed for some rows of pixels at a time."""
    n, height, width, _ = batches[0].shape
    rows = [array.reshape(n * height, width, array.shape[-1]) for array in batches]
    n_pixels = max(1, width * sum(weights.shape) // _CHANNELS)
    joined, total = chunked(function, rows, weights, n_pixels=n_pixels)
    return joined.reshape(n, height, width, joined.shape[-1]), total


# 3. With ReLU, for few channels


@jax.custom_vjp
def conv_relu(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "3 3 in out"],
    bias: Float[Array, "out"] | None,
) -> Float[Array, "batch height width out"]:
    """Returns ReLU of the SAME convolution plus bias, computed for a few images at a time.

    It serves kernels that Winograd's filtering does not suit.
    """
    return _conv_relu_forward(x, kernel, bias)[0]


def _conv_relu_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    def convolve(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, None]:
        wide, wide_kernel = widen(x), widen(kernel)
        y = lax.conv_general_dilated(wide, wide_kernel, (1, 1), _SAME, dimension_numbers=NHWC)
        return round_to(jnp.maximum(_plus_bias(y, bias), 0), x.dtype), None

    # XLA's own convolution takes less time per image for several images than for one.
    y = chunked(convolve, (x,), kernel, bias, n_pixels=x.shape[1] * x.shape[2] // 8)[0]
    return y, (x, kernel, bias, y)


def _conv_relu_backward(
    residuals: tuple[Array, Array, Array | None, Array], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, y = residuals

    def multiply(x: Array, dy: Array, y: Array) -> tuple[None, Array]:
        dy = round_to(_relu_gradient(dy, y), x.dtype)
        patches = _transposed_patches(x)
        return None, _contract_transposed(*lax.optimization_barrier((patches, dy)))

    # The patches of a few channels take as much memory again, so an image counts twice.
    _, total = chunked(multiply, (x, dy, y), n_pixels=2 * x.shape[1] * x.shape[2])
    dy = round_to(_relu_gradient(dy, y), x.dtype)
    dx = _input_gradient(dy, kernel, x.shape, (1, 1), _SAME)
    return dx, *_split_gradients(total, kernel, bias)


conv_relu.defvjp(_conv_relu_forward, _conv_relu_backward)


def _transposed_patches(x: Array) -> Float[Array, "window_and_in_and_one pixels"]:
    """Returns the inputs of a SAME 3x3 kernel at each pixel, and a 1 that a bias is multiplied by.

    Pixels are transposed before they are put together: each once, not nine times.
    """
    n, height, width, channels = x.shape
    rows = from_bits(pad(to_bits(x), _SAME).reshape(-1, channels), x.dtype)
    planes = to_bits(transpose(rows)).reshape(channels, n, height + 2, width + 2)
    places = [planes[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = from_bits(jnp.stack(places).reshape(9 * channels, -1), x.dtype)
    return jnp.concatenate([patches, jnp.ones((1, patches.shape[1]), x.dtype)])


def _plus_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + widen(bias).reshape(1, 1, 1, -1)


def _relu_gradient(dy: Array, y: Array) -> Float[Array, "batch height width out"]:
    """Returns the float32 gradient of the inputs of ReLU, given that of its outputs y."""
    return jnp.where(widen(y) > 0, widen(dy), 0)


def _split_gradients(
    total: Float[Array, "window_and_in_and_one out"], kernel: Array, bias: Array | None
) -> tuple[Array, Array | None]:
    """Returns the gradients of kernel and bias, which have the shapes and types of the two."""
    dkernel = round_to(total[:-1].reshape(kernel.shape), kernel.dtype)
    return dkernel, None if bias is None else round_to(total[-1], bias.dtype)


# 4. With ReLU and a max pool

# The place of a window's maximum if ReLU stops the gradient, because the maximum is not above 0.
_STOPPED = 4


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_relu_pool(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "3 3 in out"],
    bias: Float[Array, "out"] | None,
    relu: bool,
    pool: bool,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the SAME convolution plus bias, after ReLU, a 2x2 max pool, or both.

    All of it is done for a few images before the next ones, forward and backward, where separate
    layers would each read and write the whole batch. It serves kernels that Winograd's filtering
    suits: its 2x2 output tiles are the windows of the pool.
    """
    return _conv_relu_pool_forward(x, kernel, bias, relu, pool)[0]


def _conv_relu_pool_forward(
    x: Array, kernel: Array, bias: Array | None, relu: bool, pool: bool
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    """Keeps for the gradient the places of the maxima or, with ReLU alone, y."""
    assert pool or relu
    size = x.shape[1:3]

    def convolve(x: Array, kernels: Grid, bias: Array | None) -> tuple[Any, None]:
        quarters = _multiply_tiles(_input_tiles(x, _SAME, size), kernels, kernel.shape[-1])
        quarters = jax.tree.map(lambda y: _plus_bias(y, bias), quarters)
        if not pool:
            quarters = jax.tree.map(lambda y: jnp.maximum(y, 0), quarters)
            return _from_quarters(quarters, size, x.dtype), None
        whole = [y[:, : size[0] // 2, : size[1] // 2] for row in quarters for y in row]
        largest, place = first_maximum(whole)
        if relu:
            place = jnp.where(largest > 0, place, jnp.uint8(_STOPPED))
            largest = jnp.maximum(largest, 0)
        return (round_to(largest, x.dtype), place), None

    kernels, n_pixels = _transform_kernel(kernel), size[0] * size[1]
    joined = chunked(convolve, (x,), kernels, bias, n_pixels=n_pixels)[0]
    y, kept = joined if pool else (joined, joined)
    return y, (x, kernel, bias, kept)


def _conv_relu_pool_backward(
    relu: bool, pool: bool, residuals: tuple[Array, Array, Array | None, Array], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, kept = residuals
    size = x.shape[1:3]

    def pool_gradient(dy: Array, place: Array) -> Grid:
        rest = [(0, n - m) for n, m in zip(_halves(size), dy.shape[1:3], strict=True)]
        dy, place = pad(widen(dy), rest), pad(place, rest)
        return [[jnp.where(place == 2 * i + j, dy, 0) for j in (0, 1)] for i in (0, 1)]

    def multiply(x: Array, dy: Array, kept: Array, kernels: Grid) -> tuple[Array, Any]:
        quarters = pool_gradient(dy, kept) if pool else _to_quarters(_relu_gradient(dy, kept))
        dbias = sum(jnp.sum(part, axis=(0, 1, 2)) for row in quarters for part in row)
        dkernel = _transformed_kernel_gradient(x, _SAME, size, quarters)
        tiles = _tiles_of_quarters(quarters, x.dtype)
        dx = _multiply_tiles(tiles, kernels, x.shape[-1], matmul_right)
        dx = _from_quarters(dx, size, x.dtype)
        return dx, (dkernel, dbias)

    def finish(total: tuple[Grid, Array]) -> Array:
        return jnp.concatenate([_to_kernel_gradient(total[0], kernel.shape[-1]), total[1][None]])

    kernels, n_pixels = _transform_rotated(kernel), size[0] * size[1]
    dx, total = chunked(multiply, (x, dy, kept), kernels, n_pixels=n_pixels, finish=finish)
    return dx, *_split_gradients(total, kernel, bias)


conv_relu_pool.defvjp(_conv_relu_pool_forward, _conv_relu_pool_backward)


# 5. Winograd's minimal filtering
#
# F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), makes a
# 2x2 tile of the output from a 4x4 tile of the input; neighbouring input tiles overlap by two
# pixels. Input tiles and kernel are each transformed to 4x4 numbers, these are multiplied, summed
# over the input channels and transformed to the output tile: 16 products for 4 pixels instead of
# 36. The gradient of the kernel goes the same way backwards: the output's gradient and the input
# tiles are transformed, multiplied and summed over the pixels, and the sum is transformed to 3x3.
#
# An image of 2x2 tiles is kept as its "quarters", a 2x2 grid of arrays [batch, rows, columns,
# channels]: the pixels of even rows and even columns, of even rows and odd columns, and so on.
# Transformed tiles are a 4x4 grid of such arrays.

# The matrices of equation 10.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

# Height and width from which on images of bfloat16 are transposed, and not their tiles: for smaller
# ones the products with pixels at which no tile begins take longer than that saves.
_TRANSPOSED_SIDE = 32


def suits_winograd(kernel_shape: Sequence[int], strides: Pair) -> bool:
    """Returns whether Winograd's filtering is faster; for few channels its transforms cost more."""
    return tuple(kernel_shape[:2]) == (3, 3) and strides == (1, 1) and min(kernel_shape[2:]) >= 16


def _transform_kernel(kernel: Array) -> Grid:
    """Returns the transformed kernel: a 4x4 grid of [in, out], out padded for the products."""
    return _transform(_KERNEL, list(_pad_channels(kernel)), kernel.dtype)


def _transform_rotated(kernel: Array) -> Grid:
    """Returns the transformed kernel of the inputs' gradient, a 4x4 grid of [in, out].

    That kernel is rotated by 180 degrees, which exchanges the first and the last transformed row
    and column, and its inputs and outputs are swapped: `matmul_right` reads it so. To rotate and
    transpose the kernel itself takes longer than all products of 8 images of 7x7x512.
    """
    grid, order = _transform(_KERNEL, list(kernel), kernel.dtype), (3, 1, 2, 0)
    return [[grid[i][j] for j in order] for i in order]


def _convolve_tiles(
    x: Array, kernels: Grid, n_out: int, pads: Pads, product: Product = matmul
) -> Float[Array, "batch height width out"]:
    """Returns the convolution with a transformed 3x3 kernel, of n_out channels."""
    size = tuple(x.shape[axis + 1] + sum(pads[axis]) - 2 for axis in (0, 1))

    def convolve(x: Array, kernels: Grid) -> tuple[Array, None]:
        quarters = _multiply_tiles(_input_tiles(x, pads, size), kernels, n_out, product)
        return _from_quarters(quarters, size, x.dtype), None

    return chunked(convolve, (x,), kernels, n_pixels=size[0] * size[1])[0]


def _pad_channels(x: Array) -> Array:
    """Adds channels of zeros up to a multiple of 16, which fill the AVX-512 registers of a product.

    Products of 64 columns take less time than those of 50.
    """
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % 16)))


def _input_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Grid:
    """Returns the transformed tiles of x, from which an output of `size` pixels is computed."""
    padded = _pad_for_tiles(widen(x), pads, size)
    return _transform(_INPUT, windows(padded, (4, 4), (2, 2), _halves(size)), x.dtype)


def _pad_for_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Array:
    (top, bottom), (left, right) = pads
    return pad(x, ((top, bottom + size[0] % 2), (left, right + size[1] % 2)))


def _multiply_tiles(tiles: Grid, kernels: Grid, n_out: int, product: Product = matmul) -> Grid:
    """Returns the float32 quarters of the convolution, of n_out channels.

    The barrier keeps XLA from computing the tiles again inside each product.
    """
    products = jax.tree.map(product, lax.optimization_barrier(tiles), kernels)
    products = jax.tree.map(lambda product: product[..., :n_out], products)
    return _transform(_OUTPUT, products, jnp.float32)


def _from_quarters(quarters: Grid, size: Sequence[int], dtype: Any) -> Array:
    """Returns the image [batch, *size, channels] of float32 quarters, rounded to `dtype`."""
    (a, b), (c, d) = jax.tree.map(lambda quarter: to_bits(round_to(quarter, dtype)), quarters)
    y = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
    n, rows, _, columns, _, channels = y.shape
    y = y.reshape(n, 2 * rows, 2 * columns, channels)[:, : size[0], : size[1]]
    return from_bits(y, dtype)


def _to_quarters(dy: Array) -> Grid:
    """Returns the float32 quarters of dy; those of an odd height or width end with zeros.

    Rows are padded also where that is not necessary: without it XLA would slice dy again, number by
    number, for each of the 16 transformed gradients.
    """
    height, width = dy.shape[1:3]
    padded = pad(widen(dy), ((0, 2 - height % 2), (0, width % 2)))
    return windows(padded, (2, 2), (2, 2), _halves((height, width)))


def _tiles_of_quarters(quarters: Grid, dtype: Any) -> Grid:
    """Returns `_input_tiles` of the image of these quarters, for `_SAME` pads."""
    padded = jax.tree.map(lambda quarter: pad(quarter, _SAME), quarters)
    _, rows, columns, _ = quarters[0][0].shape

    def place(i: int, j: int) -> Array:
        quarter = padded[(i + 1) % 2][(j + 1) % 2]
        top, left = (i + 1) // 2, (j + 1) // 2
        return quarter[:, top : top + rows, left : left + columns]

    grid = [[place(i, j) for j in range(4)] for i in range(4)]
    return _transform(_INPUT, grid, dtype)


def _transformed_kernel_gradient(
    x: Array, pads: Pads, size: Sequence[int], quarters: Grid
) -> list[list[Float[Array, "in out"]]]:
    """Returns the gradient of the transformed kernel, given the quarters of the output's."""
    transposed = x.dtype == jnp.bfloat16 and min(size) >= _TRANSPOSED_SIDE
    if transposed:  # Zeros for the pixels at which no tile begins.
        quarters = jax.tree.map(lambda quarter: pad(quarter, ((0, 1), (0, 1))), quarters)
    quarters = jax.tree.map(_pad_channels, quarters)
    gradients = _transform(_transpose_matrix(_OUTPUT), quarters, x.dtype)
    tiles = (_transposed_tiles if transposed else _input_tiles)(x, pads, size)
    multiply = _contract_transposed if transposed else _contract_pixels
    return jax.tree.map(multiply, *lax.optimization_barrier((tiles, gradients)))


def _transposed_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Grid:
    """Returns `_input_tiles` of bfloat16 images, transposed: a 4x4 grid of [channels, pixels].

    Each pixel of x is transposed once, where a transposition of tiles would read it four times. The
    pixels are those of a quarter of the padded image, [batch, rows + 1, columns + 1] flattened, and
    a tile is found at its first pixel. So the places in a tile are the same pixels, shifted by a
    constant. The pixels of the last row and column, at which no tile begins, get meaningless
    numbers, and those after the last tile are left out.
    """
    bits = _pad_for_tiles(to_bits(x), pads, size)

    def transposed_quarter(i: int, j: int) -> Array:
        quarter = bits[:, i::2, j::2]
        return transpose_and_widen(from_bits(quarter.reshape(-1, quarter.shape[-1]), x.dtype))

    quarters = [[transposed_quarter(i, j) for j in (0, 1)] for i in (0, 1)]
    quarters = lax.optimization_barrier(quarters)
    rows, columns = _halves(size)
    down, last = columns + 1, len(x) * (rows + 1) * (columns + 1) - columns - 2

    def place(i: int, j: int) -> Array:
        start = i // 2 * down + j // 2
        return quarters[i % 2][j % 2][:, start : start + last]

    return _transform(_INPUT, [[place(i, j) for j in range(4)] for i in range(4)], x.dtype)


def _to_kernel_gradient(total: Grid, n_out: int) -> Float[Array, "window_and_in out"]:
    """Returns the gradient of the kernel, given that of the transformed kernel."""
    gradient = jnp.array(_transform(_transpose_matrix(_KERNEL), total, jnp.float32))
    return gradient.reshape(-1, gradient.shape[-1])[:, :n_out]


def _halves(size: Sequence[int]) -> Pair:
    """Returns the numbers of 2x2 tiles along the height and width, the last ones incomplete."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _transpose_matrix(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return list(zip(*matrix, strict=True))


def _transform(
    matrix: Sequence[Sequence[float]], grid: Grid | Sequence[Array], dtype: Any
) -> list[list[Array]]:
    """Returns matrix @ grid @ matrix.T for a grid of arrays, computed in float32."""
    half = [[_combine(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[round_to(_combine(row, line), dtype) for row in matrix] for line in half]


def _combine(factors: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Returns the sum of factor * array, without multiplying by 0 or 1."""
    pairs = [(f, widen(a)) for f, a in zip(factors, arrays, strict=True) if f]
    terms = [a if f == 1 else f * a for f, a in pairs]
    return sum(terms[1:], start=terms[0])


# The gradient of a bias without ReLU


@jax.custom_vjp
def add_bias(
    x: Float[Array, "batch height width channels"], bias: Float[Array, "channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns x + bias, both bfloat16; the gradient of the bias is summed in float32.

    XLA turns a sum of bfloat16 into a reduce-window, which runs on one core.
    """
    return x + bias.reshape(1, 1, 1, -1)


def _add_bias_backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy, axis=(0, 1, 2))


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)
