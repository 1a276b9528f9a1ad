"""Depthwise convolutions for a CPU: each channel has a kernel of its own.

XLA's CPU backend computes them, and their gradients, pixel by pixel. Here they are sums of shifted
images, each multiplied by one place of the kernel, for which LLVM makes vector instructions.

Images are NHWC and have the type of the kernel, float32 or bfloat16. Sums are float32.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.kernels.bits import from_bits, round_to, to_bits, widen
from cnn_jax.kernels.pool import Pads, Pair, pad, windows


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_depthwise(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the convolution of each channel with its own kernel."""
    places, weights = _places(x, kernel.shape, strides, pads), widen(kernel)
    terms = [
        widen(place) * weights[i, j].reshape(1, 1, 1, -1)
        for i, row in enumerate(places)
        for j, place in enumerate(row)
    ]
    return round_to(sum(terms[1:], start=terms[0]), x.dtype)


def _forward(
    x: Array, kernel: Array, strides: Pair, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return conv_depthwise(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    places = _places(x, kernel.shape, strides, pads)
    dkernel = jnp.stack(
        [
            jnp.stack([jnp.sum(widen(place) * widen(dy), axis=(0, 1, 2)) for place in row])
            for row in places
        ]
    )
    spread = pad(to_bits(dy), ((0, 0), (0, 0)), interior=(strides[0] - 1, strides[1] - 1))
    before = [kernel.shape[axis] - 1 - pads[axis][0] for axis in (0, 1)]
    after = [x.shape[axis + 1] + pads[axis][0] - spread.shape[axis + 1] for axis in (0, 1)]
    back = ((before[0], after[0]), (before[1], after[1]))
    dx: Array = conv_depthwise(from_bits(spread, dy.dtype), kernel[::-1, ::-1], (1, 1), back)
    return dx, round_to(dkernel.reshape(kernel.shape), kernel.dtype)


conv_depthwise.defvjp(_forward, _backward)


def _places(x: Array, shape: Sequence[int], strides: Pair, pads: Pads) -> list[list[Array]]:
    """Returns the inputs of all outputs at each place of the kernel."""
    size = [
        (x.shape[axis + 1] + sum(pads[axis]) - shape[axis]) // strides[axis] + 1 for axis in (0, 1)
    ]
    padded = pad(to_bits(x), pads)
    places = windows(padded, shape[:2], strides, size)
    return [[from_bits(place, x.dtype) for place in row] for row in places]
