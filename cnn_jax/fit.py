"""The training loop: compiled segments to the end, validation, checkpoints, resuming and hooks."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import numpy as np

from cnn_jax import capacity, kernels, losses, mesh, metrics, optim, pretrained, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, Split
from cnn_jax.data.dataset import Images
from cnn_jax.data.stream import BatchStream
from cnn_jax.errors import UserError
from cnn_jax.kernels import cores
from cnn_jax.models import inspection, whitening
from cnn_jax.order import StepNumbers
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import RunFolder
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

Hook = Callable[["Moment"], None]
"""A function that `fit` calls at the end of every epoch, or as often as `every` says."""
_Function = TypeVar("_Function", bound=Callable[..., Any])
Segment = Callable[[TrainState, int], tuple[TrainState, History]]


class NotFinite(UserError):
    """A run whose loss, gradient or state is no longer finite."""


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


@dataclass(frozen=True)
class Moment:
    """What a hook gets."""

    config: Config
    step: int
    """Training steps so far."""
    epoch: float
    """The same in epochs: a whole number at an epoch's end."""
    metrics: dict[str, Any]
    """The line of metrics.jsonl for this step (see `runs.log.RunLog`)."""
    make_predictor: Callable[[], Predictor]

    @cached_property
    def predictor(self) -> Predictor:
        """The network as it is now; usable until the hook returns."""
        return self.make_predictor()


def every(*, steps: int = 0, epochs: int = 0) -> Callable[[_Function], _Function]:
    """Marks a hook to be called every so many steps or every so many epochs.

    `@every(steps=100) def log(moment): ...`; an unmarked hook is called at every epoch's end.
    """
    if (steps > 0) == (epochs > 0):
        raise UserError("every(steps=N) or every(epochs=N): set one of them, to 1 or more")

    def mark(hook: _Function) -> _Function:
        setattr(hook, "every", ("steps", steps) if steps else ("epochs", epochs))  # noqa: B010
        return hook

    return mark


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
            open_batches(config, setup, dataset, train_key, step) as batches,
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
                lines = _metrics(step, history)
                lines[-1] |= _wait_share(batches, progress, seconds)
                step += len(lines)
                progress.skipped_steps += _mark_skipped(config, lines, state)
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
                _call_hooks(hooks, config, setup, lines[-1], predictor)
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


@contextlib.contextmanager
def open_batches(
    config: Config, setup: Setup, dataset: ImageDataset, key: jax.Array, step: int
) -> Iterator[BatchStream | None]:
    """Reads the batches of streamed images from a step on, while the block runs.

    Gives None if training needs no stream of them.
    """
    images = dataset.train.images
    if isinstance(images, np.ndarray) or config.train.cache_frozen or step >= setup.total_steps:
        yield None
        return
    numbers = step_numbers(setup, len(images), key)
    most = setup.config.runtime.segment_steps
    workers = config.runtime.workers
    batches = BatchStream(images, numbers, step, setup.total_steps, workers=workers, most=most)
    with contextlib.closing(batches):
        yield batches


def step_numbers(setup: Setup, n: int, key: jax.Array) -> StepNumbers:
    """Returns the order of `n` training images in which `train_segment` goes through them."""
    order_key = jax.random.split(key, 3)[0]  # as there
    batch_size = setup.config.train.batch_size
    data = tuple(jax.random.key_data(order_key).tolist())
    return StepNumbers(data, n, batch_size, setup.passes, mesh.own_places(batch_size))


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
    images_of = _images_of_segments(images, batches)
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


def _images_of_segments(images: Images, batches: BatchStream | None) -> Callable[[int], jax.Array]:
    """Returns what gives each segment its images: all there are, or the batches of its steps."""
    if batches is not None:
        return lambda n_steps: mesh.divide(batches.take(n_steps), axis=1)
    assert isinstance(images, np.ndarray)
    whole = mesh.lend(images)
    return lambda _: whole


def _wait_share(
    batches: BatchStream | None, progress: Progress, seconds: float
) -> dict[str, float]:
    """Counts how long the last segment waited for its images; returns the share of its time."""
    if batches is None:
        return {}
    progress.waited += batches.waited
    return {"wait_share": round(batches.waited / seconds, 4)}


def _segment_length(step: int, setup: Setup, hooks: Sequence[Hook]) -> int:
    """Returns the steps to the next one that the host must see, at most `segment_steps`."""
    done, most = step % setup.steps_per_epoch, setup.config.runtime.segment_steps
    lengths = [most - done % most, setup.steps_per_epoch - done]
    lengths += [n - step % n for unit, n in map(_frequency, hooks) if unit == "steps"]
    return min(lengths)


def _frequency(hook: Hook) -> tuple[str, int]:
    return getattr(hook, "every", ("epochs", 1))


def _call_hooks(
    hooks: Sequence[Hook],
    config: Config,
    setup: Setup,
    line: dict[str, Any],
    make_predictor: Callable[[], Predictor],
) -> None:
    step = line["step"]
    moment = Moment(config, step, step / setup.steps_per_epoch, line, make_predictor)
    for hook in hooks:
        unit, n = _frequency(hook)
        if step % (n if unit == "steps" else n * setup.steps_per_epoch) == 0:
            hook(moment)


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


def _metrics(step: int, history: History) -> list[dict[str, Any]]:
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


def _mark_skipped(config: Config, lines: list[dict[str, Any]], state: TrainState) -> int:
    """Marks the lines of skipped steps and returns their number.

    A gradient that is not finite shows in its own step's norm where that was computed, else in the
    next step's loss; or in the state, where an infinite bias before a ReLU hides from the losses.

    Raises:
        NotFinite: the run can't go on. Nothing of the segment has been recorded or saved.
    """
    figures = ("loss", "grad_norm")
    bad = [x for x in lines if not all(math.isfinite(x[k]) for k in figures if k in x)]
    finite = bool(trees.all_finite(state))
    if finite and (config.train.skip_nonfinite or not bad):
        for line in bad:
            line |= {"loss": None, "accuracy": None, "grad_norm": None, "skipped": True}
        return len(bad)
    line = (bad or lines[-1:])[0]
    raise NotFinite(
        f"loss {line['loss']:g}, learning rate {line['learning_rate']:g}, gradient norm "
        f"{line.get('grad_norm', math.nan):g} at step {line['step']}: no longer finite, and not "
        "saved; lower optim.learning_rate, or set optim.clip_norm or train.skip_nonfinite"
    )


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
