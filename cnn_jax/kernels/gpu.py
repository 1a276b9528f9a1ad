"""Convolutions that cuDNN is slow at, written in XLA's operations for a GPU.

Both take bfloat16 alone: what they gain in float32 was not measured.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.kernels.pool import Pads, Pair, pad, windows

_MOST = 32
"""Numbers in a patch up to which `conv_of_patches` is used."""
_ALIGNED = 8
"""Tensor cores take numbers of 16 bits by eight."""
_SHIFTS = True
"""Whether `depthwise_of_shifts` is used."""


def suits_patches(x: Float[Array, "batch height width in"], kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether `conv_of_patches` is the better way for these images and this kernel."""
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
    places, size = _shifted(x, (height, width), strides, pads)
    rows = [place[..., channel] for place in places for channel in range(n_in)]
    missing = -len(rows) % _ALIGNED
    rows += [jnp.zeros_like(rows[0])] * missing
    matrix = jnp.pad(kernel.reshape(-1, n_out), ((0, missing), (0, 0)))
    patches = jnp.stack(rows).reshape(len(rows), -1)
    y = lax.dot_general(patches, matrix, (((0,), (0,)), ((), ())))
    y = y if bias is None else y + bias.reshape(1, -1)
    return y.reshape(len(x), *size, n_out)


def suits_shifts(x: Float[Array, "batch height width channels"]) -> bool:
    """Returns whether `depthwise_of_shifts` is the better way for these images."""
    return _SHIFTS and x.dtype == jnp.bfloat16


def depthwise_of_shifts(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
    strides: Pair,
    pads: Pads,
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the convolution of each channel with its own kernel: a sum of shifted images.

    It has no product that tensor cores could compute. XLA fuses the sum, which is in float32, into
    one kernel, and so its gradients.
    """
    places, _ = _shifted(x, kernel.shape[:2], strides, pads)
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]).astype(jnp.float32)
    products = [place.astype(jnp.float32) * w for place, w in zip(places, weights, strict=True)]
    return sum(products[1:], start=products[0]).astype(x.dtype)


def _shifted(
    x: Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[list[Array], tuple[int, int]]:
    """Returns, for each place in a window, what all windows have there, and their number."""
    x = pad(x, pads)
    rows, columns = ((x.shape[i + 1] - window[i]) // strides[i] + 1 for i in (0, 1))
    grid = windows(x, window, strides, (rows, columns))
    return [place for row in grid for place in row], (rows, columns)
