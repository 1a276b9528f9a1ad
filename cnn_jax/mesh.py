"""One mesh of all devices, with the axis `data` over which a batch is sharded.

On one device every function here returns its argument. On several, the examples of a step are
divided, so gradients are summed across devices, while parameters and the data set are replicated.
There is one exception: on the cores of a CPU (see `kernels.cores`) the kernels of large dense
layers are divided by their inputs, not by the examples: data parallelism for convolutions and model
parallelism for dense layers, as in Krizhevsky, "One weird trick for parallelizing convolutional
neural networks" (2014).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnn_jax.errors import UserError

Axes = tuple[int | None, ...]

# Numbers in a dense kernel from which on it is divided among the cores of a CPU.
_LARGE = 2**16


def device_count() -> int:
    """Returns the number of devices of all processes."""
    return jax.device_count()


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch that can't be divided evenly.

    Raises:
        UserError: the number of devices does not divide it.
    """
    if batch_size % device_count():
        raise UserError(
            f"train.batch_size={batch_size} can't be divided among {device_count()} devices; "
            "choose a multiple"
        )


def replicate(tree: Any) -> Any:
    """Returns a tree of arrays with every array whole on every device."""
    return jax.tree.map(lambda leaf: _put(leaf, _sharding()), tree)


def lend(array: np.ndarray) -> jax.Array:
    """Returns an array whole on every device, which must not be changed from here on.

    The devices of a CPU all read the caller's memory if it is aligned (see `memory.empty_images`).
    """
    shards = [jax.device_put(array, device) for device in jax.local_devices()]
    if device_count() == 1:
        return shards[0]
    return jax.make_array_from_single_device_arrays(array.shape, _sharding(), shards)


def own_places(batch_size: int) -> tuple[int, ...]:
    """Returns the places in a batch, divided among all devices, of those of this process."""
    if device_count() == 1:
        return tuple(range(batch_size))
    places = np.arange(batch_size)
    parts = _sharding(0).addressable_devices_indices_map((batch_size,)).values()
    return tuple(np.unique(np.concatenate([places[part] for part in parts])).tolist())


def divide(array: np.ndarray, axis: int = 0) -> jax.Array:
    """Returns an array with one axis divided among all devices.

    Args:
        array: along that axis, what belongs to the devices of this process (see `own_places`).
        axis: must be divisible by the number of devices, over all processes.
    """
    if device_count() == 1:
        return jax.device_put(array)
    return jax.make_array_from_process_local_data(_sharding(axis), array)


def place(state: Any) -> Any:
    """Returns a training state, or another tree of arrays, placed where training expects it."""
    return jax.tree.map(lambda leaf: _put(leaf, _state_sharding(leaf.shape)), state)


def keep_placed(state: Any) -> Any:
    """Inside a compiled function: constrains a state to the places that `place` gives it."""
    if device_count() == 1:
        return state
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: constrain(leaf, _state_sharding(leaf.shape)), state)


def shard(array: jax.Array, axis: int = 0) -> jax.Array:
    """Inside a compiled function: divides an axis among the devices where that goes evenly."""
    if device_count() == 1 or array.shape[axis] % device_count():
        return array
    return jax.lax.with_sharding_constraint(array, _sharding(axis))


def gather(array: jax.Array) -> jax.Array:
    """Inside a compiled function: gives every device the whole array."""
    if device_count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, _sharding())


def shard_map(function: Callable[..., Any], in_axes: Axes, out_axes: Axes) -> Callable[..., Any]:
    """Inside a compiled function: returns `function` with its work divided among the devices.

    `in_axes` gives, as for jax.vmap, the axis along which each argument is divided, or None for an
    argument that every device gets whole (it may be a tree). `out_axes` gives the axis along which
    each result is joined, or None for a result that is summed over the devices (it may be a tree).
    XLA shards most operations by itself, but not loops: every device would run all of a loop. If an
    axis can't be divided evenly, every device computes the whole.
    """

    def share(*args: Any) -> Any:
        results = function(*args)
        return tuple(
            jax.lax.psum(result, "data") if axis is None else result
            for axis, result in zip(out_axes, results, strict=True)
        )

    def run(*args: Any) -> Any:
        divided = [(arg, axis) for arg, axis in zip(args, in_axes, strict=True) if axis is not None]
        if device_count() == 1 or any(arg.shape[axis] % device_count() for arg, axis in divided):
            return function(*args)
        in_specs, out_specs = (tuple(map(_spec, axes)) for axes in (in_axes, out_axes))
        # check_vma would want the zeros that a loop starts from to be declared as divided.
        return jax.shard_map(
            share, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
        )(*args)

    return run


def is_divided(shape: Sequence[int]) -> bool:
    """Returns whether an array of a state is divided: on a CPU, large dense kernels are."""
    return (
        jax.default_backend() == "cpu"
        and jax.process_count() == 1
        and len(shape) == 2
        and math.prod(shape) >= _LARGE
        and shape[0] % device_count() == 0
    )


def _mesh() -> Mesh:
    return jax.make_mesh((device_count(),), ("data",), axis_types=(AxisType.Auto,))


def _sharding(axis: int | None = None) -> NamedSharding:
    """Returns the sharding that divides one axis of an array, or none."""
    return NamedSharding(_mesh(), _spec(axis))


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "data")


def _state_sharding(shape: Sequence[int]) -> NamedSharding:
    return _sharding(0 if is_divided(shape) else None)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if device_count() == 1:
        if isinstance(leaf, jax.Array):
            return leaf
        # A copy of what numpy owns, since the buffers of a state are donated later on.
        return jax.numpy.array(leaf)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    array = np.asarray(leaf)
    # Unlike device_put, this does not send the array around to check that all processes agree.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
