"""Depthwise convolutions for a CPU: each channel has a kernel of its own.

XLA's CPU backend computes them, and their gradients, pixel by pixel. Here they are sums of shifted
images, each multiplied by one place of the kernel, for which LLVM makes vector instructions. An
image is finished before the next one, so that it is read from the cache for all but the first place
of the kernel.

Images are NHWC and have the type of the kernel, float32 or bfloat16. Sums are float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.kernels.bits import round_to, widen
from cnn_jax.kernels.chunks import chunked, largest_divisor
from cnn_jax.kernels.pool import Pads, Pair, pad, windows

# Numbers of a block of rows: the block of each place of a kernel should stay in the cache.
_BLOCK = 2**14


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_depthwise(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the convolution of each channel with its own kernel."""
    size = [
        (x.shape[axis + 1] + sum(pads[axis]) - kernel.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    ]

    def convolve(x: Array, kernel: Array) -> tuple[Array, None]:
        places = windows(pad(widen(x), pads), kernel.shape[:2], strides, size)
        return round_to(_weighted_sum(places, kernel), x.dtype), None

    return chunked(convolve, (x,), widen(kernel), n_pixels=_weight(x.shape))[0]


def _forward(
    x: Array, kernel: Array, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return conv_depthwise(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals

    def multiply(x: Array, dy: Array, kernel: Array) -> tuple[Array, Array]:
        wide = widen(dy)
        dx = _input_gradient(wide, kernel, x.shape, strides, pads)
        dkernel = _kernel_gradient(pad(widen(x), pads), wide, kernel.shape, strides)
        return round_to(dx, x.dtype), dkernel

    dx, dkernel = chunked(multiply, (x, dy), widen(kernel), n_pixels=_weight(x.shape))
    return dx, round_to(dkernel.reshape(kernel.shape), kernel.dtype)


conv_depthwise.defvjp(_forward, _backward)


def _weight(shape: Sequence[int]) -> int:
    """Returns the number of pixels that an image counts for: as if it had 64 channels."""
    return shape[1] * shape[2] * shape[3] // 64


def _weighted_sum(places: Sequence[Sequence[Array]], kernel: Array) -> Array:
    """Returns the sum over the places of the kernel of the image that it multiplies there."""
    terms = [
        place * kernel[i, j].reshape(1, 1, 1, -1)
        for i, row in enumerate(places)
        for j, place in enumerate(row)
    ]
    return sum(terms[1:], start=terms[0])


def _kernel_gradient(
    x: Array, dy: Array, shape: Sequence[int], strides: Pair
) -> Float[Array, "window channels"]:
    """Returns the gradient of the kernel, given float32 images x, padded already.

    A block of rows of dy is multiplied by the rows of x that belong to it at each place of the
    kernel, and the products are added to those of the block before, elementwise. To sum each
    product over its pixels would write and read it again: XLA does not fuse that.
    """
    n, rows, columns, channels = dy.shape
    height = largest_divisor(rows, max(1, _BLOCK // (n * columns * channels)))
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    last = (height - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1

    def add_block(block: Array, so_far: list[Array]) -> list[Array]:
        gradient = lax.dynamic_slice_in_dim(dy, block * height, height, axis=1)
        top, n_rows = block * height * strides[0], last[0] + shape[0] - 1
        inputs = lax.dynamic_slice_in_dim(x, top, n_rows, axis=1)
        moved = [
            lax.slice(
                inputs, (0, i, j, 0), (n, i + last[0], j + last[1], channels), (1, *strides, 1)
            )
            for i, j in places
        ]
        return [total + part * gradient for total, part in zip(so_far, moved, strict=True)]

    start = [jnp.zeros((n, height, columns, channels))] * len(places)
    totals = lax.fori_loop(0, rows // height, add_block, start)
    return jnp.stack([jnp.sum(total, axis=(0, 1, 2)) for total in totals])


def _input_gradient(
    dy: Array, kernel: Array, shape: Sequence[int], strides: Pair, pads: Pads
) -> Float[Array, "batch height width channels"]:
    """Returns the gradient of the inputs, float32.

    Place i of the kernel multiplies input u for output (u + low - i) / stride. So of the inputs
    u = stride * q + r, those of one r get the sum over d of dy[q + d] times place
    r + low - stride * d. All r are computed at once, with zeros where the kernel has no such place:
    to put arrays of their own together takes longer than these multiplications.
    """
    counts = [-(-shape[axis + 1] // strides[axis]) for axis in (0, 1)]
    steps, spread = [], jnp.pad(kernel[:, :, 0], ((0, 1), (0, 1), (0, 0)))
    for axis, stride in enumerate(strides):
        low, n_places = pads[axis][0], kernel.shape[axis]
        first, last = -((n_places - 1 - low) // stride), (stride - 1 + low) // stride
        steps.append(range(first, last + 1))
        places = np.array([[r + low - stride * d for r in range(stride)] for d in steps[axis]])
        places[(places < 0) | (places >= n_places)] = n_places  # The zeros after the kernel.
        spread = jnp.take(spread, places, axis=2 * axis)
    zeros = [
        (max(0, -step[0]), max(0, count + step[-1] - n))
        for step, count, n in zip(steps, counts, dy.shape[1:3], strict=True)
    ]
    padded = pad(dy, zeros)
    dx: Any = 0
    for i, d in enumerate(steps[0]):
        for j, e in enumerate(steps[1]):
            top, left = zeros[0][0] + d, zeros[1][0] + e
            moved = padded[:, top : top + counts[0], left : left + counts[1]]
            weights = spread[i, :, j].reshape(1, 1, strides[0], 1, strides[1], -1)
            dx += moved.reshape(len(dy), counts[0], 1, counts[1], 1, -1) * weights
    dx = dx.reshape(len(dy), counts[0] * strides[0], counts[1] * strides[1], dy.shape[3])
    return dx[:, : shape[1], : shape[2]]
