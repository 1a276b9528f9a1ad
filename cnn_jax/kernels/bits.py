"""bfloat16 on a CPU: its bits are moved, converted and transposed without XLA's slow conversions.

XLA's CPU backend computes with bfloat16 by converting whole arrays to float32 and back, also where
values are only copied. The functions here leave float32 arrays as they are.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Columns that one product with the identity matrix transposes: more would cost more
# multiplications, fewer would need more products.
_IDENTITY_COLUMNS = 64


def to_bits(x: Array) -> Array:
    """Returns the uint16 bits of a bfloat16 array; arrays of other types are returned unchanged.

    Bits can be moved and selected without a conversion. To move a part of a bfloat16 array XLA
    would convert all of the array, so the time of a loop would grow with the square of the batch.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Array, dtype: Any) -> Array:
    """Returns the array of type `dtype` whose bits `to_bits` returned.

    An array of that type is returned unchanged, because a bit cast has no derivative, not even one
    to the same type.
    """
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def widen(x: Array) -> Array:
    """Returns x as float32, exactly: bfloat16 is the upper half of the bits of a float32.

    XLA's CPU backend takes three to five times as long for a conversion from or to bfloat16 as for
    a few operations on integers, from which LLVM makes vector instructions.
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return lax.bitcast_convert_type(to_bits(x).astype(jnp.uint32) << 16, jnp.float32)


def round_to(x: Float[Array, "..."], dtype: Any) -> Array:
    """Returns float32 numbers as `dtype`, rounded as a conversion rounds: to nearest, ties to even.

    The reason not to convert is the same as for `widen`.
    """
    if dtype != jnp.bfloat16 or x.dtype == dtype:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
    upper = jnp.where(x == x, (bits + half) >> 16, jnp.uint32(0x7FC0))  # 0x7FC0 is NaN.
    return from_bits(upper.astype(jnp.uint16), dtype)


def slice_of(x: Array, start: Any, n: int, axis: int = 0) -> Array:
    """Returns n rows (or columns) of x from `start` on.

    Loops slice their inputs with this function, because the slices of lax.scan would be copied
    before the loop.
    """
    return from_bits(lax.dynamic_slice_in_dim(to_bits(x), start, n, axis), x.dtype)


def write_rows(start: Any, bits: Array, rows: Array) -> Array:
    """Returns `bits`, in which the bits of `rows` replace the rows from `start` on."""
    return lax.dynamic_update_slice_in_dim(bits, to_bits(rows), start, axis=0)


def matmul(a: Array, b: Array) -> Float[Array, "..."]:
    """Returns a @ b as float32, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def matmul_transposed(
    a: Float[Array, "rows inner"], b: Float[Array, "columns inner"]
) -> Float[Array, "rows columns"]:
    """Returns a @ b.T as float32, summed in float32, without transposing b first."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def matmul_right(
    a: Float[Array, "*batch inner"], b: Float[Array, "columns inner"]
) -> Float[Array, "*batch columns"]:
    """Returns a @ b.T as `matmul_transposed`, for any number of axes of a."""
    product = matmul_transposed(a.reshape(-1, a.shape[-1]), b)
    return product.reshape(*a.shape[:-1], b.shape[0])


def transpose(a: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Returns a.T in the type of a; the barrier keeps XLA from fusing it into what reads it."""
    return lax.optimization_barrier(round_to(transpose_and_widen(a), a.dtype))


def transpose_and_widen(a: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Returns a.T as float32; a bfloat16 array is transposed by products with the identity matrix.

    They take a fraction of the time of XLA's transposition, which is needed otherwise: XLA has fast
    bfloat16 products, but not for a left side that has to be transposed first. It would convert
    both sides to float32 and take four times as long. A right side is transposed as it is read.
    """
    if a.dtype != jnp.bfloat16:
        return a.T
    columns = a.shape[1]
    parts = [a[:, i : i + _IDENTITY_COLUMNS] for i in range(0, columns, _IDENTITY_COLUMNS)]
    products = [matmul_transposed(jnp.eye(part.shape[1], dtype=a.dtype), part) for part in parts]
    return jnp.concatenate(products)
