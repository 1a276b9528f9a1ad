"""Convolutions, pools and dense products, written for a CPU or left to XLA, behind one switch.

`use` chooses the kernels, `active` returns the choice, and the functions after them are what layers
and the training step call; no other module depends on the platform. The README beside this file
says what each kernel gains and what it can't do.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from cnn_jax import mesh
from cnn_jax.kernels import conv as cpu_conv
from cnn_jax.kernels import dense as cpu_dense
from cnn_jax.kernels import depthwise as cpu_depthwise
from cnn_jax.kernels import gpu
from cnn_jax.kernels import norm as cpu_norm
from cnn_jax.kernels import pool as pools

Padding = str | Sequence[tuple[int, int]]
"""SAME, VALID, or the (low, high) padding of the height and of the width."""
Pair = pools.Pair
State = TypeVar("State")

# A part of the keys of jit's caches: a function that was traced with other kernels is traced again.
_choice = jax.make_user_context(default_value="auto")


@contextlib.contextmanager
def use(choice: str, precision: str = "default") -> Iterator[None]:
    """Traces functions inside the block with these kernels.

    "cpu" are the kernels of this package, "xla" are XLA's own operations, which run on every
    platform and, exported, for any batch size; the README names the few that are put to XLA in
    another way than usual, for GPUs. "auto", the default, is "cpu" where JAX's default backend is
    the CPU, else "xla".

    `precision` is `model.precision`: "highest" asks for products of float32 that are not rounded to
    fewer bits; "default" leaves the choice to JAX, whose default on a GPU is TF32.

    Raises:
        ValueError: the choice is none of these.
    """
    if choice not in ("auto", "cpu", "xla"):
        raise ValueError(f"kernels are auto, cpu or xla, not {choice!r}")
    with contextlib.ExitStack() as held:
        held.enter_context(_choice(choice))
        if precision != "default":
            held.enter_context(jax.default_matmul_precision(precision))
        yield


def active() -> Literal["cpu", "xla"]:
    """Returns the kernels that are in use here: "cpu" or "xla"."""
    if _choice.value == "auto":
        return "cpu" if jax.default_backend() == "cpu" else "xla"
    return _choice.value


def convolve(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    bias: Float[Array, "out"] | None = None,
    strides: Pair = (1, 1),
    padding: Padding = "SAME",
    relu: bool = False,
    pool: bool = False,
) -> Float[Array, "batch new_height new_width out"]:
    """Returns the convolution plus bias; if wanted, after ReLU, and then after a 2x2 max pool.

    The arrays share one type. With the kernels for a CPU, a 3x3 convolution with ReLU or a pool is
    one operation, forward and backward, which takes less time and memory than its parts. The
    results differ from those of the parts by the rounding of sums alone.
    """
    is_fast_type = x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    on_cpu = is_fast_type and active() == "cpu"
    if on_cpu and kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == "SAME":
        suits_winograd = cpu_conv.suits_winograd(kernel.shape, strides)
        if suits_winograd and (relu or pool):
            return cpu_conv.conv_relu_pool(x, kernel, bias, relu, pool)
        if relu and not pool:
            return cpu_conv.conv_relu(x, kernel, bias)
    pads = _to_pads(padding, x.shape, kernel.shape[:2], strides)
    if on_cpu and kernel.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        y: Array = cpu_conv.conv_1x1(x[:, :: strides[0], :: strides[1]], kernel)
    elif on_cpu:
        y = cpu_conv.conv(x, kernel, strides, pads)
    elif gpu.suits_patches(x, kernel.shape):
        y, bias = gpu.conv_of_patches(x, kernel, bias, strides, pads), None
    else:
        y = lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=cpu_conv.NHWC)
    if bias is not None and on_cpu and x.dtype == jnp.bfloat16:
        y = cpu_conv.add_bias(y, bias)
    elif bias is not None:
        y += bias.reshape(1, 1, 1, -1)
    # In this order the gradient finds in the pooled values alone where ReLU has let it through.
    y = max_pool(y) if pool else y
    return rectify(y) if relu else y


def convolve_depthwise(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
    strides: Pair = (1, 1),
    padding: Padding = "SAME",
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the convolution of each channel with its own kernel; the arrays share one type."""
    pads = _to_pads(padding, x.shape, kernel.shape[:2], strides)
    is_fast_type = x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    if is_fast_type and active() == "cpu":
        return cpu_depthwise.conv_depthwise(x, kernel, strides, pads)
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=cpu_conv.NHWC,
        feature_group_count=x.shape[-1],
    )


def max_pool(
    x: Float[Array, "batch height width channels"],
    window: Pair = (2, 2),
    strides: Pair = (2, 2),
    padding: Padding = "VALID",
) -> Float[Array, "batch new_height new_width channels"]:
    """Returns the maximum of each window and channel.

    With both kinds of kernels, the gradient goes to the first maximum of a window in row-major
    order, as that of XLA does, and it is computed without a scatter.
    """
    pool = pools.max_pool_of_xla if active() == "xla" else pools.max_pool
    return pool(x, window, strides, _to_pads(padding, x.shape, window, strides))


