"""Batch normalization for a CPU, with the ReLU or ReLU6 that follows it, forward and backward.

Its time is that of reading and writing memory. So both sums of the gradient are taken in one pass
over the batch, and everything else is one elementwise operation forward and one backward. Sums are
float32, of terms that stay in the cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.kernels.bits import round_to, widen
from cnn_jax.kernels.chunks import chunked

LIMITS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
"""The range that an activation clips values to; its gradient is 1 inside of it."""

# Numbers that are added up in one operation: the sums so far should stay in the cache.
_BLOCK = 2**15


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "batch *size channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    epsilon: float,
    activation: str | None,
) -> tuple[
    Float[Array, "batch *size channels"], Float[Array, "channels"], Float[Array, "channels"]
]:
    """Returns x normalized by its own statistics, their means and their variances.

    The result is activation((x - mean) / sqrt(variance + epsilon) * scale + bias), in the type of
    x. `activation` is a key of `LIMITS` or None. The statistics are for records: no gradient is
    taken through what is done with them.
    """
    return _normalize_forward(x, scale, bias, epsilon, activation)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, activation: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    def values(x: Array) -> tuple[None, list[Array]]:
        return None, [widen(x)]

    def squares(x: Array, mean: Array) -> tuple[None, list[Array]]:
        return None, [jnp.square(widen(x) - _along(mean, x))]

    # The mean of squares less the square of the mean would take one pass, but lose digits where the
    # mean is large.
    count = x.size // x.shape[-1]
    (mean,) = _sums(values, (x,)) / count
    (variance,) = _sums(squares, (x,), mean) / count
    factor = jax.lax.rsqrt(variance + epsilon)
    y = _clip(_shifted(x, mean, factor * scale, bias), activation)
    return (round_to(y, x.dtype), mean, variance), (x, scale, bias, mean, factor)


def _normalize_backward(
    epsilon: float,
    activation: str | None,
    residuals: tuple[Array, ...],
    gradients: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    x, *values = residuals
    # Else XLA would write the values along all of x, once for the forward pass and this one.
    scale, bias, mean, factor = jax.lax.optimization_barrier(values)
    dy, _, _ = gradients
    dbias, dscale = _affine_sums(x, dy, mean, factor * scale, bias, activation)
    dscale = dscale * factor
    g = _unclipped(x, dy, mean, factor * scale, bias, activation)
    count = x.size // x.shape[-1]
    centred = widen(x) - _along(mean, x)
    correction = _along(dbias / count, x) + centred * _along(factor * dscale / count, x)
    return round_to(_along(factor * scale, x) * (g - correction), x.dtype), dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_and_shift(
    x: Float[Array, "batch *size channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    activation: str | None,
) -> Float[Array, "batch *size channels"]:
    """Returns activation(x * scale + bias) in the type of x.

    `activation` is a key of `LIMITS` or None.
    """
    y = _shifted(x, jnp.zeros_like(scale), scale, bias)
    return round_to(_clip(y, activation), x.dtype)


def _scale_forward(
    x: Array, scale: Array, bias: Array, activation: str | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    return scale_and_shift(x, scale, bias, activation), (x, scale, bias)


def _scale_backward(
    activation: str | None, residuals: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, Array]:
    x, *values = residuals
    scale, bias = jax.lax.optimization_barrier(values)  # As in _normalize_backward.
    zero = jnp.zeros_like(scale)
    dbias, dscale = _affine_sums(x, dy, zero, scale, bias, activation)
    g = _unclipped(x, dy, zero, scale, bias, activation)
    return round_to(g * _along(scale, x), x.dtype), dscale, dbias


scale_and_shift.defvjp(_scale_forward, _scale_backward)


def _along(values: Array, x: Array) -> Array:
    """Returns the values of the channels with the axes of x."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def _shifted(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    """Returns (x - mean) * factor + bias in float32."""
    return (widen(x) - _along(mean, x)) * _along(factor, x) + _along(bias, x)


def _clip(y: Array, activation: str | None) -> Array:
    if activation is None:
        return y
    low, high = LIMITS[activation]
    return jnp.where(y <= low, low, jnp.where(y >= high, high, y))


def _unclipped(
    x: Array, dy: Array, mean: Array, factor: Array, bias: Array, activation: str | None
) -> Array:
    """Returns the float32 gradient before the activation; that of a clipped value is 0."""
    if activation is None:
        return widen(dy)
    y, (low, high) = _shifted(x, mean, factor, bias), LIMITS[activation]
    return jnp.where((y > low) & (y < high), widen(dy), 0)


def _affine_sums(
    x: Array, dy: Array, mean: Array, factor: Array, bias: Array, activation: str | None
) -> Float[Array, "2 channels"]:
    """Returns the sums of the gradient before the activation, and of it times x - mean."""

    def terms(
        x: Array, dy: Array, mean: Array, factor: Array, bias: Array
    ) -> tuple[None, list[Array]]:
        g = _unclipped(x, dy, mean, factor, bias, activation)
        return None, [g, g * (widen(x) - _along(mean, x))]

    return _sums(terms, (x, dy), mean, factor, bias)


def _sums(terms: Any, batches: Sequence[Array], *whole: Array) -> Array:
    """Returns the sums over all axes but the last of what terms(*rows of batches, *whole) returns.

    Rows of channels are added up elementwise, and summed in the end: XLA would take each sum in a
    pass of its own, over terms that it writes first.
    """
    channels = batches[0].shape[-1]

    def finish(totals: list[Array]) -> Array:
        return jnp.stack([jnp.sum(total, axis=0) for total in totals])

    rows = [array.reshape(-1, channels) for array in batches]
    n_pixels = max(1, channels * 1024 // _BLOCK)
    return chunked(terms, rows, *whole, n_pixels=n_pixels, finish=finish)[1]
