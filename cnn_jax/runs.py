"""A run's folder: who may write to it, what a finished run says of itself, and reading it back."""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import (
    checkpoint,
    config,
    devices,
    evaluate,
    files,
    loop,
    losses,
    models,
    report,
    side_by_side,
    trees,
)
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, one_line
from cnn_jax.report import Run
from cnn_jax.run_log import RunLog, read_metrics

# Matplotlib draws in one thread at a time.
_REPORTING = threading.Lock()

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def claim(workdir: Path, wanted: Config) -> Iterator[None]:
    """Makes `workdir` this run's own while the block runs, with `wanted` as its config.

    Raises:
        UserError: another run holds it, it was made by another config, or it can't be written.
    """
    with contextlib.ExitStack() as held:
        devices.on_main(lambda: held.enter_context(_claim(workdir, wanted)))
        yield


@contextlib.contextmanager
def _claim(workdir: Path, wanted: Config) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"workdir {workdir} can't be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"workdir {workdir} is in use by another process") from None
        check_config(workdir, wanted)
        try:
            config.save(wanted, workdir / "config.json")
            yield
        except OSError as error:  # of all that a run reads and writes; data has errors of its own
            raise UserError(f"{workdir} can't be written: {one_line(error)}") from None


def check_config(workdir: Path, wanted: Config) -> None:
    """Refuses a workdir that another config has made; a new one passes.

    Raises:
        UserError: names the fields that differ.
    """
    if not (workdir / "config.json").exists():
        if not workdir.is_dir():
            raise UserError(f"{workdir} does not exist; --workdir names a run's folder")
        if any(entry.name not in (".lock", "config.tmp") for entry in workdir.iterdir()):
            raise UserError(f"{workdir} holds other files and no config.json; choose a --workdir")
        return
    if changes := config.differences(config.load(workdir / "config.json"), wanted):
        raise UserError(
            f"{workdir} was made by another config ({'; '.join(changes)}); choose another --workdir"
        )


def check_single(workdir: Path, found: Config) -> None:
    """Refuses a workdir that holds the runs of several seeds.

    Raises:
        UserError: names the folder of the first.
    """
    if found.train.seeds > 1:
        raise UserError(
            f"{workdir} holds {found.train.seeds} runs; name one of them, such as "
            f"--workdir={workdir / f'seed-{found.seed}'}"
        )


def run(trainer: loop.Trainer, workdir: Path, log_in: Callable[[Path], RunLog]) -> dict[str, Any]:
    """Trains, evaluates once on the test set, and writes report.html and then summary.json.

    Returns what summary.json holds; where there is one, the run has ended.
    """
    return dict(_run(trainer, workdir, log_in).summary)


def _run(trainer: loop.Trainer, workdir: Path, log_in: Callable[[Path], RunLog]) -> Run:
    wanted, dataset = trainer.config, trainer.dataset
    log = log_in(workdir)
    state, progress = loop.fit(trainer, workdir, log)
    result = plain = trainer.evaluate(state, dataset.test)
    if wanted.augment.test_time != "none":
        plain = trainer.evaluate(state, dataset.test, "none")
    steps = int(state.step)
    sums = jax.device_get(state.epoch_sums)
    summary = {
        "config": config.to_dict(wanted),
        "seed": wanted.seed,
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_accuracy_plain": plain.accuracy,
        "train_accuracy": float(sums.correct / sums.count) if steps else None,
        "train_loss": float(sums.loss / sums.count) if steps else None,
        "best_epoch": progress.best_epoch or None,
        "best_validation_accuracy": progress.best_accuracy if progress.best_epoch else None,
        "epochs": steps // trainer.steps_per_epoch,
        "steps": steps,
        "skipped_steps": progress.skipped_steps,
        "images_per_second": progress.images / progress.seconds if steps else None,
        "seconds": progress.seconds,
        "param_count": trees.param_count(state.params),
        "params_sha256": trees.sha256(state.eval_variables["params"]),
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "counts": dataset.counts,
            "sha256": dataset.sha256,
        },
        "versions": versions(),
        "device": device(),
    }
    metrics = devices.on_main(lambda: read_metrics(workdir)) or []
    ended = Run(summary, metrics, dataset, trainer.recipe.model, state.eval_variables, result)

    def write() -> None:
        _write_report(workdir, ended, log)
        write_json(workdir / "summary.json", summary)

    with _REPORTING:
        devices.on_main(write)
    return ended


def _write_report(workdir: Path, ended: Run, log: RunLog) -> None:
    try:
        report.write(workdir, ended)
    except UserError:
        raise
    except Exception as error:  # What can't be drawn must not cost the result of a long training.
        log.warn(f"report.html was not written: {one_line(error)}")


