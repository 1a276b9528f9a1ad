"""The convolution of images of few channels, written in XLA's operations for a GPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.kernels.pool import Pads, Pair, pad, windows

_MOST = 32
"""Numbers in a patch up to which `conv_of_patches` is used: those of 3x3 pixels of RGB are 27."""
_ALIGNED = 8
"""Tensor cores take numbers of 16 bits by eight."""


def suits_patches(x: Float[Array, "batch height width in"], kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether `conv_of_patches` is used for these images and this kernel.

    Only in bfloat16: what it gains in float32 was not measured.
    """
    height, width, n_in, _ = kernel_shape
    return x.dtype == jnp.bfloat16 and n_in < _ALIGNED and height * width * n_in <= _MOST


def conv_of_patches(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    bias: Float[Array, "out"] | None,
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the convolution plus bias of images of few channels, as one product of patches.

    cuDNN pads the channels to eight and computes with zeros. Here the matrix of patches has a row
    for each number of a patch, so that neighbours in memory are neighbours in an image.
    """
    height, width, n_in, n_out = kernel.shape
    x = pad(x, pads)
    size = [(x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in (0, 1)]
    grid = windows(x, (height, width), strides, size)
    rows = [place[..., i] for row in grid for place in row for i in range(n_in)]
    missing = -len(rows) % _ALIGNED
    rows += [jnp.zeros_like(rows[0])] * missing
    matrix = jnp.pad(kernel.reshape(-1, n_out), ((0, missing), (0, 0)))
    patches = jnp.stack(rows).reshape(len(rows), -1)
    y = lax.dot_general(patches, matrix, (((0,), (0,)), ((), ())))
    y = y if bias is None else y + bias.reshape(1, -1)
    return y.reshape(x.shape[0], *size, n_out)
