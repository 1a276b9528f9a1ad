"""Training: a pure step, compiled segments of steps, and `fit`, which runs them to the end."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax import augment, evaluate, losses, models, optim
from cnn_jax.checkpoint import Checkpoints
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, Split
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog
from cnn_jax.stop import on_signals

Images = UInt8[Array, "batch height width channels"]


@dataclass(frozen=True)
class Recipe:
    """All of training that is compiled in: pure functions and constants, no arrays."""

    model: models.Classifier
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss: Callable[[Array, Array], Array]
    """Logits and labels to one loss an example."""
    normalize: Callable[[Images], Array]
    augment: Callable[[Array, Array], Array]
    """Normalised images and a key to changed images."""
    batch_size: int
    accumulate: int
    ema_decay: float
    max_segment: int


@struct.dataclass
class Sums:
    """Totals over examples, to be divided once on the host."""

    loss: Float[Array, "*steps"]
    correct: Float[Array, "*steps"]
    count: Float[Array, "*steps"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> "Sums":
        """Returns empty totals."""
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))


@struct.dataclass
class History:
    """What a segment tells of each of its steps: arrays [max_segment], 0 where no step was run."""

    sums: Sums
    learning_rate: Float[Array, "steps"]


@struct.dataclass
class TrainState:
    """Everything that changes in training: with the config it determines all that follows."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    """Averaged parameters, or None where `ema_decay` is 0."""
    epoch_sums: Sums
    """Totals of the current epoch so far."""

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are evaluated, and whose hash a run reports."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


@struct.dataclass
class Batch:
    """Examples on the device; `mask` is 1 for real ones and 0 for padding."""

    images: Images
    labels: Int[Array, "batch"]
    mask: Float[Array, "batch"]


def make_recipe(config: Config, n_classes: int, steps_per_epoch: int) -> Recipe:
    """Builds the compiled-in part of training from a config."""
    schedule = optim.make_schedule(config.optim, steps_per_epoch, config.train.epochs)
    return Recipe(
        model=models.build(config.model, n_classes),
        optimizer=optim.make_optimizer(config.optim, schedule),
        schedule=schedule,
        loss=losses.from_config(config.train),
        normalize=partial(augment.normalize, mean=config.data.mean, std=config.data.std),
        augment=partial(
            augment.augment,
            flip_images=config.augment.flip,
            translate_pixels=config.augment.translate,
            cutout_side=config.augment.cutout,
        ),
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
        max_segment=config.train.segment_steps,
    )


@partial(jax.jit, static_argnames=("recipe", "image_shape"))
def init_state(
    recipe: Recipe, key: Key[Array, ""], image_shape: tuple[int, int, int]
) -> TrainState:
    """Returns the state before the first step, a function of `key` alone."""
    variables = recipe.model.init(key, jnp.zeros((1, *image_shape)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=recipe.optimizer.init(params),
        ema_params=params if recipe.ema_decay else None,
        epoch_sums=Sums.zeros(),
    )


def epoch_order(
    key: Key[Array, ""], epoch: Int[Array, ""], n: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """Returns the examples of each step of an epoch: every index once, then -1 as padding."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), n)
    padding = -n % batch_size
    return jnp.pad(order, (0, padding), constant_values=-1).reshape(-1, batch_size)


