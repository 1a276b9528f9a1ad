"""The loop over the batch that the kernels share: some images at a time, and sums over all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnn_jax import mesh
from cnn_jax.kernels.bits import from_bits, slice_of, to_bits, write_rows

# Output pixels that are worked on at a time: their intermediate arrays should fit into a core's
# cache and still give matrices large enough to be multiplied at full speed. It is twice as many for
# bfloat16.
_CHUNK_PIXELS = 1024


def chunked(
    function: Callable[..., tuple[Any, Any]],
    batches: Sequence[Any],
    *whole: Any,
    n_pixels: int,
    finish: Callable[[Any], Any] = lambda total: total,
) -> tuple[Any, Any]:
    """Returns function(*batches, *whole), computed for a chunk of images at a time.

    The function gets the chunk's rows of `batches` and all of `whole`. It returns two trees: arrays
    with a row for each image, which are joined, and arrays that are summed. `n_pixels` is the size
    of an image, which limits the number of images of a chunk. Each device's sums become
    finish(sums) before they are summed over the devices, which wait for each other at every array.
    """

    def run(*args: Any) -> tuple[Any, Any]:
        batches, whole = args[: len(args) - n_whole], args[len(args) - n_whole :]
        n_images = len(batches[0])
        n = chunk_size(n_images, n_pixels * batches[0].dtype.itemsize // 4)
        if n == n_images:  # Without a loop nothing is added to zeros or copied.
            rows, terms = function(*batches, *whole)
            return rows, finish(terms)

        def chunk(i: Any) -> tuple[Any, Any]:
            return function(*(slice_of(batch, i * n, n) for batch in batches), *whole)

        def body(i: Array, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
            rows, terms = chunk(i)
            joined, total = so_far
            joined = jax.tree.map(partial(write_rows, i * n), joined, rows)
            return joined, jax.tree.map(jnp.add, total, terms)

        def empty(rows: Any) -> Array:
            return to_bits(jnp.zeros((n_images, *rows.shape[1:]), rows.dtype))

        rows, terms = jax.eval_shape(chunk, 0)
        start = jax.tree.map(empty, rows), jax.tree.map(jnp.zeros_like, terms)
        joined, total = lax.fori_loop(0, n_images // n, body, start)
        joined = jax.tree.map(lambda a, like: from_bits(a, like.dtype), joined, rows)
        return joined, finish(total)

    n_whole = len(whole)
    in_axes = (0,) * len(batches) + (None,) * n_whole
    return mesh.shard_map(run, in_axes, (0, None))(*batches, *whole)


def chunk_size(n_images: int, n_pixels: int) -> int:
    """Returns the number of images of a chunk, which divides `n_images`."""
    limit = max(1, min(n_images, _CHUNK_PIXELS // max(n_pixels, 1)))
    return largest_divisor(n_images, limit)


def largest_divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of n that is not above `limit`, which is at least 1."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
