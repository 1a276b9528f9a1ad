"""Max pooling whose gradient is elementwise selection, where XLA's is a scatter.

XLA's scatter is serial on a CPU. On a GPU its additions race, so that their order is not fixed, and
XLA refuses it where operations must be deterministic. `max_pool` is for a CPU; `max_pool_of_xla` is
for other devices. Images are [batch, height, width, channels].
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from cnn_jax.kernels.bits import from_bits, to_bits

Pair = tuple[int, int]
"""(height, width)."""
Pads = tuple[Pair, Pair]
"""(low, high) of the height and (low, high) of the width; a negative number crops."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(
    x: Float[Array, "batch height width channels"], window: Pair, strides: Pair, pads: Pads
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the maximum of each window and channel.

    The gradient goes to the first maximum of a window in row-major order.
    """
    return _forward(x, window, strides, pads)[0]


def _forward(
    x: Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the maxima, and as residuals their places in the windows and the shape of x."""
    x_padded = pad(x, pads, value=-jnp.inf)
    size = [(x_padded.shape[axis + 1] - window[axis]) // strides[axis] + 1 for axis in (0, 1)]
    grid = windows(x_padded, window, strides, size)
    largest, place = first_maximum([values for row in grid for values in row])
    return largest, (place, jnp.zeros((0, *x.shape[1:3]), x.dtype))


def _backward(
    window: Pair, strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array]:
    """Sums over the places in the window: dy where the maximum came from there, 0 elsewhere."""
    place, like_x = residuals
    if strides == window and pads == ((0, 0), (0, 0)):
        return (_backward_without_overlap(place, dy, window, like_x.shape[1:]),)
    between = (strides[0] - 1, strides[1] - 1)
    span = [(dy.shape[axis + 1] - 1) * strides[axis] + 1 for axis in (0, 1)]
    dx = []
    for i in range(window[0]):
        for j in range(window[1]):
            before = i - pads[0][0], j - pads[1][0]
            after = [like_x.shape[axis + 1] - before[axis] - span[axis] for axis in (0, 1)]
            part = jnp.where(place == i * window[1] + j, dy, jnp.zeros((), dy.dtype))
            dx.append(pad(part, ((before[0], after[0]), (before[1], after[1])), interior=between))
    return (sum(dx[1:], start=dx[0]),)


max_pool.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def max_pool_of_xla(
    x: Float[Array, "batch height width channels"], window: Pair, strides: Pair, pads: Pads
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the same as `max_pool`, by XLA's own operation, and has the same gradient.

    Its derivatives are left to autodiff, so they exist in forward mode and of every order. XLA
    fuses the gradient into one kernel, in which each pixel adds up what it gets from its windows.
    """
    return nn.max_pool(x, window, strides, pads)  # pyright: ignore[reportArgumentType]


@max_pool_of_xla.defjvp
def _derivative(
    window: Pair, strides: Pair, pads: Pads, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Returns the maxima, and the tangents of the pixels that they come from."""
    (x,), (dx,) = primals, tangents
    y, (place, _) = _forward(x, window, strides, pads)
    zero = jnp.zeros((), dx.dtype)
    if strides == window and pads == ((0, 0), (0, 0)):
        chosen = _chosen(place, window)
        whole = dx[:, : y.shape[1] * window[0], : y.shape[2] * window[1]]
        return y, jnp.sum(jnp.where(chosen, whole.reshape(chosen.shape), zero), axis=(2, 4))
    grid = windows(pad(dx, pads), window, strides, y.shape[1:3])
    moved = [
        jnp.where(place == i, values, zero)
        for i, values in enumerate(values for row in grid for values in row)
    ]
    return y, sum(moved[1:], start=moved[0])


def _backward_without_overlap(
    place: Array, dy: Array, window: Pair, size: Sequence[int]
) -> Float[Array, "batch height width channels"]:
    """Returns dx where windows do not overlap: dy at the place of the maximum, 0 elsewhere."""
    n, rows, columns, channels = dy.shape
    chosen = _chosen(place, window)
    bits = to_bits(dy).reshape(n, rows, 1, columns, 1, channels)
    dx = from_bits(jnp.where(chosen, bits, jnp.zeros((), bits.dtype)), dy.dtype)
    dx = dx.reshape(n, rows * window[0], columns * window[1], channels)
    return pad(dx, ((0, size[0] - dx.shape[1]), (0, size[1] - dx.shape[2])))


def _chosen(place: Array, window: Pair) -> Bool[Array, "batch rows height columns width channels"]:
    """Returns which places of windows that do not overlap hold the maximum."""
    n, rows, columns, channels = place.shape
    places = jnp.arange(window[0] * window[1], dtype=place.dtype)
    return place.reshape(n, rows, 1, columns, 1, channels) == places.reshape(
        1, 1, window[0], 1, window[1], 1
    )


def first_maximum(arrays: Sequence[Array]) -> tuple[Array, UInt8[Array, "..."]]:
    """Returns the elementwise maximum, and the index of the first array that holds it."""
    largest, *rest = arrays
    place = jnp.zeros(largest.shape, jnp.uint8)
    for i, values in enumerate(rest, start=1):
        place = jnp.where(values > largest, jnp.uint8(i), place)
        largest = jnp.maximum(largest, values)
    return largest, place


def pad(x: Array, pads: Sequence[Pair], value: float = 0.0, interior: Pair = (0, 0)) -> Array:
    """Pads the height and width of images, and puts `interior` values between neighbours."""
    spread = [(*pair, between) for pair, between in zip(pads, interior, strict=True)]
    return lax.pad(x, jnp.array(value, x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])


def windows(
    x: Float[Array, "batch height width channels"],
    window: Sequence[int],
    strides: Pair,
    size: Sequence[int],
) -> list[list[Array]]:
    """Returns, for each place in a window, the values that all windows have at that place.

    x is padded already, and `size` is the number of windows along the height and width. The result
    is a grid of the shape of the window, whose elements are [batch, *size, channels].
    """
    last = [(n - 1) * stride + 1 for n, stride in zip(size, strides, strict=True)]

    def place(i: int, j: int) -> Array:
        stop = (x.shape[0], i + last[0], j + last[1], x.shape[3])
        return lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1))

    return [[place(i, j) for j in range(window[1])] for i in range(window[0])]
