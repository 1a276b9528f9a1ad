"""Muon: momentum whose matrices are made orthogonal, for the kernels inside a network.

Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), and his airbench94_muon.
optax.contrib.muon differs from both in the first steps, where it corrects the momentum's bias.
"""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: s -> a s + b s^3 + c s^5 takes small singular values up as fast as possible, and keeps
those that are near 1 between 0.68 and 1.21."""
_EPSILON = 1e-7
"""Added to the norm that is divided by: the gradient of a dead layer is 0."""

Kernel = Float[Array, "*window in out"]
"""A kernel of a dense layer or a convolution."""


def scale_by_muon(momentum: float, steps: int) -> optax.GradientTransformation:
    """Returns the transformation of gradients of kernels into steps, up to the learning rate.

    v = momentum * v + gradient; step = `direction`(gradient + momentum * v). The scale of the
    gradients has no effect.
    """
    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless_with_tree_map(lambda step, _: direction(jnp.asarray(step), steps)),
    )


def direction(momentum: Kernel, steps: int) -> Kernel:
    """Returns the orthogonalised kernel, times sqrt(out / in) where that is more than 1.

    A kernel counts as the matrix [window * in, out]; `in` is all of its rows. With this factor of
    Jordan's a step changes the outputs, per output, as much in a layer that widens as in one that
    narrows.
    """
    matrix = momentum.reshape(-1, momentum.shape[-1])
    n_inputs, n_outputs = matrix.shape
    factor = math.sqrt(max(1.0, n_outputs / n_inputs))
    return factor * orthogonalize(matrix, steps).reshape(momentum.shape)


def orthogonalize(matrix: Float[Array, "rows columns"], steps: int) -> Float[Array, "rows columns"]:
    """Returns the matrix with singular values near 1 and its singular vectors, by Newton-Schulz.

    Each step is a polynomial of the matrix, which changes only singular values. They start as those
    of the matrix divided by its Frobenius norm, so that none exceeds 1. Those above 0.002 are
    between 0.68 and 1.21 after five steps, after three those above 0.02; others are smaller. The
    factors of the products are in bfloat16, whose rounding is small beside that spread.
    """
    x = matrix / (jnp.linalg.norm(matrix) + _EPSILON)
    is_wide = matrix.shape[0] < matrix.shape[1]
    x = x.T if is_wide else x  # The squares below then have the smaller side.
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        square = _product(x.T, x)
        x = a * x + _product(x, b * square + c * _product(square, square))
    return x.T if is_wide else x


def _product(left: Array, right: Array) -> Array:
    left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def renormalize(kernel: Kernel) -> Kernel:
    """Returns the kernel with a norm of sqrt(out): each output's weights have a mean norm of 1.

    A kernel of zeros stays.
    """
    norm = jnp.linalg.norm(kernel.reshape(-1))
    return kernel * jnp.where(norm > 0, math.sqrt(kernel.shape[-1]) / norm, 1.0)