def _gradients(
    recipe: Recipe, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Any, Any, Sums]:
    """Returns the gradient of the mean loss, the new batch statistics, and the totals."""
    total = jnp.sum(batch.mask)

    def mean_loss(params: Any, batch_stats: Any, part: Batch, key: Array) -> tuple[Array, Any]:
        dropout_key, augment_key = jax.random.split(key)
        images = recipe.augment(recipe.normalize(part.images), augment_key)
        logits, mutated = recipe.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )  # pyright: ignore[reportGeneralTypeIssues]
        each = recipe.loss(logits, part.labels) * part.mask
        correct = (jnp.argmax(logits, axis=-1) == part.labels) * part.mask
        sums = Sums(jnp.sum(each), jnp.sum(correct), jnp.sum(part.mask))
        return sums.loss / total, (sums, mutated.get("batch_stats", {}))

    grad = jax.grad(mean_loss, has_aux=True)
    if recipe.accumulate == 1:
        grads, (sums, batch_stats) = grad(state.params, state.batch_stats, batch, key)
        return grads, batch_stats, sums

    def add_part(carry: Any, part: Any) -> tuple[Any, None]:
        grads, batch_stats, sums = carry
        batch, index = part
        part_key = jax.random.fold_in(key, index)
        new_grads, (new_sums, batch_stats) = grad(state.params, batch_stats, batch, part_key)
        carry = jax.tree.map(jnp.add, grads, new_grads), batch_stats
        return (*carry, jax.tree.map(jnp.add, sums, new_sums)), None

    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate)
    parts = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)
    start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats, Sums.zeros())
    (grads, batch_stats, sums), _ = jax.lax.scan(
        add_part, start, (parts, jnp.arange(recipe.accumulate))
    )
    return grads, batch_stats, sums


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[TrainState, Sums]:
    """Returns the state after one update on `batch`, and the batch's totals before it.

    Pure: dropout and augmentation are functions of `key`, which no other step may use.
    """
    grads, batch_stats, sums = _gradients(recipe, state, batch, key)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if recipe.ema_decay:
        ema_params = optax.incremental_update(params, ema_params, 1 - recipe.ema_decay)
    state = replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=ema_params,
        epoch_sums=jax.tree.map(jnp.add, state.epoch_sums, sums),
    )
    return state, sums


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_segment(
    recipe: Recipe,
    state: TrainState,
    images: UInt8[Array, "n height width channels"],
    labels: Int[Array, "n"],
    key: Key[Array, ""],
    n_steps: Int[Array, ""],
) -> tuple[TrainState, History]:
    """Runs `n_steps` steps, at most `max_segment` and all within one epoch, without the host.

    The number of steps is data, not shape: one program serves segments of every length, and a
    step's bits do not depend on the segment that it falls into.
    """
    order_key, step_key = jax.random.split(key)
    n = len(images)
    steps_per_epoch = -(-n // recipe.batch_size)
    order = epoch_order(order_key, state.step // steps_per_epoch, n, recipe.batch_size)
    starts_epoch = state.step % steps_per_epoch == 0
    state = replace(
        state, epoch_sums=jax.tree.map(lambda x: jnp.where(starts_epoch, 0, x), state.epoch_sums)
    )

    def body(i: Array, carry: tuple[TrainState, History]) -> tuple[TrainState, History]:
        state, history = carry
        rate = jnp.asarray(recipe.schedule(state.step), jnp.float32)
        index = order[state.step % steps_per_epoch]
        batch = Batch(images[index], labels[index], (index >= 0).astype(jnp.float32))
        state, sums = train_step(recipe, state, batch, jax.random.fold_in(step_key, state.step))
        now = History(sums, rate)
        return state, jax.tree.map(lambda array, value: array.at[i].set(value), history, now)

    steps = (recipe.max_segment,)
    start = state, History(Sums.zeros(steps), jnp.zeros(steps))
    return jax.lax.fori_loop(0, n_steps, body, start)


@dataclass
class Progress:
    """What `fit` knows beside the arrays; saved in the record of every checkpoint."""

    seconds: float = 0.0
    """Spent in training segments, over all the processes that took part."""
    best_accuracy: float = -1.0
    """Best validation accuracy so far; -1 before the first."""
    best_epoch: int = 0


class Trainer:
    """One run: a recipe, its data on the device, and the functions of them that the host calls."""

    def __init__(self, config: Config, dataset: ImageDataset) -> None:
        self.config = config
        self.dataset = dataset
        self.steps_per_epoch = -(-len(dataset.train) // config.train.batch_size)
        self.total_steps = self.steps_per_epoch * config.train.epochs
        self.recipe = make_recipe(config, len(dataset.class_names), self.steps_per_epoch)
        self._init_key, self._train_key = jax.random.split(jax.random.key(config.seed))
        self._images = jnp.asarray(dataset.train.images)
        self._labels = jnp.asarray(dataset.train.labels)

    def init(self) -> TrainState:
        """Returns the state before the first step."""
        return init_state(self.recipe, self._init_key, self.dataset.image_shape)

    def segment_length(self, step: int) -> int:
        """Returns the steps to the next multiple of `segment_steps` in the epoch, or its end."""
        done = step % self.steps_per_epoch
        length = self.recipe.max_segment
        return min(length - done % length, self.steps_per_epoch - done)

    def compile(self, state: TrainState) -> None:
        """Compiles the segment, so that no training time is spent on it."""
        args = (state, self._images, self._labels, self._train_key, jnp.int32(0))
        self._segment = train_segment.lower(self.recipe, *args).compile()

    def run_segment(self, state: TrainState, n_steps: int) -> tuple[TrainState, History]:
        """Runs steps and returns the state and their history as numpy arrays [n_steps].

        The state that is passed in is donated, so it must not be used again.
        """
        state, history = self._segment(
            state, self._images, self._labels, self._train_key, jnp.int32(n_steps)
        )
        return state, jax.tree.map(lambda x: np.asarray(x)[:n_steps], history)

    def evaluate(self, state: TrainState, split: Split) -> evaluate.Evaluation:
        """Returns loss, accuracy and confusion of the evaluated parameters on a split."""
        data = self.config.data
        logits = evaluate.logits(
            self.recipe.model, state.eval_variables, split.images, mean=data.mean, std=data.std
        )
        return evaluate.score(logits, split.labels, self.recipe.loss)

    def exhausted(self, progress: Progress, step: int) -> bool:
        """Says whether validation accuracy has not improved for `patience` epochs."""
        patience = self.config.train.patience
        return patience > 0 and step // self.steps_per_epoch - progress.best_epoch >= patience


def fit(trainer: Trainer, workdir: Path, log: RunLog) -> tuple[TrainState, Progress]:
    """Trains from the newest whole checkpoint in `workdir`, or from the start, to the end.

    Every epoch's end and every `checkpoint_seconds` save a checkpoint. With a validation split
    the best parameters are kept as well, and with `patience` they are what is returned.

    Raises:
        stop.Stopped: SIGTERM or Ctrl-C came; the state is saved and a rerun goes on from it.
        UserError: the loss is no longer finite, or the data is not what the checkpoint saw.
    """
    settings = trainer.config.train
    with (
        Checkpoints(workdir, "latest", settings.keep_checkpoints) as latest,
        Checkpoints(workdir, "best", 1) as best,
    ):
        state, progress = _resume(trainer, latest, log)
        step = int(state.step)
        with log.running(step, trainer.total_steps, trainer.steps_per_epoch), on_signals() as stop:
            trainer.compile(state)
            saved_at = time.monotonic()
            while step < trainer.total_steps and not trainer.exhausted(progress, step):
                start = time.perf_counter()
                state, history = trainer.run_segment(state, trainer.segment_length(step))
                seconds = time.perf_counter() - start
                progress.seconds += seconds
                lines = _metrics(step, history)
                step += len(lines)
                ends_epoch = step % trainer.steps_per_epoch == 0
                if ends_epoch:
                    lines[-1] |= _end_epoch(trainer, state, progress, best)
                log.segment(lines, float(np.sum(history.sums.count)) / seconds)
                due = time.monotonic() - saved_at >= settings.checkpoint_seconds
                if ends_epoch or due or stop.requested:
                    log.flush()
                    latest.save(step, state, _record(trainer, progress))
                    saved_at = time.monotonic()
                stop.raise_if_requested(step)
        if settings.patience and (restored := best.restore_newest(state, log.warn)):
            state = restored[0]
    return state, progress


def _resume(trainer: Trainer, latest: Checkpoints, log: RunLog) -> tuple[TrainState, Progress]:
    restored = latest.restore_newest(jax.eval_shape(trainer.init), log.warn)
    if restored is None:
        return trainer.init(), Progress()
    state, record = restored
    if record["data_sha256"] != trainer.dataset.sha256:
        raise UserError(
            "the images are not those that this workdir was trained on; restore them "
            "or choose another --workdir"
        )
    return state, Progress(**record["progress"])


def _record(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: all that prediction needs beside the arrays."""
    return {
        "progress": vars(progress),
        "class_names": list(trainer.dataset.class_names),
        "image_shape": list(trainer.dataset.image_shape),
        "data_sha256": trainer.dataset.sha256,
    }


def _metrics(step: int, history: History) -> list[dict[str, Any]]:
    """Returns a line for each step of a segment that began after `step` steps.

    Raises:
        UserError: a loss is not finite.
    """
    columns = {
        "loss": history.sums.loss / history.sums.count,
        "accuracy": history.sums.correct / history.sums.count,
        "learning_rate": history.learning_rate,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [
        {"step": number, **dict(zip(columns, row, strict=True))}
        for number, row in enumerate(rows, start=step + 1)
    ]
    for line in lines:
        if not math.isfinite(line["loss"]):
            raise UserError(
                f"loss {line['loss']} at step {line['step']}, learning rate "
                f"{line['learning_rate']:g}: lower optim.learning_rate or set optim.clip_norm"
            )
    return lines


def _end_epoch(
    trainer: Trainer, state: TrainState, progress: Progress, best: Checkpoints
) -> dict[str, float]:
    """Returns the epoch's figures; validates, and keeps the parameters if they are the best."""
    step, sums = jax.device_get((state.step, state.epoch_sums))
    epoch = int(step) // trainer.steps_per_epoch
    figures = {
        "epoch": epoch,
        "train_loss": float(sums.loss / sums.count),
        "train_accuracy": float(sums.correct / sums.count),
    }
    if trainer.dataset.validation is not None:
        result = trainer.evaluate(state, trainer.dataset.validation)
        figures |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy}
        if result.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = result.accuracy, epoch
            best.save(int(step), state, _record(trainer, progress))
    return figures
