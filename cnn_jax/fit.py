"""The training loop: compiled segments to the end, validation, checkpoints, resuming and hooks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from cnn_jax import capacity, kernels, losses, mesh, metrics, optim, pretrained
from cnn_jax.batches import images_of_segments, open_stream
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, Split
from cnn_jax.data.stream import BatchStream
from cnn_jax.errors import UserError
from cnn_jax.hooks import Hook, call_hooks, frequency
from cnn_jax.kernels import cores
from cnn_jax.models import inspection, whitening
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.lines import lines_of, mark_skipped
from cnn_jax.runs.stop import Stopped
from cnn_jax.step import (
    History,
    Setup,
    TrainState,
    enter_phase,
    init_state,
    start_average,
    train_segment,
)

Segment = Callable[[TrainState, int], tuple[TrainState, History]]


@dataclass
class Progress:
    """What `fit` knows beside the arrays; stored in the record of every checkpoint."""

    seconds: float = 0.0
    """Spent in training segments, by all processes that have worked on the run."""
    images: int = 0
    """Examples trained on in that time."""
    waited: float = 0.0
    """Seconds of that time in which streamed images were not there yet."""
    best: float | None = None
    """Best validation figure so far, by `train.monitor`; None before the first."""
    best_epoch: int = 0
    skipped_steps: int = 0
    """Steps left out because their loss or gradient was not finite."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Progress":
        """Returns what `make_record` was called with."""
        found = dict(record["progress"])
        if "best_accuracy" in found:  # Until 0.2.0, when accuracy was all that could be monitored.
            accuracy = found.pop("best_accuracy")
            found["best"] = accuracy if found["best_epoch"] else None
        return cls(**found)


@dataclass(frozen=True)
class Result:
    """The end of a run: its last state, or with early stopping its best one."""

    setup: Setup
    state: TrainState
    progress: Progress
    predictor: Predictor


