"""--mode=find_rate: suggests a learning rate from the losses under one that rises at every step.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3. Where the sweep
stops and what it suggests are as in the fastai library (Howard and Gugger, 2018).
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8
from rich.console import Console

from cnn_jax import batches, fit, kernels, memory, mesh
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, printable
from cnn_jax.order import epoch_order
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.step import Setup, TrainState, take_batch, train_step
from cnn_jax.tools import Request, report
from cnn_jax.tools.evaluate import load_dataset

LOWEST, HIGHEST = 1e-5, 10.0
STEPS = 100
"""Enough for a smooth curve; smaller data sets are passed through several times."""
_SMOOTHING = 0.9
"""Decay of the running mean of the losses."""
_DIVERGED = 4.0
"""The sweep stops when the smoothed loss exceeds this multiple of its minimum."""


def run(request: Request) -> None:
    """Trains a few steps with a rising learning rate, draws the losses, and suggests a rate.

    Raises:
        UserError: the loss of the first step is not finite, or the figure can't be written.
    """
    from cnn_jax import drawing  # imports matplotlib, which takes half a second

    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = RunFolder(request.workdir, lambda path: RunLog(path, console))
    with folder.claim(request.config):
        dataset = load_dataset(request.config, console)
        found = find(request.config, dataset, folder)
        figure = drawing.learning_rates(found.rates, found.losses, found.smoothed, found.suggested)
        path = request.workdir / "figures" / "learning_rates.png"
        report.write_file(path, drawing.png(figure))
    console.print(f"suggested: --optim.learning_rate={found.suggested:.2g}")
    console.print(printable(f"losses by learning rate: {path}"))


@dataclass(frozen=True)
class RateSweep:
    """The steps before the loss diverged."""

    rates: Float[np.ndarray, "n_steps"]
    losses: Float[np.ndarray, "n_steps"]
    smoothed: Float[np.ndarray, "n_steps"]

    @property
    def suggested(self) -> float:
        """A tenth of the learning rate at which the smoothed loss was lowest."""
        return float(self.rates[int(self.smoothed.argmin())]) / 10


@dataclass(frozen=True)
class SweepSetup(Setup):
    """A setup whose learning rate rises with every step."""

    n_steps: int = STEPS

    @cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        return partial(rising, n_steps=self.n_steps)


def rising(step: Any, n_steps: int) -> Any:
    """Returns the learning rate of a step: from LOWEST to HIGHEST, by a constant factor."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / max(n_steps - 1, 1))


def find(
    config: Config, dataset: ImageDataset, folder: RunFolder, n_steps: int = STEPS
) -> RateSweep:
    """Runs `sweep` from the parameters that training starts from.

    Returns the steps whose loss is finite.

    Raises:
        UserError: the loss of the first step is not finite.
    """
    # An average of the parameters is defined for a whole run, of which these steps are no part.
    train = replace(config.train, ema_decay=0.0, lookahead_steps=0)
    setup = replace(SweepSetup.of(replace(config, train=train), dataset), n_steps=n_steps)
    init_key, sweep_key = jax.random.split(jax.random.key(config.seed))
    images = _images(setup, dataset, sweep_key, n_steps)
    labels = mesh.replicate(dataset.train.labels)
    with kernels.use(config.runtime.kernels, config.model.precision):
        state = mesh.place(fit.start(config, setup, dataset, folder, init_key))
        found = sweep(setup, state, images, labels, mesh.replicate(sweep_key))
    n_run, losses, smoothed = jax.device_get(found)
    finite = np.isfinite(losses[:n_run]) & np.isfinite(smoothed[:n_run])
    if not finite.any():
        raise UserError(
            f"loss {losses[0]:g} at the first step, whatever the learning rate: check "
            "data.normalize and, if it is set, init.checkpoint"
        )
    kept = slice(int(finite.sum()))
    rates = np.asarray(rising(np.arange(n_steps), n_steps))[kept]
    return RateSweep(rates, losses[kept], smoothed[kept])


def _images(setup: Setup, dataset: ImageDataset, key: jax.Array, n_steps: int) -> jax.Array:
    """Returns all training images; of streamed ones, the batches of the sweep."""
    images = dataset.train.images
    if isinstance(images, np.ndarray):
        return mesh.lend(images)
    numbers = batches.step_numbers(setup, len(images), key)
    read = memory.empty_images(n_steps, len(numbers.places), *images.shape[1:])
    for step, batch in enumerate(read):
        batch[:] = images[numbers(step)]
    return mesh.divide(read, axis=1)


@partial(jax.jit, static_argnames="setup")
def sweep(
    setup: SweepSetup,
    state: TrainState,
    images: UInt8[Array, "..."],
    labels: Int[Array, "n"],
    key: Key[Array, ""],
) -> tuple[Int[Array, ""], Float[Array, "n_steps"], Float[Array, "n_steps"]]:
    """Trains until the loss diverges or `n_steps` of the setup have run.

    The loss has diverged when its smoothed value is not finite or exceeds four times its minimum.

    Returns:
        The number of steps that were run, their losses, and their smoothed losses: running means
        with the bias of their start at 0 removed. Beyond the last step the arrays hold infinity.
    """
    order_key, step_key, flip_key = jax.random.split(key, 3)

    def body(carry: Any) -> Any:
        i, state, losses, smoothed, mean, _ = carry
        epoch = i // setup.steps_per_epoch
        batch_size = setup.config.train.batch_size
        order = epoch_order(order_key, epoch, len(labels), batch_size, setup.passes)
        index = mesh.shard(order[i % setup.steps_per_epoch])
        shown = images[i] if setup.streamed else images
        batch = take_batch(setup, shown, labels, index, flip_key, epoch)
        key = jax.random.fold_in(step_key, i)
        state, sums, _ = train_step(setup, state, batch, key, with_norm=False)
        loss = sums.loss / sums.count
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        corrected = mean / (1 - _SMOOTHING ** (i + 1.0))
        diverged = ~(corrected <= _DIVERGED * jnp.min(smoothed, initial=jnp.inf))
        losses, smoothed = losses.at[i].set(loss), smoothed.at[i].set(corrected)
        return i + 1, state, losses, smoothed, mean, diverged

    def continues(carry: Any) -> Array:
        return (carry[0] < setup.n_steps) & ~carry[-1]

    infinite = jnp.full(setup.n_steps, jnp.inf)
    start = (jnp.zeros((), jnp.int32), state, infinite, infinite, jnp.zeros(()), jnp.array(False))
    n_run, _, losses, smoothed, *_ = jax.lax.while_loop(continues, body, start)
    return n_run, losses, smoothed
