"""The learning-rate finder: how the loss takes a learning rate that rises at every step.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3; where it stops
and what it suggests are Howard's and Gugger's in the fastai library (2018).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax import devices, optim, train
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.train import Recipe, TrainState

LOWEST, HIGHEST = 1e-5, 10.0
STEPS = 100
"""Enough for a smooth curve; sets of fewer batches are passed through several times."""
_SMOOTHING = 0.9  # Of the running mean of the losses.
_DIVERGED = 4.0  # Times the least of the smoothed losses.


@dataclass(frozen=True)
class Found:
    """The steps up to divergence: arrays [n_steps]."""

    rates: Float[np.ndarray, "n_steps"]
    losses: Float[np.ndarray, "n_steps"]
    smoothed: Float[np.ndarray, "n_steps"]

    @property
    def suggested(self) -> float:
        """A tenth of the rate at which the smoothed loss was least."""
        return float(self.rates[int(self.smoothed.argmin())]) / 10


def rising(step: Any, n_steps: int) -> Any:
    """Returns the learning rate of a step: from LOWEST to HIGHEST, by a constant factor."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / max(n_steps - 1, 1))


def make_recipe(config: Config, n_classes: int, n_steps: int) -> Recipe:
    """Returns the recipe of a config's first phase, with the rate that rises over `n_steps`."""
    schedule = partial(rising, n_steps=n_steps)
    phases = optim.make_phases(config.optim, len(config.model.blocks), steps_per_epoch=1)
    return replace(
        train.make_recipe(config, n_classes, steps_per_epoch=1),
        schedule=schedule,
        average_decay=None,  # which is a function of the whole run, and of these steps none
        optimizer=optim.make_optimizer(config.optim, phases[:1]),
    )


@partial(jax.jit, static_argnames=("recipe", "n_steps"))
def sweep(
    recipe: Recipe,
    state: TrainState,
    images: UInt8[Array, "n height width channels"],
    labels: Int[Array, "n"],
    key: Key[Array, ""],
    n_steps: int,
) -> tuple[Int[Array, ""], Float[Array, "n_steps"], Float[Array, "n_steps"]]:
    """Trains until the loss diverges, at most `n_steps`.

    Returns how many steps were run, their losses and the smoothed losses: running means, corrected
    for their start at 0. Diverged is a smoothed loss of four times the least, or one not finite.
    """
    order_key, step_key, flip_key = jax.random.split(key, 3)
    n, n_batches = len(images), -(-len(images) // recipe.batch_size)

    def body(carry: Any) -> Any:
        i, state, losses, smoothed, mean, _ = carry
        epoch = i // n_batches
        order = train.epoch_order(order_key, epoch, n, recipe.batch_size)
        index = devices.spread(order[i % n_batches])
        batch = train.take_batch(recipe, images, labels, index, flip_key, epoch)
        key = jax.random.fold_in(step_key, i)
        state, sums, _ = train.train_step(recipe, state, batch, key, is_last=jnp.array(False))
        loss = sums.loss / sums.count
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        corrected = mean / (1 - _SMOOTHING ** (i + 1.0))
        least = jnp.min(smoothed, initial=jnp.inf)
        diverged = ~(corrected <= _DIVERGED * least)
        losses, smoothed = losses.at[i].set(loss), smoothed.at[i].set(corrected)
        return i + 1, state, losses, smoothed, mean, diverged

    def goes_on(carry: Any) -> Array:
        return (carry[0] < n_steps) & ~carry[-1]

    start = jnp.zeros((), jnp.int32), state, *[jnp.full(n_steps, jnp.inf)] * 2, jnp.zeros(())
    n_run, _, losses, smoothed, *_ = jax.lax.while_loop(goes_on, body, (*start, jnp.array(False)))
    return n_run, losses, smoothed


def find(
    recipe: Recipe,
    state: TrainState,
    images: UInt8[np.ndarray, "n height width channels"],
    labels: Int[np.ndarray, "n"],
    key: Key[Array, ""],
    n_steps: int,
) -> Found:
    """Runs `sweep` with a recipe of `make_recipe`, and returns its steps of a finite loss.

    Raises:
        UserError: there are none, as the loss of the first step is not finite.
    """
    n_run, losses, smoothed = jax.device_get(
        sweep(recipe, state, jnp.array(images), jnp.array(labels), key, n_steps)
    )
    finite = np.isfinite(losses[:n_run]) & np.isfinite(smoothed[:n_run])
    if not finite.any():
        raise UserError(
            f"loss {losses[0]:g} at the first step, which no learning rate has changed: look at "
            "data.mean, data.std and, if it is set, init.checkpoint"
        )
    kept = slice(int(finite.sum()))
    rates = np.asarray(rising(np.arange(n_steps), n_steps))[kept]
    return Found(rates, losses[kept], smoothed[kept])