def fit(
    config: Config,
    dataset: ImageDataset,
    run: RunFolder,
    hooks: Sequence[Hook] = (),
    watch_test: bool = False,
) -> Result:
    """Trains from the newest undamaged checkpoint of `run`, or from the start, to the end.

    A checkpoint is saved at the end of every epoch and every `runtime.checkpoint_seconds`. With a
    validation split the best parameters are kept as well, and with `train.patience` they are the
    result. `watch_test` adds the test set's figures to every epoch's metrics; nothing is chosen by
    them.

    Raises:
        Stopped: SIGTERM or Ctrl-C came. The state is saved, and the same call resumes from it.
        NotFinite: the loss, the gradient or the state is no longer finite.
        UserError: config and data do not fit together, the data is not what the checkpoint was
            trained on, or with `train.patience` the best parameters are damaged.
    """
    setup = Setup.of(config, dataset)
    _check(config, dataset, setup)
    if (batch_size := setup.config.train.batch_size) < config.train.batch_size:
        run.log.say(
            f"train.batch_size={config.train.batch_size} is cut to {batch_size}, as there are "
            f"{len(dataset.train)} training images"
        )
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    with kernels.use(config.runtime.kernels, config.model.precision), run.training():
        state, progress = _resume(config, setup, dataset, run, init_key)
        step = int(state.step)
        with (
            run.log.running(step, setup.total_steps, setup.steps_per_epoch),
            open_stream(config, setup, dataset, train_key, step) as batches,
        ):
            segment, compiled_for, saved_at = None, None, time.monotonic()
            while step < setup.total_steps and not _exhausted(config, progress, step, setup):
                phase = setup.at(step // setup.steps_per_epoch)
                if segment is None or phase != compiled_for:
                    if step and phase != setup.at((step - 1) // setup.steps_per_epoch):
                        state = enter_phase(phase, state)
                    segment = compile_segment(config, phase, dataset, state, train_key, batches)
                    compiled_for = phase
                start = time.perf_counter()
                state, history = segment(state, _segment_length(step, setup, hooks))
                seconds = time.perf_counter() - start
                images = int(np.sum(history.sums.count))
                progress.seconds += seconds
                progress.images += images
                lines = lines_of(step, history)
                if batches is not None:
                    progress.waited += batches.waited
                    lines[-1]["wait_share"] = round(batches.waited / seconds, 4)
                step += len(lines)
                progress.skipped_steps += mark_skipped(config, lines, state)
                predictor = partial(_predictor, config, setup, state, dataset)
                ends_epoch = step % setup.steps_per_epoch == 0
                if ends_epoch:
                    lines[-1] |= _end_epoch(setup, dataset, predictor(), state, watch_test)
                    _keep_best(config, lines[-1], run, dataset, state, progress)
                run.log.segment(lines, images / seconds)
                due = time.monotonic() - saved_at >= config.runtime.checkpoint_seconds
                signum = run.stop_signal()
                if ends_epoch or due or signum:
                    run.save("latest", step, state, make_record(dataset, progress))
                    saved_at = time.monotonic()
                call_hooks(hooks, config, setup.steps_per_epoch, lines[-1], predictor)
                if signum:
                    raise Stopped(signum, step)
        if config.train.patience and progress.best_epoch:
            state = _restore_best(setup, run, progress, init_key)
    return Result(setup, state, progress, _predictor(config, setup, state, dataset))


def _check(config: Config, dataset: ImageDataset, setup: Setup) -> None:
    """Refuses a config that does not fit the data or the devices."""
    side = min(setup.image_shape[:2])
    if config.augment.translate >= side:
        raise UserError(f"augment.translate must be less than the images' side, {side}")
    if config.augment.cutout >= (side if config.augment.cutout_inside else 2 * side - 1):
        raise UserError(f"augment.cutout hides all of an image with sides of {side} pixels")
    if setup.total_steps >= 2**31:
        raise UserError(f"train.epochs: {setup.total_steps} steps are more than int32 can count")
    names = inspection.param_names(setup.model, setup.image_shape)
    optim.check_names(config.optim, setup.groups, names)
    if config.train.remat and not setup.recomputed:
        raise UserError(
            f"train.remat: model.name={config.model.name} has no blocks, only layers; set "
            "train.accumulate to save memory"
        )
    mesh.check_batch_size(setup.config.train.batch_size)
    capacity.check(setup, dataset)


def _resume(
    config: Config, setup: Setup, dataset: ImageDataset, run: RunFolder, key: jax.Array
) -> tuple[TrainState, Progress]:
    """Returns the state to resume from, placed on the devices, and the progress so far."""
    sha256 = dataset.sha256  # It is kept; now, since streamed photos may vanish and be replaced.
    restored = run.restore("latest", partial(_template, setup, key))
    if restored is None:
        return mesh.place(start(config, setup, dataset, run, key)), Progress()
    state, record = restored
    if record["data_sha256"] != sha256:
        raise UserError(
            "the images are not those that this workdir was trained on; restore them "
            "or choose another --workdir"
        )
    return mesh.place(state), Progress.of(record)


def _template(setup: Setup, key: jax.Array, step: int) -> TrainState:
    """Returns the structure of the state after `step` steps."""
    phase = setup.at(max(step - 1, 0) // setup.steps_per_epoch)
    return jax.eval_shape(partial(init_state, phase), key)


def start(
    config: Config, setup: Setup, dataset: ImageDataset, run: RunFolder, key: jax.Array
) -> TrainState:
    """Returns the state before the first step: from `key`, then as the section `init` says.

    Raises:
        UserError: what `init` names does not fit the network.
    """
    state, init = init_state(setup, key), config.init
    params, batch_stats = state.params, state.batch_stats
    if init.checkpoint:
        fresh = {"params": params, "batch_stats": batch_stats}
        found = run.read_once(lambda: pretrained.load_into(fresh, init, run.log.say), fresh)
        params, batch_stats = found["params"], found["batch_stats"]
    if init.whiten:
        images = dataset.train.images[: whitening.IMAGES]
        normalization = config.data.normalize
        params = whitening.whiten(setup.model, params, init.whiten, images, normalization)
    # As numpy arrays, since a buffer that is in a state twice could not be donated.
    average = jax.tree.map(np.asarray, start_average(setup, params, batch_stats))
    return replace(state, params=params, batch_stats=batch_stats, average=average)


def compile_segment(
    config: Config,
    setup: Setup,
    dataset: ImageDataset,
    state: TrainState,
    key: jax.Array,
    batches: BatchStream | None = None,
) -> Segment:
    """Returns the compiled segment, so that compiling is not counted as training time.

    The segment takes a state, which it donates, and a number of steps. It returns the new state
    and the steps' history as numpy arrays [n_steps]. The images of streamed data are taken from
    `batches`.
    """
    images, labels = dataset.train.images, dataset.train.labels
    if config.train.cache_frozen:
        trainable = optim.trainable_part(state.params, setup.groups)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        module = inspection.cut_point(setup.model, variables, setup.image_shape, trainable)
        setup = replace(setup, cached=module, streamed=False)
        predictor = _predictor(config, setup, state, dataset)
        images = predictor.activations(images, [module])[module]
    images_of = images_of_segments(images, batches)
    inputs = mesh.replicate((labels, key))
    zero = mesh.replicate(np.int32(0))
    options = kernels.compiler_options(bool(setup.recomputed))
    compiled = train_segment.lower(setup, state, images_of(0), *inputs, zero).compile(options)
    capacity.check_program(compiled, dataset)
    cores.trim_heap()

    def run(state: TrainState, n_steps: int) -> tuple[TrainState, History]:
        n = mesh.replicate(np.int32(n_steps))
        state, history = compiled(state, images_of(n_steps), *inputs, n)
        return state, jax.tree.map(lambda x: np.asarray(x)[:n_steps], history)

    return run


def _segment_length(step: int, setup: Setup, hooks: Sequence[Hook]) -> int:
    """Returns the steps to the next one that the host must see, at most `segment_steps`."""
    done, most = step % setup.steps_per_epoch, setup.config.runtime.segment_steps
    lengths = [most - done % most, setup.steps_per_epoch - done]
    lengths += [n - step % n for unit, n in map(frequency, hooks) if unit == "steps"]
    return min(lengths)


def _exhausted(config: Config, progress: Progress, step: int, setup: Setup) -> bool:
    """Returns whether `train.monitor` has not improved for `train.patience` epochs."""
    patience = config.train.patience
    return patience > 0 and step // setup.steps_per_epoch - progress.best_epoch >= patience


def _predictor(config: Config, setup: Setup, state: TrainState, dataset: ImageDataset) -> Predictor:
    return Predictor(
        config=config,
        model=setup.model,
        variables=state.eval_variables,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        step=int(state.step),
    )


def make_record(dataset: ImageDataset, progress: Progress) -> dict[str, Any]:
    """Returns a checkpoint's record: all that prediction and resuming need beside the arrays."""
    return {
        "progress": vars(progress),
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "data_sha256": dataset.sha256,
    }


def _end_epoch(
    setup: Setup, dataset: ImageDataset, predictor: Predictor, state: TrainState, watch_test: bool
) -> dict[str, float]:
    """Returns the epoch's figures.

    Raises:
        UserError: every step of the epoch was skipped.
    """
    sums = jax.device_get(state.epoch_sums)
    epoch = predictor.step // setup.steps_per_epoch
    if not sums.count:
        raise UserError(f"train.skip_nonfinite skipped every step of epoch {epoch}")
    figures = {
        "epoch": epoch,
        "train_loss": float(sums.loss / sums.count),
        "train_accuracy": float(sums.correct / sums.count),
    }
    if watch_test:
        result = evaluate(predictor, dataset.test)
        figures |= {"test_loss": result.loss, "test_accuracy": result.accuracy}
    if dataset.validation is not None:
        result = evaluate(predictor, dataset.validation)
        names = ("loss", "accuracy", "balanced_accuracy", "macro_f1")
        figures |= {f"validation_{name}": getattr(result, name) for name in names}
    return figures


def evaluate(
    predictor: Predictor, split: Split, test_time: str | None = None
) -> metrics.Evaluation:
    """Returns the training loss (dropout off), accuracy and confusion matrix on a split."""
    loss = losses.from_config(predictor.config.train)
    return metrics.score(predictor.logits(split.images, test_time), split.labels, loss)


def _keep_best(
    config: Config,
    line: dict[str, Any],
    run: RunFolder,
    dataset: ImageDataset,
    state: TrainState,
    progress: Progress,
) -> None:
    """Saves the state if its validation figure is the best so far; one of NaN logits is not."""
    if not math.isfinite(line.get("validation_loss", math.nan)):
        return
    figure, best = line[f"validation_{config.train.monitor}"], progress.best
    lower = config.train.monitor == "loss"
    if best is None or (figure < best if lower else figure > best):
        progress.best, progress.best_epoch = figure, line["epoch"]
        run.save("best", line["step"], state, make_record(dataset, progress))


def _restore_best(setup: Setup, run: RunFolder, progress: Progress, key: jax.Array) -> TrainState:
    restored = run.restore("best", partial(_template, setup, key))
    if restored is None:
        raise UserError(
            f"{run.path / 'checkpoints' / 'best'} holds no undamaged checkpoint of epoch "
            f"{progress.best_epoch}, the best; train again in another --workdir"
        )
    return mesh.place(restored[0])
