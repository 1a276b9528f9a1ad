"""A run's folder: who may write to it, what a finished run says of itself, and reading it back."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cnn_jax import checkpoint, config, loop, models, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def claim(workdir: Path, wanted: Config) -> Iterator[None]:
    """Makes `workdir` this process' own while the block runs, with `wanted` as its config.

    Raises:
        UserError: another process holds it, it was made by another config, or it can't be written.
    """
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
        config.save(wanted, workdir / "config.json")
        yield


def check_config(workdir: Path, wanted: Config) -> None:
    """Refuses a workdir that another config has made; a new one passes.

    Raises:
        UserError: names the fields that differ.
    """
    if not (workdir / "config.json").exists():
        if not workdir.is_dir():
            raise UserError(f"{workdir} does not exist; --workdir names a run's folder")
        if any(entry.name != ".lock" for entry in workdir.iterdir()):
            raise UserError(f"{workdir} holds other files and no config.json; choose a --workdir")
        return
    if changes := config.differences(config.load(workdir / "config.json"), wanted):
        raise UserError(
            f"{workdir} was made by another config ({'; '.join(changes)}); choose another --workdir"
        )


def run(wanted: Config, dataset: ImageDataset, workdir: Path, log: RunLog) -> dict[str, Any]:
    """Trains, evaluates once on the test set, writes summary.json, and returns what it holds."""
    trainer = loop.Trainer(wanted, dataset)
    state, progress = loop.fit(trainer, workdir, log)
    result = trainer.evaluate(state, dataset.test)
    steps = int(state.step)
    sums = jax.device_get(state.epoch_sums)
    summary = {
        "config": config.to_dict(wanted),
        "seed": wanted.seed,
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "train_accuracy": float(sums.correct / sums.count) if steps else None,
        "train_loss": float(sums.loss / sums.count) if steps else None,
        "best_epoch": progress.best_epoch or None,
        "best_validation_accuracy": progress.best_accuracy if progress.best_epoch else None,
        "epochs": steps // trainer.steps_per_epoch,
        "steps": steps,
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
    write_json(workdir / "summary.json", summary)
    return summary


def finished(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended, or None."""
    path = workdir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


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
        "count": jax.device_count(),
        "cpu_count": os.cpu_count(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


@dataclass(frozen=True)
class TrainedModel:
    """A network with the parameters that a run kept, ready to classify."""

    config: Config
    model: models.Classifier
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    step: int


def load_trained(workdir: Path, run_config: Config, kind: str = "") -> TrainedModel:
    """Returns the trained network in a workdir.

    `kind` is "latest" or "best"; empty, it is the one that the run itself reported on.

    Raises:
        UserError: no whole checkpoint of that kind is there.
    """
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
