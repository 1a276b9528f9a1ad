"""Dense products of bfloat16 with a float32 kernel that is never rounded in one piece."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax import mesh
from cnn_jax.kernels.bits import (
    from_bits,
    matmul,
    matmul_transposed,
    round_to,
    slice_of,
    to_bits,
    transpose,
    write_rows,
)

# Rows of a kernel that are worked on at a time: they should fit into a core's cache and still give
# matrices large enough to be multiplied at full speed.
_CHUNK_ROWS = 512


@jax.custom_vjp
def dense(x: Float[Array, "batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "batch out"]:
    """Returns the product of bfloat16 inputs with a float32 kernel, as bfloat16.

    Sums are float32, and so is the gradient of the kernel. A rounded copy of the kernel is never
    kept: forward and backward, some rows at a time are rounded and multiplied while they are in the
    cache.
    """
    return _forward(x, kernel)[0]


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    def multiply(bits: Array, kernel: Array) -> tuple[Array]:
        x_whole = from_bits(bits, x.dtype)

        def add_rows(start: Any, n: int, y: Array) -> Array:
            rows = round_to(slice_of(kernel, start, n), x.dtype)
            part = slice_of(x_whole, start, n, axis=1)
            return y + matmul(*lax.optimization_barrier((part, rows)))

        return (_over_rows(add_rows, len(kernel), jnp.zeros((len(bits), kernel.shape[1]))),)

    axes = ((1, 0), (None,)) if mesh.is_divided(kernel.shape) else ((0, None), (0,))
    (y,) = mesh.shard_map(multiply, *axes)(to_bits(x), kernel)
    return round_to(mesh.shard(y), x.dtype), (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    dtype = dy.dtype

    def multiply(x: Array, dy: Array, kernel: Array) -> tuple[Array, Array]:
        x, dy = from_bits(x, dtype), from_bits(dy, dtype)

        def write(start: Any, n: int, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            rows = lax.optimization_barrier(round_to(slice_of(kernel, start, n), dtype))
            # With the few rows of dy on the left, this would take twice as long for batches of 64.
            dx = round_to(matmul_transposed(rows, dy), dtype)
            new = dx, transpose(slice_of(x, start, n, axis=1))
            return jax.tree.map(partial(write_rows, start), so_far, new)

        empty = to_bits(jnp.zeros(x.shape[::-1], dtype))
        dx, x_transposed = _over_rows(write, len(kernel), (empty, empty))
        dkernel = matmul(from_bits(x_transposed, dtype), dy)
        return to_bits(transpose(from_bits(dx, dtype))), dkernel

    x, kernel = residuals
    divided = mesh.is_divided(kernel.shape)
    axes = ((1, None, 0), (1, 0)) if divided else ((0, 0, None), (0, None))
    dx, dkernel = mesh.shard_map(multiply, *axes)(to_bits(x), to_bits(dy), kernel)
    return from_bits(dx, dtype), dkernel.astype(kernel.dtype)


dense.defvjp(_forward, _backward)


def _over_rows(function: Callable[[Any, int, Any], Any], n_rows: int, carry: Any) -> Any:
    """Calls carry = function(start, n, carry) for one chunk of n rows after the other."""
    n = min(_CHUNK_ROWS, n_rows)
    carry = lax.fori_loop(0, n_rows // n, lambda i, carry: function(i * n, n, carry), carry)
    rest = n_rows % n
    return function(n_rows - rest, rest, carry) if rest else carry
