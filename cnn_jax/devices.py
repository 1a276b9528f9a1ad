"""Several devices and processes: one mesh with the axis `data`, over which a batch is spread.

On a single device every function here returns what it is given. Parameters and the data set lie
whole on every device; only a step's examples are divided, so gradients are summed across devices.
With several processes all run the same program on the mesh of all their devices; the main one,
process 0, alone reads and writes the workdir, and the others learn from it what it found there.
"""

import contextlib
import ctypes
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn_jax.errors import UserError, one_line


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
        array = np.asarray(leaf)
        # Unlike device_put this does not send the array around to see that all processes agree.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

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


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes of a run; to be called before JAX looks for its devices.

    Arguments left None are taken from SLURM or Open MPI, where JAX detects them.

    Raises:
        UserError: nothing says who the others are, or they can't be reached.
    """
    try:
        if coordinator and not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator={coordinator} names no port.")
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # How long the others outlive one that fails; of healthy ones all end within seconds.
            shutdown_timeout_seconds=30,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {one_line(error)} Start it with srun or mpirun, or give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def is_main() -> bool:
    """Says whether this process is the one that reads and writes the workdir."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """Returns the main process' value, which JSON can hold, in every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode() if is_main() else b"", np.uint8)
    length = int(from_main(np.int32(len(text))))
    return json.loads(from_main(text if is_main() else np.zeros(length, np.uint8)).tobytes())


def on_main(function: Callable[[], Any]) -> Any:
    """Returns `function()` in the main process and None in the others.

    Raises:
        UserError: in every process, if the main one raised it.
    """
    value, problem = None, ""
    if is_main():
        try:
            value = function()
        except UserError as error:
            problem = str(error)
    if problem := agree(problem):
        raise UserError(problem)
    return value


def check_same_data(sha256: str) -> None:
    """Refuses to train where a process has read other images than the main one.

    Raises:
        UserError: this process has.
    """
    if agree(sha256) != sha256:
        raise UserError(f"process {jax.process_index()} has other images than process 0")


def from_main(tree: Any) -> Any:
    """Returns the main process' arrays in every process, as numpy arrays.

    The others pass a tree of the same structure, shapes and dtypes; its values play no part.
    """
    if jax.process_count() == 1:
        return tree

    def share(leaf: Any) -> np.ndarray:
        # As bytes, because the broadcast is a sum, in which -0.0 would become 0.0.
        sent = np.zeros(leaf.size * leaf.dtype.itemsize, np.uint8)
        if is_main():
            sent[:] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
        return received.view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(share, tree)


def largest(value: int) -> int:
    """Returns the largest of the processes' values in every process."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def trim_heap() -> None:
    """Gives back to the system what compilation has freed: glibc would keep some 150 MB of it."""
    with contextlib.suppress(OSError, AttributeError):  # Not Linux, or another C library.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
