"""Whether training fits into memory: its need, from shapes, against what is free."""

import collections
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax import memory, mesh, optim
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.step import Setup, init_state


def check(setup: Setup, dataset: ImageDataset) -> None:
    """Refuses to begin what can't fit into the memory that is free; nothing is allocated yet.

    Raises:
        UserError: names the parts of the need and the fields that lower it.
    """
    for phase in dict.fromkeys((setup, setup.at(setup.config.train.epochs))):
        needs = {
            "parameters, gradients and optimizer": _state_bytes(phase),
            "the outputs of layers": _activation_bytes(phase),
            "images": _image_bytes(phase, dataset),
        }
        _refuse_more_than_free(needs, dataset.is_streamed)


def check_program(compiled: jax.stages.Compiled, dataset: ImageDataset) -> None:
    """Refuses to run a compiled segment whose intermediate results do not fit into memory.

    XLA knows their size exactly; `check` has only seen what no program can do without.

    Raises:
        UserError: names the fields that lower it.
    """
    found = compiled.memory_analysis()
    if found is not None:
        needs = {"intermediate results of a step": found.temp_size_in_bytes * _sharers()}
        _refuse_more_than_free(needs, dataset.is_streamed)


def free_bytes() -> int:
    """Returns what the devices can still allocate: on a CPU, what the machine can; else, each."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if any(found is None or "bytes_limit" not in found for found in stats):
        return memory.free_bytes()
    return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)


def _refuse_more_than_free(needs: dict[str, int], is_streamed: bool) -> None:
    need, free = sum(needs.values()), free_bytes()
    if need <= free:
        return
    parts = ", ".join(
        f"{memory.format_bytes(size)} for {name}" for name, size in needs.items() if size
    )
    storage = "" if is_streamed else ", or set runtime.storage=stream"
    raise UserError(
        f"training needs at least {memory.format_bytes(need)} of memory ({parts}), and "
        f"{memory.format_bytes(free)} are free; lower {memory.REMEDIES}{storage}"
    )


def _state_bytes(setup: Setup) -> int:
    state = jax.eval_shape(partial(init_state, setup), jax.random.key(0))
    trainable = optim.trainable_part(state.params, setup.groups)
    return sum(map(_bytes, jax.tree.leaves((state, trainable))))


def _bytes(leaf: Any) -> int:
    """Returns the size of an array of the state, with its copies on the devices of a CPU."""
    return leaf.size * leaf.dtype.itemsize * (1 if mesh.is_divided(leaf.shape) else _sharers())


def _activation_bytes(setup: Setup) -> int:
    """Returns the size of what layers with kernels put out for a part of a batch.

    Backpropagation needs all of it at once, from the first layer that is trained. Of blocks that
    are computed again, it needs one after the other.
    """
    rows = inspection.summarize(setup.model, setup.image_shape)
    names = inspection.param_names(setup.model, setup.image_shape)
    trained = {n.rpartition("/")[0] for n in names if optim.multiplier(setup.groups, n) is not None}
    first = next(i for i, row in enumerate(rows) if row.name in trained)
    sizes = collections.Counter()
    for row in rows[first:]:
        block = row.name.rpartition("/")[0]
        is_again = block in setup.recomputed
        sizes[block if is_again else ""] += math.prod(row.output_shape) if row.flops else 0
    numbers = sizes.pop("", 0) + max(sizes.values(), default=0)
    train = setup.config.train
    examples = train.batch_size // train.accumulate * _sharers() // mesh.device_count()
    return numbers * examples * jnp.dtype(setup.config.model.dtype).itemsize


def _image_bytes(setup: Setup, dataset: ImageDataset) -> int:
    """Returns the size of images that are not held on the host already."""
    if dataset.is_streamed:
        steps, batch = setup.config.runtime.segment_steps, setup.config.train.batch_size
        # One chunk is in use, one being put together, and one is ready.
        return 3 * steps * batch * math.prod(dataset.image_shape) // jax.process_count()
    return 0 if jax.default_backend() == "cpu" else dataset.train.nbytes


def _sharers() -> int:
    """Returns how many devices share the memory that `free_bytes` returns: the cores of a CPU."""
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1