def run_seeds(
    wanted: Config, dataset: ImageDataset, workdir: Path, log_in: Callable[..., RunLog]
) -> dict[str, Any]:
    """Runs each seed of `train.seeds` in a subfolder, as a run of its own.

    On several devices the seeds run side by side, each on one, where its bits are those of a single
    run on one device; there `log_in` is told `beside=True`. Elsewhere they run in turn. Each device
    compiles once. A seed that is finished is not run again.

    Returns what it writes to summary.json: mean and standard deviation (n - 1) of the test
    accuracies, and the seeds' summaries.

    Raises:
        UserError: one of them has ended so, and names its seed; the others are saved.
        stop.Stopped: SIGTERM or Ctrl-C came; all are saved, and a rerun goes on with them.
    """
    places = devices.places()
    with devices.only(places[0]):
        trainer = loop.Trainer(wanted, dataset)
    if len(places) > 1:
        log_in = partial(log_in, beside=True)

    def run_seed(seed: int) -> dict[str, Any]:
        one = trainer.with_seed(seed)
        folder = workdir / f"seed-{seed}"
        try:
            with claim(folder, one.config):
                return finished(folder) or run(one, folder, log_in)
        except UserError as error:
            raise type(error)(f"seed {seed}: {error}") from None

    seeds = range(wanted.seed, wanted.seed + wanted.train.seeds)
    summaries = side_by_side.call_each(run_seed, seeds, places)
    accuracies = [summary["test_accuracy"] for summary in summaries]
    total = {
        "config": config.to_dict(wanted),
        "test_accuracy_mean": fmean(accuracies),
        "test_accuracy_std": stdev(accuracies),
        "runs": summaries,
    }
    devices.on_main(lambda: write_json(workdir / "summary.json", total))
    return total


def finished(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended, or None.

    Raises:
        UserError: summary.json is damaged.
    """
    path = workdir / "summary.json"
    summary = devices.on_main(lambda: _read_summary(path) if path.exists() else None)
    return devices.agree(summary)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None
    needed = ("config", "test_accuracy", "test_loss", "steps", "params_sha256", "data", "device")
    if isinstance(summary, dict) and "runs" in summary:
        needed = ("config", "test_accuracy_mean", "test_accuracy_std")
    if not isinstance(summary, dict) or any(name not in summary for name in needed):
        raise UserError(f"{path} is not the summary of a run; remove it, and train again")
    return summary


def retrain(wanted: Config, dataset: ImageDataset, folder: Path, log: RunLog) -> str:
    """Trains in an empty folder and returns the hash of the parameters."""
    state, _ = loop.fit(loop.Trainer(wanted, dataset), folder, log)
    return trees.sha256(state.eval_variables["params"])


def changed_surroundings(summary: dict[str, Any]) -> list[str]:
    """Returns "name: old -> new" for each version and device property that is another now."""
    old = summary["versions"] | {f"device {k}": v for k, v in summary["device"].items()}
    new = versions() | {f"device {k}": v for k, v in device().items()}
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]


def versions() -> dict[str, str]:
    """Returns the versions that a run's bits may depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def device() -> dict[str, Any]:
    """Returns what the run's arithmetic was done on."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": devices.count(),
        "cpu_count": devices.usable_cpus(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON as a whole or not at all."""
    files.write(path, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class TrainedModel:
    """A network with the parameters that a run kept, ready to classify."""

    config: Config
    model: models.Classifier
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    step: int

    def logits(
        self, images: UInt8[np.ndarray, "n height width 3"]
    ) -> Float[np.ndarray, "n classes"]:
        """Returns the float32 logits of images of `image_shape`, normalised as in training."""
        return evaluate.logits(
            self.model,
            self.variables,
            images,
            mean=self.config.data.mean,
            std=self.config.data.std,
            test_time=self.config.augment.test_time,
        )


def load_trained(workdir: Path, run_config: Config, kind: str = "") -> TrainedModel:
    """Returns the trained network in a workdir.

    `kind` is "latest" or "best"; empty, it is the one that the run itself reported on.

    Raises:
        UserError: no whole checkpoint of that kind is there.
    """
    check_single(workdir, run_config)
    kind = kind or run_config.train.reported_kind
    variables, loaded = checkpoint.load_variables(workdir, kind)
    class_names = tuple(loaded.record["class_names"])
    return TrainedModel(
        config=run_config,
        model=models.build(run_config.model, len(class_names)),
        variables=variables,
        class_names=class_names,
        image_shape=tuple(loaded.record["image_shape"]),
        step=loaded.step,
    )


def check_classes(workdir: Path, trained: TrainedModel, dataset: ImageDataset) -> None:
    """Refuses images of other classes than those that a network was trained on.

    Raises:
        UserError: names the workdir.
    """
    if dataset.class_names != trained.class_names:
        raise UserError(f"the classes of the images are not those {workdir} was trained on")


def load_ended(workdir: Path, run_config: Config, dataset: ImageDataset, kind: str = "") -> Run:
    """Returns a finished run, with what its network makes of the test images of `dataset`.

    Raises:
        UserError: it is not finished, or was trained on images of other classes.
    """
    trained = load_trained(workdir, run_config, kind)
    summary = finished(workdir)
    if summary is None:
        raise UserError(f"{workdir} is not finished; the command that trains it goes on with it")
    check_classes(workdir, trained, dataset)
    logits = trained.logits(dataset.test.images)
    test = evaluate.score(logits, dataset.test.labels, losses.from_config(run_config.train))
    epochs = trained.step // -(-len(dataset.train) // run_config.train.batch_size)
    summary = {**summary, "epochs": epochs}  # those of `kind`
    return Run(summary, read_metrics(workdir), dataset, trained.model, trained.variables, test)


def train(wanted: Config, dataset: ImageDataset, workdir: Path) -> Run:
    """Trains or resumes a run of one seed, and returns it: all of it in one call, for notebooks.

    Raises:
        UserError: the workdir belongs to another config or process, or the run is not finite.
    """
    with claim(workdir, wanted):
        if finished(workdir) is None:
            ended = _run(loop.Trainer(wanted, dataset), workdir, RunLog)
            return replace(ended, summary=finished(workdir))  # as it is read back ever after
        return load_ended(workdir, wanted, dataset)
