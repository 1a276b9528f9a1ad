"""The order in which training goes through its examples: a function of the seed and the epoch."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key


def epoch_order(
    key: Key[Array, ""], epoch: Int[Array, ""], n: int, batch_size: int, passes: int = 1
) -> Int[Array, "steps batch"]:
    """Returns the examples of each step of an epoch: every index i `passes` times, then padding.

    Each pass has an order of its own.

    Padding is ~i, which is negative, for the first examples of the order: BatchNorm then sees
    images in the last step as in all others, and the mask of the loss leaves them out.
    """
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch * passes + i), n)
        for i in range(passes)
    ]
    order = jnp.concatenate(orders)
    padding = ~jnp.resize(order, (-order.size % batch_size,))
    return jnp.concatenate([order, padding]).reshape(-1, batch_size)


@dataclass(frozen=True)
class StepNumbers:
    """The examples of any step, for the host; processes that decode photos get a copy of it."""

    key: tuple[int, ...]
    """The numbers of a key, as `jax.random.key_data` returns them."""
    n: int
    batch_size: int
    passes: int
    places: tuple[int, ...]
    """The places in each batch that belong to the devices of this process."""

    def __call__(self, step: int) -> Int[np.ndarray, "places"]:
        """Returns the examples of a step, with those that stand for padding."""
        steps_per_epoch = -(-self.passes * self.n // self.batch_size)
        order = _order_on_host(self, step // steps_per_epoch)
        index = order[step % steps_per_epoch, list(self.places)]
        return np.maximum(index, ~index)


@functools.lru_cache(maxsize=2)  # Readers are ahead of training by less than an epoch.
def _order_on_host(numbers: StepNumbers, epoch: int) -> np.ndarray:
    key = jax.random.wrap_key_data(jnp.array(numbers.key, jnp.uint32))
    order = _compiled_order(key, epoch, numbers.n, numbers.batch_size, numbers.passes)
    return np.asarray(order)


_compiled_order = jax.jit(epoch_order, static_argnums=(2, 3, 4))
