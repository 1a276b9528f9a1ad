"""Initial values of kernels: functions (key, shape, dtype) -> array, as linen's own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Rows of a kernel that are drawn at once.
_ROWS = 128


def glorot_uniform(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel [..., in, out] drawn from U(-a, a), a = sqrt(6 / (fan_in + fan_out)).

    Equation 16 of Glorot and Bengio (2010); the default of tf.layers, and so of the chapter.
    """
    receptive = math.prod(shape[:-2])
    return _uniform(key, shape, dtype, math.sqrt(6 / (receptive * (shape[-2] + shape[-1]))))


def he_uniform(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel [..., in, out] drawn from U(-a, a), a = sqrt(6 / fan_in).

    Its variance is 2 / fan_in, which He et al. (2015), equation 10, derive for ReLU.
    """
    return _uniform(key, shape, dtype, math.sqrt(6 / math.prod(shape[:-1])))


def narrow_uniform(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel drawn from U(-0.01, 0.01), whatever its shape."""
    return _uniform(key, shape, dtype, 0.01)


def _uniform(key: Array, shape: Sequence[int], dtype: Any, limit: float) -> Array:
    # A few rows at a time: the random bits of the whole first dense layer of vgg1 would take three
    # times that layer's memory.
    keys = jax.random.split(key, math.prod(shape[:-1]))

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, shape[-1:], dtype, -limit, limit)

    return jax.lax.map(draw, keys, batch_size=_ROWS).reshape(shape)


INITIALIZERS: dict[str, Callable[..., Array]] = {
    "glorot_uniform": glorot_uniform,
    "he_uniform": he_uniform,
    "narrow_uniform": narrow_uniform,
}
"""The choices of `model.initializer`."""


def fan_in_uniform(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32, fan_in: int = 0
) -> Array:
    """Returns an array drawn from U(-a, a), a = 1 / sqrt(fan_in): the default of PyTorch's layers.

    Without `fan_in`, it is computed from `shape`, that of a kernel [..., in, out].
    """
    limit = 1 / math.sqrt(fan_in or math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def partial_identity(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, "kernel_height kernel_width in out"]:
    """Returns `fan_in_uniform`, but each of the first filters copies one input channel."""
    height, width, *channels = shape
    first = jnp.arange(min(channels))
    kernel = fan_in_uniform(key, shape, dtype).at[..., first].set(0)
    return kernel.at[height // 2, width // 2, first, first].set(1)


def of_unit_deviation(initializer: Callable[..., Array]) -> Callable[..., Array]:
    """Returns the initializer whose arrays are those of another, divided by their deviation."""

    def draw(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        array = initializer(key, shape, dtype)
        return array / jnp.std(array, ddof=1)

    return draw