def rectify(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns max(x, 0), whose derivative is 0 at 0.

    With XLA's kernels the derivative is read off the result. x itself is then not kept for the
    backward pass, and a GPU computes ReLU as a part of the convolution before it.
    """
    return nn.relu(x) if active() == "cpu" else _relu_of_xla(x)


@jax.custom_jvp
def _relu_of_xla(x: Array) -> Array:
    return jnp.maximum(x, jnp.zeros((), x.dtype))


@_relu_of_xla.defjvp
def _derivative_of_relu(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _relu_of_xla(*primals)
    # Not y > 0, which XLA simplifies to x > 0.
    return y, jnp.where(y != 0, *tangents, jnp.zeros((), y.dtype))


CLIPS = tuple(cpu_norm.LIMITS)
"""The activations that `normalize` and `scale_and_shift` include; None stands for none."""


def normalizes(dtype: Any) -> bool:
    """Returns whether `normalize` and `scale_and_shift` serve this type here.

    Where they do not, BatchNorm is linen's, made of XLA's operations.
    """
    return dtype in (jnp.float32, jnp.bfloat16) and active() == "cpu"


def normalize(
    x: Float[Array, "batch *size channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    epsilon: float,
    activation: str | None,
) -> tuple[
    Float[Array, "batch *size channels"], Float[Array, "channels"], Float[Array, "channels"]
]:
    """Returns the batch normalization of training and an activation, and the means and variances.

    The statistics are those of all axes but the last, in float32. They are for records: no gradient
    is taken through what is done with them.
    """
    return cpu_norm.normalize(x, scale, bias, epsilon, activation)


def scale_and_shift(
    x: Float[Array, "batch *size channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    activation: str | None,
) -> Float[Array, "batch *size channels"]:
    """Returns activation(x * scale + bias), in the type of x: batch normalization in evaluation."""
    return cpu_norm.scale_and_shift(x, scale, bias, activation)


def matmul(
    x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]
) -> Float[Array, "*batch out"]:
    """Returns the product with the kernel of a dense layer, in the type of x.

    With the kernels for a CPU, the kernel's gradient of a bfloat16 product stays float32. Autodiff
    would round it to bfloat16 and convert it back, each of which takes as long as the product if
    the kernel is large. There, large kernels are also divided among the devices by their inputs.
    """
    on_cpu = active() == "cpu"
    if x.dtype == jnp.bfloat16 and on_cpu:
        product = cpu_dense.dense(x.reshape(-1, x.shape[-1]), kernel)
        return product.reshape(*x.shape[:-1], kernel.shape[1])
    divided = on_cpu and mesh.is_divided(kernel.shape)
    x = mesh.shard(x, axis=x.ndim - 1) if divided else x
    y = lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    return mesh.shard(y) if divided else y


def update_if(wanted: Bool[Array, ""], update: Callable[[State], State], state: State) -> State:
    """Returns `update(state)` where `wanted`, else `state`, a tree of arrays.

    With the kernels for a CPU it is a loop of one iteration or none, because there a loop waits for
    everything that it reads. Without the loop, XLA finds that parts of the state, such as a kernel
    that the backward pass still reads, can't be overwritten yet, and copies them first: in vgg1 all
    of fc1 and fc2 in every step. With XLA's kernels it is an elementwise selection, which XLA fuses
    with the update; a conditional would make a GPU wait for the host and keep the two apart.
    """
    if active() == "cpu":
        return lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, value: update(value), state)
    return jax.tree.map(
        lambda new, old: old if new is old else jnp.where(wanted, new, old), update(state), state
    )


def compiler_options(recomputes: bool) -> dict[str, str | bool]:
    """Returns what a program of training is compiled with, if it computes blocks again or not.

    For a CPU, XLA takes away the barriers between the first and the second computation before it
    looks for equal operations, and would so merge the two and save nothing. A GPU keeps them.
    """
    if recomputes and jax.default_backend() == "cpu":
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return {}


def norm_if(wanted: Bool[Array, ""], tree: Any) -> Float[Array, ""]:
    """Returns the global norm of a tree of arrays where `wanted`, else -1.

    With the kernels for a CPU it is computed only where it is wanted. With XLA's it always is: a
    conditional would make a GPU wait in every step for the host to decide.
    """
    unwanted = jnp.full((), -1.0)
    if active() == "cpu":
        return lax.cond(wanted, optax.tree.norm, lambda _: unwanted, tree)
    return jnp.where(wanted, optax.tree.norm(tree), unwanted)


def _to_pads(
    padding: Padding, shape: Sequence[int], window: Sequence[int], strides: Pair
) -> pools.Pads:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(shape[1:3], window, strides, padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)
