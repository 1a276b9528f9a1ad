"""Training as a run: segments to the end, validation, checkpoints, early stopping, resuming."""

import copy
import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax import devices, evaluate, models, optim, train, transfer, trees, whitening
from cnn_jax.checkpoint import Checkpoints
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, Split
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog
from cnn_jax.stop import Stopped, on_signals
from cnn_jax.train import TrainState

_COMPILING = threading.Lock()


class NotFinite(UserError):
    """A run whose loss, gradient or state is no longer finite."""


@dataclass
class Progress:
    """What `fit` knows beside the arrays; saved in the record of every checkpoint."""

    seconds: float = 0.0
    """Spent in training segments, over all the processes that took part."""
    images: int = 0
    """Examples trained on in that time."""
    best_accuracy: float = -1.0
    """Best validation accuracy so far; -1 before the first."""
    best_epoch: int = 0
    skipped_steps: int = 0
    """Steps passed over as their loss or gradient was not finite."""


class Trainer:
    """One run: a recipe, its data on the device, and the functions of them that the host calls.

    With `watch_test`, the figures of every epoch include the test set's, for a curve: nothing is
    chosen by them, and training is the same without.
    """

    def __init__(self, config: Config, dataset: ImageDataset, watch_test: bool = False) -> None:
        self.config = config
        self.dataset = dataset
        self.watch_test = watch_test
        self.steps_per_epoch = -(-len(dataset.train) // config.train.batch_size)
        self.total_steps = self.steps_per_epoch * config.train.epochs
        self._phases = optim.make_phases(
            config.optim, len(config.model.blocks), self.steps_per_epoch
        )
        self._recipes = [
            train.make_recipe(config, len(dataset.class_names), self.steps_per_epoch, phase)
            for phase in range(len(self._phases))
        ]
        self.recipe = self._recipes[0]
        names = models.param_names(self.recipe.model, dataset.image_shape)
        optim.check_groups("optim.decays", config.optim.decays, names)
        for _, groups in self._phases:
            optim.check_groups("optim.groups", groups, names)
        self._check_sizes()
        devices.check_batch_size(config.train.batch_size)
        self._examples = devices.replicate((dataset.train.images, dataset.train.labels))
        self._make_keys()

    def _check_sizes(self) -> None:
        augment, side = self.config.augment, min(self.dataset.image_shape[:2])
        if augment.translate >= side:
            raise UserError(f"augment.translate must be less than the images' side, {side}")
        if augment.cutout >= 2 * side - 1:
            raise UserError(f"augment.cutout hides all of images with sides of {side}")
        if self.total_steps >= 2**31:
            raise UserError(f"train.epochs: {self.total_steps} steps are more than int32 can count")

    def _make_keys(self) -> None:
        self._init_key, train_key = jax.random.split(jax.random.key(self.config.seed))
        self._train_key = devices.replicate(train_key)

    def with_seed(self, seed: int) -> "Trainer":
        """Returns the trainer of that seed alone, on the device of `devices.only`.

        On one device, or all, it shares data and compiled programs.
        """
        other = copy.copy(self)
        settings = replace(self.config.train, seeds=1)
        other.config = replace(self.config, seed=seed, train=settings)
        other.recipe = self._recipes[0]
        other._examples = devices.replicate(self._examples)
        other._make_keys()
        return other

    def init(self) -> TrainState:
        """Returns the state before the first step."""
        return train.init_state(self.recipe, self._init_key, self.dataset.image_shape)

    def start(self, log: RunLog) -> TrainState:
        """Returns the state before the first step, as `init` wants it.

        Raises:
            UserError: what that names does not fit the network.
        """
        state, init = self.init(), self.config.init
        params, batch_stats = state.params, state.batch_stats
        if init.checkpoint:
            fresh = {"params": params, "batch_stats": batch_stats}
            taken = devices.on_main(
                lambda: transfer.merge(transfer.load_variables(init), fresh, init)
            )
            params, batch_stats = devices.from_main(taken[:2] if taken else (params, batch_stats))
            if taken:
                log.say(taken[2])
        if init.whiten:
            images, data = self.dataset.train.images, self.config.data
            params = whitening.whiten(
                self.recipe.model, params, init.whiten, images, mean=data.mean, std=data.std
            )
        # As numpy arrays, since a buffer that is in a state twice could not be donated.
        average = jax.tree.map(np.asarray, train.start_average(self.recipe, params, batch_stats))
        return replace(state, params=params, batch_stats=batch_stats, average=average)

    def template(self, step: int) -> TrainState:
        """Returns the structure of the state after `step` steps, and takes up that phase."""
        self.recipe = self._recipes[optim.phase_at(self._phases, max(step - 1, 0))]
        return jax.eval_shape(self.init)

    def enter_phase(self, state: TrainState, step: int) -> TrainState:
        """Returns the state for the phase of `optim.phases` that the step after it belongs to."""
        recipe = self._recipes[optim.phase_at(self._phases, step)]
        if recipe is not self.recipe:
            self.recipe = recipe
            state = train.enter_phase(recipe, state)
            self.compile(state)
        return state

    def segment_length(self, step: int) -> int:
        """Returns the steps to the next multiple of `segment_steps` in the epoch, or its end."""
        done = step % self.steps_per_epoch
        length = self.recipe.max_segment
        return min(length - done % length, self.steps_per_epoch - done)

    def compile(self, state: TrainState) -> None:
        """Compiles the segment, so that no training time is spent on it.

        With `train.cache_frozen`, what the frozen layers make of the images is computed first. JAX
        remembers the program by the recipe, so trainers that share it compile it once.
        """
        if self.config.train.cache_frozen:
            self._cache_frozen(state)
        inputs = *self._examples, self._train_key, devices.replicate(np.int32(0))
        # In turn, since XLA compiles for one GPU and the others find that in JAX' cache.
        with _COMPILING:
            self.compiled = train.train_segment.lower(self.recipe, state, *inputs).compile()
        devices.trim_heap()

    def _cache_frozen(self, state: TrainState) -> None:
        shape, data = self.dataset.image_shape, self.config.data
        layer = models.first_trainable(
            self.recipe.model, shape, optim.trainable_part(state.params, self.recipe.groups)
        )
        self.recipe = replace(self.recipe, cache=models.LayerCache(layer, shape))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        inputs = evaluate.layer_inputs(
            self.recipe.model,
            variables,
            self.dataset.train.images,
            layer,
            mean=data.mean,
            std=data.std,
        )
        self._recipes = [self.recipe]
        self._examples = devices.replicate(inputs), self._examples[1]

    def run_segment(self, state: TrainState, n_steps: int) -> tuple[TrainState, train.History]:
        """Runs steps and returns the state and their history as numpy arrays [n_steps].

        The state that is passed in is donated, so it must not be used again.
        """
        steps = devices.replicate(np.int32(n_steps))
        state, history = self.compiled(state, *self._examples, self._train_key, steps)
        return state, jax.tree.map(lambda x: np.asarray(x)[:n_steps], history)

    def evaluate(
        self, state: TrainState, split: Split, test_time: str | None = None
    ) -> evaluate.Evaluation:
        """Returns loss, accuracy and confusion of the evaluated variables on a split.

        `test_time` is as in `AugmentConfig`; None stands for the config's own.
        """
        data, augment = self.config.data, self.config.augment
        logits = evaluate.logits(
            self.recipe.model,
            state.eval_variables,
            split.images,
            mean=data.mean,
            std=data.std,
            test_time=augment.test_time if test_time is None else test_time,
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
        UserError: the run is no longer finite, the data is not what the checkpoint saw, or with
            `patience` the best parameters are damaged.
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
                state = trainer.enter_phase(state, step)
                start = time.perf_counter()
                state, history = trainer.run_segment(state, trainer.segment_length(step))
                seconds = time.perf_counter() - start
                images = int(np.sum(history.sums.count))
                progress.seconds += seconds
                progress.images += images
                lines = _metrics(step, history)
                step += len(lines)
                progress.skipped_steps += _check_finite(settings.skip_nonfinite, lines, state)
                ends_epoch = step % trainer.steps_per_epoch == 0
                if ends_epoch:
                    lines[-1] |= _end_epoch(trainer, state, progress, best)
                log.segment(lines, images / seconds)
                due = time.monotonic() - saved_at >= settings.checkpoint_seconds
                signum = devices.largest(stop.requested)  # One process' signal stops them all.
                if ends_epoch or due or signum:
                    log.flush()
                    latest.save(step, state, _record(trainer, progress))
                    saved_at = time.monotonic()
                if signum:
                    raise Stopped(signum, step)
        if settings.patience and progress.best_epoch:
            restored = _restore(trainer, best, log)
            if restored is None:
                raise UserError(
                    f"{best.folder} holds no whole checkpoint of epoch {progress.best_epoch}, the "
                    "best; another --workdir trains anew"
                )
            state = devices.place(restored[0])
    return state, progress


def _restore(
    trainer: Trainer, store: Checkpoints, log: RunLog
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest whole state of a store, as numpy arrays, and its record, or None."""
    found = devices.on_main(lambda: store.restore_newest(trainer.template, log.warn))
    told = devices.agree(found and (int(found[0].step), found[1]))
    if told is None:
        return None
    step, record = told
    return devices.from_main(found[0] if found else trainer.template(step)), record


def _resume(trainer: Trainer, latest: Checkpoints, log: RunLog) -> tuple[TrainState, Progress]:
    restored = _restore(trainer, latest, log)
    if restored is None:
        return devices.place(trainer.start(log)), Progress()
    state, record = restored
    if record["data_sha256"] != trainer.dataset.sha256:
        raise UserError(
            "the images are not those that this workdir was trained on; restore them "
            "or choose another --workdir"
        )
    return devices.place(state), Progress(**record["progress"])


def _record(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: all that prediction needs beside the arrays."""
    return {
        "progress": vars(progress),
        "class_names": list(trainer.dataset.class_names),
        "image_shape": list(trainer.dataset.image_shape),
        "data_sha256": trainer.dataset.sha256,
    }


def _metrics(step: int, history: train.History) -> list[dict[str, Any]]:
    """Returns a line for each step of a segment that began after `step` steps."""
    columns = {
        "loss": history.sums.loss / history.sums.count,
        "accuracy": history.sums.correct / history.sums.count,
        "learning_rate": history.learning_rate,
        "grad_norm": history.grad_norm,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [
        {"step": number, **dict(zip(columns, row, strict=True))}
        for number, row in enumerate(rows, start=step + 1)
    ]
    for line in lines:
        if line["grad_norm"] == -1:
            del line["grad_norm"]
    return lines


def _check_finite(skip: bool, lines: list[dict[str, Any]], state: TrainState) -> int:
    """Stops a run that is no longer finite, before anything of the segment is recorded or saved.

    A gradient that is not finite is seen in its own step's norm where that was computed, else in
    the next step's loss; or in the state, where an infinite bias behind a ReLU hides from losses.

    Returns:
        How many steps were skipped; in their lines nothing is left but step and learning rate.

    Raises:
        NotFinite: names the first step that is not finite, or the last where none tells.
    """
    figures = ("loss", "grad_norm")
    bad = [x for x in lines if not all(math.isfinite(x[k]) for k in figures if k in x)]
    finite = bool(trees.all_finite(state))
    if finite and (skip or not bad):
        for line in bad:
            line |= {"loss": None, "accuracy": None, "grad_norm": None, "skipped": True}
        return len(bad)
    line = (bad or lines[-1:])[0]
    raise NotFinite(
        f"loss {line['loss']:g}, learning rate {line['learning_rate']:g}, gradient norm "
        f"{line['grad_norm']:g} at step {line['step']}: no longer finite, and not saved; lower "
        "optim.learning_rate, or set optim.clip_norm or train.skip_nonfinite"
    )


def _end_epoch(
    trainer: Trainer, state: TrainState, progress: Progress, best: Checkpoints
) -> dict[str, float]:
    """Returns the epoch's figures; validates, and keeps the parameters if they are the best."""
    step, sums = jax.device_get((state.step, state.epoch_sums))
    epoch = int(step) // trainer.steps_per_epoch
    if not sums.count:
        raise UserError(f"train.skip_nonfinite skipped every step of epoch {epoch}")
    figures = {
        "epoch": epoch,
        "train_loss": float(sums.loss / sums.count),
        "train_accuracy": float(sums.correct / sums.count),
    }
    if trainer.watch_test:
        result = trainer.evaluate(state, trainer.dataset.test)
        figures |= {"test_loss": result.loss, "test_accuracy": result.accuracy}
    if trainer.dataset.validation is not None:
        result = trainer.evaluate(state, trainer.dataset.validation)
        figures |= {"validation_loss": result.loss, "validation_accuracy": result.accuracy}
        if result.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = result.accuracy, epoch
            best.save(int(step), state, _record(trainer, progress))
    return figures
