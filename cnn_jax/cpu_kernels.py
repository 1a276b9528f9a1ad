"""Convolution, max pooling and dense products whose gradients run fast on a CPU, also in lax.scan.

XLA's CPU backend is quick at convolutions that read [batch, height, width, channels] and slow at
what autodiff makes of them: the filter gradient becomes a convolution with the batch as its
channels, the gradient of max pooling a serial scatter, and inside a loop both are slower still.
Here they are written as what is quick anywhere: matrix products and elementwise selection, in
convolutions a few images at a time, so that what lies between them stays in the cache. A 3x3
convolution of stride 1 and 16 or more channels each way takes, as do its gradients, 2.25 times
fewer multiplications, by Winograd's minimal filtering.

Images are NHWC and kernels HWIO. `layers` chooses between these functions and XLA's own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax import devices

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
"""(low, high) of height and of width."""
Grid = Any
"""Arrays of one shape in rows and columns: Sequence[Sequence[Array]], or one stacked array."""

NHWC = ("NHWC", "HWIO", "NHWC")

# Output pixels worked on at a time: what is computed from them should fit into a core's cache and
# still give matrices large enough to multiply at full speed. Of bfloat16 twice as many do.
_CHUNK_PIXELS = 1024

# Rows of a dense kernel worked on at a time, for the same reasons.
_CHUNK_ROWS = 512

# F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), eq. 10:
# from 4x4 tiles of the input that overlap by two pixels, 2x2 tiles of the output.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

# Zeros around an image for a 3x3 convolution to keep its size.
_SAME: Pads = ((1, 1), (1, 1))
# Of a product with the identity matrix: more cost more multiplications, fewer more products.
_IDENTITY_COLUMNS = 64
# Height and width from which on images are transposed, and not their tiles: of smaller ones the
# products with pixels that begin no tile take longer than that saves.
_TRANSPOSED_SIDE = 32
# Stands for a place in a window where ReLU stops the gradient: its maximum is not above 0.
_DEAD = 4


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the convolution; sums are float32."""
    if not suits_winograd(kernel.shape, strides):
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)
    size = tuple(x.shape[axis + 1] + sum(pads[axis]) - 2 for axis in (0, 1))

    def convolve(x: Array, kernels: Grid) -> tuple[Array, None]:
        tiles = _input_tiles(x, pads, size)
        return _join(_multiply_tiles(tiles, kernels, kernel.shape[-1]), size, x.dtype), None

    return _in_turns(convolve, (x,), _transformed(kernel), n_pixels=size[0] * size[1])[0]


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
            return None, _sum_tiles(x, pads, size, _quarters(dy))
        return None, _sum_patches(x, dy, kernel.shape, strides, pads)

    def finish(total: Any) -> Array:
        return _from_tiles(total, kernel.shape[-1]) if winograd else total

    _, total = _in_turns(multiply, (x, dy), n_pixels=size[0] * size[1], finish=finish)
    dx = _input_gradient(dy, kernel, x.shape, strides, pads)
    return dx, _round(total.reshape(kernel.shape), kernel.dtype)


conv.defvjp(_conv_forward, _conv_backward)


