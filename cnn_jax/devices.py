"""Several devices and processes: one mesh with the axis `data`, over which a batch is spread.

On a single device every function here returns what it is given. Parameters and the data set lie
whole on every device; only a step's examples are divided, so gradients are summed across devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn_jax.errors import UserError


def _sharding(*axes: str | None) -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch that can't be divided evenly.

    Raises:
        UserError: the number of devices does not divide it.
    """
    if batch_size % jax.device_count():
        raise UserError(
            f"train.batch_size={batch_size} can't be spread over {jax.device_count()} devices; "
            "choose a multiple"
        )


def replicate(tree: Any) -> Any:
    """Returns a tree of arrays, equal in every process, as arrays that lie on every device."""
    if jax.device_count() == 1:
        return jax.tree.map(jax.numpy.array, tree)
    sharding = _sharding()

    def put(leaf: Any) -> jax.Array:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)


def spread(array: jax.Array) -> jax.Array:
    """Inside a compiled function: divides the first axis among the devices."""
    if jax.device_count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, _sharding("data"))


def gather(array: jax.Array) -> jax.Array:
    """Inside a compiled function: gives every device the whole array."""
    if jax.device_count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, _sharding())


def is_main() -> bool:
    """Says whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """Returns the largest `value` of all processes, so that they decide alike."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value)).max())


def main_first(action: Callable[[], Any]) -> Any:
    """Returns what `action` gives, run by the main process before the others.

    For what the first run leaves for the next, such as a cache of decoded images.
    """
    if jax.process_count() == 1 or is_main():
        result = action()
        multihost_utils.sync_global_devices("main_first") if jax.process_count() > 1 else None
        return result
    multihost_utils.sync_global_devices("main_first")
    return action()
