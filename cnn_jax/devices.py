"""Several devices: one mesh with the axis `data`, over which a batch is spread.

On a single device every function here returns what it is given. Parameters and the data set lie
whole on every device; only a step's examples are divided, so gradients are summed across devices.
"""

from typing import Any

import jax
import numpy as np
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
    """Returns a tree of arrays as arrays that lie whole on every device."""
    sharding = _sharding() if jax.device_count() > 1 else None

    def put(leaf: Any) -> jax.Array:
        if sharding is None:
            # A copy of what numpy owns, since the buffers of a state are donated later on.
            return leaf if isinstance(leaf, jax.Array) else jax.numpy.array(leaf)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(np.asarray(leaf), sharding)

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