def _input_gradient(
    dy: Array, kernel: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Array:
    """Convolves dy, its pixels spread out by the strides, with the turned kernel."""
    dy = _pad(dy, ((0, 0), (0, 0)), interior=(strides[0] - 1, strides[1] - 1))
    before = [kernel.shape[axis] - 1 - pads[axis][0] for axis in (0, 1)]
    after = [shape[axis + 1] + pads[axis][0] - dy.shape[axis + 1] for axis in (0, 1)]
    return conv(dy, _turn(kernel), (1, 1), ((before[0], after[0]), (before[1], after[1])))


def _turn(kernel: Array) -> Array:
    """Turns a kernel by 180 degrees, and from its outputs to its inputs."""
    return jnp.swapaxes(kernel[::-1, ::-1], 2, 3)


def _sum_patches(
    x: Array, dy: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Float[Array, "window_and_in out"]:
    """Multiplies the patches that the kernel saw with dy."""
    if math.prod(shape[:3]) < _IDENTITY_COLUMNS:
        x, dy = _widen(x), _widen(dy)  # Faster than to transpose so few columns of bfloat16.
    places = _windows(_pad(x, pads), shape[:2], strides, dy.shape[1:3])
    return _sum_over_pixels(jnp.concatenate([a for row in places for a in row], axis=-1), dy)


def _transposed_patches(x: Array) -> Float[Array, "window_and_in_and_one pixels"]:
    """Returns what a SAME 3x3 kernel saw of each pixel, and a 1, by which a bias is multiplied.

    Pixels are transposed before they are put together: each once, not nine times.
    """
    n, height, width, channels = x.shape
    rows = _from_bits(_pad(_to_bits(x), _SAME).reshape(-1, channels), x.dtype)
    planes = _to_bits(_transposed(rows)).reshape(channels, n, height + 2, width + 2)
    seen = [planes[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = _from_bits(jnp.stack(seen).reshape(9 * channels, -1), x.dtype)
    return jnp.concatenate([patches, jnp.ones((1, patches.shape[1]), x.dtype)])


def suits_winograd(kernel_shape: Sequence[int], strides: Pair) -> bool:
    """Says whether Winograd's is the faster way: of few channels its transformations cost more."""
    return tuple(kernel_shape[:2]) == (3, 3) and strides == (1, 1) and min(kernel_shape[2:]) >= 16


@jax.custom_vjp
def conv_relu(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "3 3 in out"],
    bias: Float[Array, "out"] | None,
) -> Float[Array, "batch height width out"]:
    """Returns the SAME convolution, bias added, past ReLU: all of it to some images at a time.

    For a kernel that does not suits_winograd.
    """
    return _conv_relu_forward(x, kernel, bias)[0]


def _conv_relu_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    def run(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, None]:
        wide, wide_kernel = _widen(x), _widen(kernel)
        y = lax.conv_general_dilated(wide, wide_kernel, (1, 1), _SAME, dimension_numbers=NHWC)
        return _round(jnp.maximum(_plus(y, bias), 0), x.dtype), None

    # XLA's own convolution takes less time for several images than for one.
    y = _in_turns(run, (x,), kernel, bias, n_pixels=x.shape[1] * x.shape[2] // 8)[0]
    return y, (x, kernel, bias, y)


def _conv_relu_backward(
    residuals: tuple[Array, Array, Array | None, Array], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, y = residuals

    def run(x: Array, dy: Array, y: Array) -> tuple[None, Array]:
        dy = _round(_before_relu(dy, y), x.dtype)
        return None, _sum_transposed(*lax.optimization_barrier((_transposed_patches(x), dy)))

    # Of a few channels the patches take as much room again.
    _, total = _in_turns(run, (x, dy, y), n_pixels=2 * x.shape[1] * x.shape[2])
    dy = _round(_before_relu(dy, y), x.dtype)
    dx = _input_gradient(dy, kernel, x.shape, (1, 1), _SAME)
    return dx, *_to_gradients(total, kernel, bias)


conv_relu.defvjp(_conv_relu_forward, _conv_relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_relu_pool(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "3 3 in out"],
    bias: Float[Array, "out"] | None,
    relu: bool,
    pool: bool,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the SAME convolution, bias added, past ReLU, past a 2x2 max pool, or past both.

    All of it is done to some images before the next ones, forward and backward, where separate
    layers would each read and write all. For a kernel that suits_winograd: its 2x2 tiles are the
    pool's windows.
    """
    return _conv_relu_pool_forward(x, kernel, bias, relu, pool)[0]


def _conv_relu_pool_forward(
    x: Array, kernel: Array, bias: Array | None, relu: bool, pool: bool
) -> tuple[Array, tuple[Array, Array, Array | None, Array]]:
    """Returns also what the gradient needs: the places of the maxima or, for ReLU alone, y."""
    assert pool or relu
    size = x.shape[1:3]

    def run(x: Array, kernels: Grid, bias: Array | None) -> tuple[Any, None]:
        quarters = _multiply_tiles(_input_tiles(x, _SAME, size), kernels, kernel.shape[-1])
        quarters = jax.tree.map(lambda y: _plus(y, bias), quarters)
        if not pool:
            return _join(jax.tree.map(lambda y: jnp.maximum(y, 0), quarters), size, x.dtype), None
        whole = [y[:, : size[0] // 2, : size[1] // 2] for row in quarters for y in row]
        largest, place = _largest(whole)
        if relu:
            place = jnp.where(largest > 0, place, jnp.uint8(_DEAD))
            largest = jnp.maximum(largest, 0)
        return (_round(largest, x.dtype), place), None

    n_pixels = size[0] * size[1]
    joined = _in_turns(run, (x,), _transformed(kernel), bias, n_pixels=n_pixels)[0]
    y, kept = joined if pool else (joined, joined)
    return y, (x, kernel, bias, kept)


def _conv_relu_pool_backward(
    relu: bool, pool: bool, residuals: tuple[Array, Array, Array | None, Array], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, kept = residuals
    size = x.shape[1:3]

    def before_pool(dy: Array, place: Array) -> Grid:
        rest = [(0, n - m) for n, m in zip(_halves(size), dy.shape[1:3], strict=True)]
        dy, place = _pad(_widen(dy), rest), _pad(place, rest)
        return [[jnp.where(place == 2 * i + j, dy, 0) for j in (0, 1)] for i in (0, 1)]

    def run(x: Array, dy: Array, kept: Array, kernels: Grid) -> tuple[Array, Any]:
        quarters = before_pool(dy, kept) if pool else _quarters(_before_relu(dy, kept))
        dbias = sum(jnp.sum(part, axis=(0, 1, 2)) for row in quarters for part in row)
        dkernel = _sum_tiles(x, _SAME, size, quarters)
        tiles = _tiles_of_quarters(quarters, x.dtype)
        dx = _join(_multiply_tiles(tiles, kernels, x.shape[-1]), size, x.dtype)
        return dx, (dkernel, dbias)

    def finish(total: tuple[Grid, Array]) -> Array:
        return jnp.concatenate([_from_tiles(total[0], kernel.shape[-1]), total[1][None]])

    kernels, n_pixels = _transformed(_turn(kernel)), size[0] * size[1]
    dx, total = _in_turns(run, (x, dy, kept), kernels, n_pixels=n_pixels, finish=finish)
    return dx, *_to_gradients(total, kernel, bias)


conv_relu_pool.defvjp(_conv_relu_pool_forward, _conv_relu_pool_backward)


def _plus(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + _widen(bias).reshape(1, 1, 1, -1)


def _before_relu(dy: Array, y: Array) -> Array:
    """Returns the float32 gradient of what went into ReLU, which made y of it."""
    return jnp.where(_widen(y) > 0, _widen(dy), 0)


def _transformed(kernel: Array) -> Grid:
    """Returns what tiles are multiplied with, a 4x4 grid of [in, out]."""
    return _transform(_KERNEL, list(_pad_channels(kernel)), kernel.dtype)


def _pad_channels(x: Array) -> Array:
    """Adds channels of zeros up to a multiple of 16, which fill the AVX-512 registers of a product.

    Products of 64 columns take less time than those of 50.
    """
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % 16)))


def _input_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Grid:
    """Returns the transformed 4x4 tiles of x: a 4x4 grid of [batch, rows, columns, channels]."""
    padded = _pad_for_tiles(_widen(x), pads, size)
    return _transform(_INPUT, _windows(padded, (4, 4), (2, 2), _halves(size)), x.dtype)


def _pad_for_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Array:
    (top, bottom), (left, right) = pads
    return _pad(x, ((top, bottom + size[0] % 2), (left, right + size[1] % 2)))


def _transposed_tiles(x: Array, pads: Pads, size: Sequence[int]) -> Grid:
    """Returns `_input_tiles` of bfloat16, transposed: a 4x4 grid of [channels, pixels].

    Each pixel of x is transposed once, where a transposition of tiles would read it four times. A
    tile lies at its first pixel in a quarter of the padded image, at [batch, rows + 1, columns + 1]
    flattened: so every place in a tile is the same pixels a step further. Those of the last row and
    column, which begin no tile, hold numbers of no meaning; after the last tile they are left out.
    """
    bits = _pad_for_tiles(_to_bits(x), pads, size)

    def transpose(i: int, j: int) -> Array:
        quarter = bits[:, i::2, j::2]
        return _wide_transposed(_from_bits(quarter.reshape(-1, quarter.shape[-1]), x.dtype))

    quarters = lax.optimization_barrier([[transpose(i, j) for j in (0, 1)] for i in (0, 1)])
    rows, columns = _halves(size)
    down, last = columns + 1, len(x) * (rows + 1) * (columns + 1) - columns - 2

    def place(i: int, j: int) -> Array:
        start = i // 2 * down + j // 2
        return quarters[i % 2][j % 2][:, start : start + last]

    return _transform(_INPUT, [[place(i, j) for j in range(4)] for i in range(4)], x.dtype)


def _tiles_of_quarters(quarters: Grid, dtype: Any) -> Grid:
    """Returns `_input_tiles` of an image of which the quarters are given, with `_SAME` pads."""
    padded = jax.tree.map(lambda quarter: _pad(quarter, _SAME), quarters)
    _, rows, columns, _ = quarters[0][0].shape

    def place(i: int, j: int) -> Array:
        quarter = padded[(i + 1) % 2][(j + 1) % 2]
        top, left = (i + 1) // 2, (j + 1) // 2
        return quarter[:, top : top + rows, left : left + columns]

    grid = [[place(i, j) for j in range(4)] for i in range(4)]
    return _transform(_INPUT, grid, dtype)


def _multiply_tiles(tiles: Grid, kernels: Grid, n_out: int) -> Grid:
    """Returns the convolution's 2x2 tiles: a 2x2 grid of float32 [batch, rows, columns, n_out].

    The barrier keeps XLA from computing the tiles anew inside each product.
    """
    products = jax.tree.map(_matmul, lax.optimization_barrier(tiles), kernels)
    products = jax.tree.map(lambda product: product[..., :n_out], products)
    return _transform(_OUTPUT, products, jnp.float32)


def _join(quarters: Grid, size: Sequence[int], dtype: Any) -> Array:
    """Returns the image of which the 2x2 tiles are given in float32."""
    (a, b), (c, d) = jax.tree.map(lambda quarter: _to_bits(_round(quarter, dtype)), quarters)
    y = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
    n, rows, _, columns, _, channels = y.shape
    y = y.reshape(n, 2 * rows, 2 * columns, channels)[:, : size[0], : size[1]]
    return _from_bits(y, dtype)


def _quarters(dy: Array) -> Grid:
    """Returns the 2x2 tiles of dy; of odd sides the last ones end with zeros.

    Rows are padded also where it need not be: without it XLA would slice dy anew, number by number,
    for each of the 16 transformed gradients.
    """
    height, width = dy.shape[1:3]
    padded = _pad(_widen(dy), ((0, 2 - height % 2), (0, width % 2)))
    return _windows(padded, (2, 2), (2, 2), _halves((height, width)))


def _sum_tiles(x: Array, pads: Pads, size: Sequence[int], quarters: Grid) -> Grid:
    """Returns the transformed kernel's gradient: the products, transposed."""
    transposed = x.dtype == jnp.bfloat16 and min(size) >= _TRANSPOSED_SIDE
    if transposed:  # Zeros for the pixels that begin no tile.
        quarters = jax.tree.map(lambda quarter: _pad(quarter, ((0, 1), (0, 1))), quarters)
    quarters = jax.tree.map(_pad_channels, quarters)
    gradients = _transform(_transpose(_OUTPUT), quarters, x.dtype)
    tiles = (_transposed_tiles if transposed else _input_tiles)(x, pads, size)
    multiply = _sum_transposed if transposed else _sum_over_pixels
    return jax.tree.map(multiply, *lax.optimization_barrier((tiles, gradients)))


def _from_tiles(total: Grid, n_out: int) -> Float[Array, "window_and_in out"]:
    """Returns the kernel's gradient, given the transformed one."""
    gradient = jnp.array(_transform(_transpose(_KERNEL), total, jnp.float32))
    return gradient.reshape(-1, gradient.shape[-1])[:, :n_out]


def _to_gradients(
    total: Float[Array, "window_and_in_and_one out"], kernel: Array, bias: Array | None
) -> tuple[Array, Array | None]:
    """Returns those of kernel and bias, which are of their types."""
    dkernel = _round(total[:-1].reshape(kernel.shape), kernel.dtype)
    return dkernel, None if bias is None else _round(total[-1], bias.dtype)


def _halves(size: Sequence[int]) -> Pair:
    return -(-size[0] // 2), -(-size[1] // 2)


def _transpose(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return list(zip(*matrix, strict=True))


def _transform(matrix: Sequence[Sequence[float]], grid: Grid, dtype: Any) -> list[list[Array]]:
    """Returns matrix @ grid @ matrix.T for a grid of arrays, computed in float32."""
    half = [[_combine(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[_round(_combine(row, line), dtype) for row in matrix] for line in half]


def _combine(factors: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Returns the sum of factor * array, without multiplying by 0 or 1."""
    pairs = [(f, _widen(a)) for f, a in zip(factors, arrays, strict=True) if f]
    terms = [a if f == 1 else f * a for f, a in pairs]
    return sum(terms[1:], start=terms[0])


def _sum_over_pixels(a: Array, b: Array) -> Float[Array, "a_channels b_channels"]:
    """Contracts batch, height and width, flattened first: of more axes XLA transposes copies."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if a.dtype == jnp.bfloat16:
        return _sum_transposed(_transposed(a), b)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _sum_transposed(a: Array, b: Array) -> Float[Array, "a_channels b_channels"]:
    """Does what `_sum_over_pixels` does, given a [channels, pixels], which may end before b."""
    return _matmul(a, b.reshape(-1, b.shape[-1])[: a.shape[1]])


def _matmul(a: Array, b: Array) -> Array:
    """Returns a @ b, whose sums are float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _matmul_transposed(a: Array, b: Array) -> Array:
    """Returns a @ b.T, whose sums are float32, without transposing b first."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed(a: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Returns a.T of a's type, computed before what follows, and not inside it."""
    return lax.optimization_barrier(_round(_wide_transposed(a), a.dtype))


def _wide_transposed(a: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Returns a.T as float32, of bfloat16 by products with the identity matrix.

    They take a fraction of the time of XLA's transposition. And that is needed: XLA has fast
    bfloat16 products, but not of a left side that is yet to be transposed. It converts both to
    float32, and takes four times as long. A right side is transposed as it is read.
    """
    if a.dtype != jnp.bfloat16:
        return a.T
    columns = a.shape[1]
    parts = [a[:, i : i + _IDENTITY_COLUMNS] for i in range(0, columns, _IDENTITY_COLUMNS)]
    products = [_matmul_transposed(jnp.eye(part.shape[1], dtype=a.dtype), part) for part in parts]
    return jnp.concatenate(products)


def _in_turns(
    function: Callable[..., tuple[Any, Any]],
    batches: Sequence[Any],
    *whole: Any,
    n_pixels: int,
    finish: Callable[[Any], Any] = lambda total: total,
) -> tuple[Any, Any]:
    """Returns function(*batches, *whole), worked out for a few images at a time.

    The function returns two trees: arrays that have a row for each image, which are joined, and
    others, which are summed. An image counts as `n_pixels` of a turn's. Each device's sums become
    finish(sums) before they are added up: devices wait for each other at every array.
    """

    def run(*args: Any) -> tuple[Any, Any]:
        batches, whole = args[: len(args) - n_whole], args[len(args) - n_whole :]
        n_images = len(batches[0])
        n = _chunk_size(n_images, n_pixels * batches[0].dtype.itemsize // 4)

        def part(i: Any) -> tuple[Any, Any]:
            return function(*(_slice(batch, i * n, n) for batch in batches), *whole)

        def turn(i: Array, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
            rows, terms = part(i)
            joined, total = so_far
            joined = jax.tree.map(partial(_write, i * n), joined, rows)
            return joined, jax.tree.map(jnp.add, total, terms)

        def room(rows: Any) -> Array:
            return _to_bits(jnp.zeros((n_images, *rows.shape[1:]), rows.dtype))

        rows, terms = jax.eval_shape(part, 0)
        start = jax.tree.map(room, rows), jax.tree.map(jnp.zeros_like, terms)
        joined, total = lax.fori_loop(0, n_images // n, turn, start)
        joined = jax.tree.map(lambda a, like: _from_bits(a, like.dtype), joined, rows)
        return joined, finish(total)

    n_whole = len(whole)
    in_axes = (0,) * len(batches) + (None,) * n_whole
    return devices.by_shares(run, in_axes, (0, None))(*batches, *whole)


def _chunk_size(n_images: int, n_pixels: int) -> int:
    """Returns the images of a loop's turn, a divisor of all; an image counts as `n_pixels`."""
    limit = max(1, min(n_images, _CHUNK_PIXELS // max(n_pixels, 1)))
    return next(n for n in range(limit, 0, -1) if n_images % n == 0)


def _slice(x: Array, start: Any, n: int, axis: int = 0) -> Array:
    """Returns n rows, or columns, of x. As scan's slices they would be copied before it."""
    return _from_bits(lax.dynamic_slice_in_dim(_to_bits(x), start, n, axis), x.dtype)


def _write(start: Any, bits: Array, rows: Array) -> Array:
    """Returns bits with the rows' from `start` on."""
    return lax.dynamic_update_slice_in_dim(bits, _to_bits(rows), start, axis=0)


def _widen(x: Array) -> Array:
    """Returns x as float32; bfloat16 is the upper half of its bits.

    XLA's CPU backend takes three to five times as long for a conversion from or to bfloat16 as for
    a few operations on integers, of which LLVM makes vector instructions.
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return lax.bitcast_convert_type(_to_bits(x).astype(jnp.uint32) << 16, jnp.float32)


def _round(x: Array, dtype: Any) -> Array:
    """Returns float32 as `dtype`, rounded to nearest, ties to even, as a conversion does it."""
    if dtype != jnp.bfloat16 or x.dtype == dtype:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
    upper = jnp.where(x == x, (bits + half) >> 16, jnp.uint32(0x7FC0))  # which is NaN
    return _from_bits(upper.astype(jnp.uint16), dtype)


def _to_bits(x: Array) -> Array:
    """Returns bfloat16 as uint16, to be moved or selected; other types as they are.

    XLA's CPU backend would convert it to float32 and back, even all of an array to move a part, so
    that a loop's time would grow with the square of the batch.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: Array, dtype: Any) -> Array:
    """Returns what `_to_bits` was given. A cast, even to the same type, has the derivative 0."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _pad(x: Array, pads: Sequence[Pair], value: float = 0.0, interior: Pair = (0, 0)) -> Array:
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


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(
    x: Float[Array, "batch height width channels"], window: Pair, strides: Pair, pads: Pads
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the largest input of each window and channel; the first of equals gets dy."""
    return _max_pool_forward(x, window, strides, pads)[0]


def _max_pool_forward(
    x: Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the maxima, and the places in the window where they came from."""
    x_padded = _pad(x, pads, value=-jnp.inf)
    size = [(x_padded.shape[axis + 1] - window[axis]) // strides[axis] + 1 for axis in (0, 1)]
    grid = _windows(x_padded, window, strides, size)
    largest, place = _largest([values for row in grid for values in row])
    return largest, (place, jnp.zeros((0, *x.shape[1:3]), x.dtype))


def _largest(arrays: Sequence[Array]) -> tuple[Array, Array]:
    """Returns the elementwise maximum, and the number of the first array that has it, as uint8."""
    largest, *rest = arrays
    place = jnp.zeros(largest.shape, jnp.uint8)
    for i, values in enumerate(rest, start=1):
        place = jnp.where(values > largest, jnp.uint8(i), place)
        largest = jnp.maximum(largest, values)
    return largest, place


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


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _spread_over_windows(place: Array, dy: Array, window: Pair, size: Sequence[int]) -> Array:
    """Returns dx where windows do not overlap: dy at the place of the maximum, 0 elsewhere."""
    n, rows, columns, channels = dy.shape
    places = jnp.arange(window[0] * window[1], dtype=place.dtype)
    chosen = place.reshape(n, rows, 1, columns, 1, channels) == places.reshape(
        1, 1, window[0], 1, window[1], 1
    )
    bits = _to_bits(dy).reshape(n, rows, 1, columns, 1, channels)
    dx = _from_bits(jnp.where(chosen, bits, jnp.zeros((), bits.dtype)), dy.dtype)
    dx = dx.reshape(n, rows * window[0], columns * window[1], channels)
    return _pad(dx, ((0, size[0] - dx.shape[1]), (0, size[1] - dx.shape[2])))


@jax.custom_vjp
def dense(x: Float[Array, "batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "batch out"]:
    """Returns the product of bfloat16 with a float32 kernel that is rounded to it.

    Sums are float32, and so is the kernel's gradient. A rounded kernel is never kept: some rows at
    a time are rounded and multiplied while they are in the cache, forward and backward.
    """
    return _dense_forward(x, kernel)[0]


def _dense_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    def run(bits: Array, kernel: Array) -> tuple[Array]:
        x_whole = _from_bits(bits, x.dtype)

        def turn(start: Any, n: int, y: Array) -> Array:
            rows = _round(_slice(kernel, start, n), x.dtype)
            return y + _matmul(*lax.optimization_barrier((_slice(x_whole, start, n, axis=1), rows)))

        return (_over_rows(turn, len(kernel), jnp.zeros((len(bits), kernel.shape[1]))),)

    axes = ((1, 0), (None,)) if devices.is_divided(kernel.shape) else ((0, None), (0,))
    (y,) = devices.by_shares(run, *axes)(_to_bits(x), kernel)
    return _round(devices.spread(y), x.dtype), (x, kernel)


def _dense_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    dtype = dy.dtype

    def run(x: Array, dy: Array, kernel: Array) -> tuple[Array, Array]:
        x, dy = _from_bits(x, dtype), _from_bits(dy, dtype)

        def turn(start: Any, n: int, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            rows = lax.optimization_barrier(_round(_slice(kernel, start, n), dtype))
            # With the few rows of dy on the left this takes twice as long for a batch of 64.
            dx = _round(_matmul_transposed(rows, dy), dtype)
            new = dx, _transposed(_slice(x, start, n, axis=1))
            return jax.tree.map(partial(_write, start), so_far, new)

        room = _to_bits(jnp.zeros(x.shape[::-1], dtype))
        dx, x_transposed = _over_rows(turn, len(kernel), (room, room))
        dkernel = _matmul(_from_bits(x_transposed, dtype), dy)
        return _to_bits(_transposed(_from_bits(dx, dtype))), dkernel

    x, kernel = residuals
    divided = devices.is_divided(kernel.shape)
    axes = ((1, None, 0), (1, 0)) if divided else ((0, 0, None), (0, None))
    dx, dkernel = devices.by_shares(run, *axes)(_to_bits(x), _to_bits(dy), kernel)
    return _from_bits(dx, dtype), dkernel.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


def _over_rows(turn: Callable[[Any, int, Any], Any], n_rows: int, carry: Any) -> Any:
    """Returns the last carry = turn(start, n, carry), for n rows from `start` on, then the next."""
    n = min(_CHUNK_ROWS, n_rows)
    carry = lax.fori_loop(0, n_rows // n, lambda i, carry: turn(i * n, n, carry), carry)
    rest = n_rows % n
    return turn(n_rows - rest, rest, carry) if rest else carry


@jax.custom_vjp
def add_bias(
    x: Float[Array, "batch height width channels"], bias: Float[Array, "channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns x + bias, whose gradient is summed in float32."""
    return x + bias.reshape(1, 1, 1, -1)


def _add_bias_backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy, axis=(0, 1, 2))


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)
