"""Several devices and processes: one mesh with the axis `data`, over which a batch is spread.

A run has all devices, or inside of `only` a single one; then every function here returns what it
is given. A step's examples are divided, so gradients are summed across devices; parameters and the
data set lie whole on every device. But on the cores of a CPU, each a device of its own, the kernels
of dense layers are divided, by their inputs, not their examples: data parallelism for convolutions
and model parallelism for dense layers, as in Krizhevsky, "One weird trick for parallelizing
convolutional neural networks" (2014).
With several processes all run the same program on the mesh of all their devices; the main one,
process 0, alone reads and writes the workdir, and the others learn from it what it found there.
"""

import contextlib
import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnn_jax.errors import UserError, one_line

Axes = tuple[int | None, ...]
Place = Any
"""A jax.Device that a run is alone on, or None: it has all of them."""

# More than these have not been measured.
_MAX_CORES = 8
# Numbers in a kernel from which on it is divided.
_LARGE = 2**16


def use_cores(batch_size: int) -> None:
    """Makes each core a device of its own; to be called before JAX looks for its devices.

    XLA would share out every operation among all cores, which then wait for each other at its end:
    for a third of vgg3's time on two cores. As devices they wait where they exchange something.
    There are never more than divide a batch evenly. JAX_NUM_CPU_DEVICES takes precedence, and
    XLA_FLAGS.
    """
    if _user_has_chosen():
        return
    limit = min(usable_cpus(), _MAX_CORES)
    count = next(n for n in range(limit, 0, -1) if batch_size % n == 0)
    jax.config.update("jax_num_cpu_devices", count)


def _user_has_chosen() -> bool:
    """Says whether the number of a CPU's devices was set by the user."""
    forced = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return forced or "JAX_NUM_CPU_DEVICES" in os.environ


def usable_cpus() -> int:
    """Returns the number of cores this process may run on, which taskset or a job may restrict."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def only(device: Place) -> Iterator[None]:
    """Gives the runs of this thread one device while the block runs; None leaves them all.

    JAX compiles anew for it, so nothing that was compiled for several devices is mistaken for it.
    """
    with jax.default_device(device) if device else contextlib.nullcontext():
        yield


def count() -> int:
    """Returns the number of devices that a run of this thread has."""
    return 1 if _place() else jax.device_count()


def _place() -> Place:
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


def places() -> list[Place]:
    """Returns on which devices several runs go on side by side; [None] if one has all.

    It has on a CPU whose cores `use_cores` has made devices of, and of several processes.
    """
    divided = jax.default_backend() != "cpu" or _user_has_chosen()
    alone = count() == 1 or jax.process_count() > 1
    return [*jax.local_devices()] if divided and not alone else [None]


def _mesh() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def _sharding(axis: int | None = None) -> NamedSharding:
    """Returns that of an array of which this axis is divided, or none."""
    return NamedSharding(_mesh(), _spec(axis))


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "data")


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch that can't be divided evenly.

    Raises:
        UserError: the number of devices does not divide it.
    """
    if batch_size % count():
        raise UserError(
            f"train.batch_size={batch_size} can't be spread over {count()} devices; "
            "choose a multiple"
        )


def replicate(tree: Any) -> Any:
    """Returns a tree of arrays as arrays that lie whole on every device."""
    return jax.tree.map(lambda leaf: _put(leaf, _sharding()), tree)


def place(state: Any) -> Any:
    """Returns a state, or another tree of arrays, as arrays that lie where training has them."""
    return jax.tree.map(lambda leaf: _put(leaf, _home(leaf.shape)), state)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if count() == 1:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, _place())
        # A copy of what numpy owns, since the buffers of a state are donated later on.
        return jax.numpy.array(leaf)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    array = np.asarray(leaf)
    # Unlike device_put this does not send the array around to see that all processes agree.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _home(shape: Sequence[int]) -> NamedSharding:
    """Returns where an array of a state lies."""
    return _sharding(0 if is_divided(shape) else None)


def is_divided(shape: Sequence[int]) -> bool:
    """Says whether an array of a state is: kernels of large dense layers are, on a CPU."""
    return (
        jax.default_backend() == "cpu"
        and jax.process_count() == 1
        and len(shape) == 2
        and math.prod(shape) >= _LARGE
        and shape[0] % count() == 0
    )


def keep_placed(state: Any) -> Any:
    """Inside a compiled function: leaves a state where `place` puts it."""
    if count() == 1:
        return state
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: constrain(leaf, _home(leaf.shape)), state)


def spread(array: jax.Array, axis: int = 0) -> jax.Array:
    """Inside a compiled function: divides an axis among the devices, if that is possible evenly."""
    if count() == 1 or array.shape[axis] % count():
        return array
    return jax.lax.with_sharding_constraint(array, _sharding(axis))


def gather(array: jax.Array) -> jax.Array:
    """Inside a compiled function: gives every device the whole array."""
    if count() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, _sharding())


def by_shares(function: Callable[..., Any], in_axes: Axes, out_axes: Axes) -> Callable[..., Any]:
    """Inside a compiled function: returns `function`, whose work is divided among the devices.

    As for jax.vmap, `in_axes` says along which axis an argument is divided, or None: each device
    has all of it. `out_axes` says along which axis results are joined, or None: they are summed.
    Results, and arguments that are not divided, may be trees. XLA divides most operations by
    itself, but not a loop: of that each device would run all. So it does of everything where an
    axis can't be divided evenly.
    """

    def share(*args: Any) -> Any:
        results = function(*args)
        return tuple(
            jax.lax.psum(result, "data") if axis is None else result
            for axis, result in zip(out_axes, results, strict=True)
        )

    def run(*args: Any) -> Any:
        divided = [(arg, axis) for arg, axis in zip(args, in_axes, strict=True) if axis is not None]
        if count() == 1 or any(arg.shape[axis] % count() for arg, axis in divided):
            return function(*args)
        in_specs, out_specs = (tuple(map(_spec, axes)) for axes in (in_axes, out_axes))
        # check_vma wants the zeros that a loop starts from declared as divided.
        return jax.shard_map(
            share, mesh=_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
        )(*args)

    return run


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
