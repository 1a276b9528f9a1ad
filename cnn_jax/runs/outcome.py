"""What a finished run states: results, provenance and environment; and its network, read back."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jax

from cnn_jax import fields, files, kernels, mesh, models, trees, user_code
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, one_line
from cnn_jax.kernels import cores
from cnn_jax.predictor import Predictor
from cnn_jax.runs import checkpoint

ESTIMATOR = "classifier.joblib"
"""In a run's folder, a classifier of scikit-learn in place of the network's head."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "TFDS_DATA_DIR")
_OF_A_RUN = ("config", "test_accuracy", "test_loss", "steps", "params_sha256", "data", "device")
_OF_SEEDS = ("config", "test_accuracy_mean", "test_accuracy_std", "runs")


def provenance(config: Config, dataset: ImageDataset) -> dict[str, Any]:
    """Returns what a result depends on: config, data, versions and device."""
    return {
        "config": fields.to_dict(config),
        "seed": config.seed,
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "counts": dataset.counts,
            "sha256": dataset.sha256,
        },
        "versions": versions(),
        "device": device(),
        "user_code": user_code.hashes(),
        "started": started(),
    }


def started() -> dict[str, Any]:
    """Returns what a command depends on beside its arguments: folder, interpreter, variables."""
    chosen = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_")) or name in _VARIABLES
    }
    return {"folder": os.getcwd(), "python": sys.executable, "variables": chosen}


def versions() -> dict[str, str]:
    """Returns the versions that a run's bits may depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def commit() -> str:
    """Returns the checked-out commit, marked if files differ from it, or "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def device() -> dict[str, Any]:
    """Returns what the run is computed on."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": mesh.device_count(),
        "cpu_count": cores.usable_cpus(),
        "kernels": kernels.active(),
    }


def environment_changes(found: dict[str, Any]) -> list[str]:
    """Returns "name: old -> new" for each version and device property that has changed."""
    old = found["versions"] | {f"device {k}": v for k, v in found["device"].items()}
    new = versions() | {f"device {k}": v for k, v in device().items()}
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]


def of_seeds(config: Config, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean and standard deviation (n - 1) of the seeds' test accuracies, and all runs."""
    accuracies = [found["test_accuracy"] for found in summaries]
    return {
        "config": fields.to_dict(config),
        "test_accuracy_mean": fmean(accuracies),
        "test_accuracy_std": stdev(accuracies),
        "runs": summaries,
    }


def is_of(found: dict[str, Any], wanted: Config) -> bool:
    """Returns whether a summary covers all epochs and seeds that a config asks for."""
    seeds = {one["seed"] for one in found.get("runs", [found])}
    all_seeds = seeds >= set(range(wanted.seed, wanted.seed + wanted.runtime.seeds))
    return all_seeds and found["config"]["train"]["epochs"] == wanted.train.epochs


def read(workdir: Path) -> dict[str, Any] | None:
    """Returns the contents of summary.json, or None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None
    needed = _OF_SEEDS if isinstance(found, dict) and "runs" in found else _OF_A_RUN
    if not isinstance(found, dict) or any(name not in found for name in needed):
        raise UserError(f"{path} is not the summary of a run; remove it, and train again")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    files.write(path, json.dumps(value, indent=2) + "\n")


def load_predictor(
    workdir: Path, config: Config, kind: str = "", with_classifier: bool = False
) -> Predictor:
    """Returns the trained network of a workdir with its preprocessing and its temperature.

    `kind` is "latest" or "best"; "" stands for the one that the run itself reported on. The
    temperature belongs to that one; other parameters have 1.

    Raises:
        UserError: there is no undamaged checkpoint of that kind; or, unless `with_classifier` is
            true, a classifier stands in place of the network's head.
    """
    check_single(workdir)
    if (workdir / ESTIMATOR).exists() and not with_classifier:
        raise UserError(
            f"{workdir} holds a classifier ({ESTIMATOR}), which only --mode=predict can use"
        )
    kind = kind or config.train.reported_kind
    variables, loaded = checkpoint.load_variables(workdir, kind)
    class_names = tuple(loaded.record["class_names"])
    height, width, channels = loaded.record["image_shape"]
    return Predictor(
        config=config,
        model=models.build(config.model, len(class_names)),
        variables=variables,
        class_names=class_names,
        image_shape=(height, width, channels),
        step=loaded.step,
        temperature=_temperature(workdir, variables["params"]),
    )


def _temperature(workdir: Path, params: Any) -> float:
    """Returns the temperature that a finished run's summary states for these parameters, or 1."""
    found = read(workdir) or {}
    stated = found.get("temperature", 1.0)
    fits = stated != 1.0 and trees.sha256(params) == found["params_sha256"]
    return stated if fits else 1.0


def check_single(workdir: Path) -> None:
    """Refuses a workdir that holds the runs of several seeds.

    Raises:
        UserError: names the folder of the first.
    """
    seeds = sorted(workdir.glob("seed-*"))
    if seeds and not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{workdir} holds the runs of several seeds; name one of them, such as "
            f"--workdir={seeds[0]}"
        )


def check_classes(workdir: Path, predictor: Predictor, dataset: ImageDataset) -> None:
    """Refuses images of other classes than those that a network was trained on.

    Raises:
        UserError: names the workdir.
    """
    if dataset.class_names != predictor.class_names:
        raise UserError(f"the classes of the images are not those that {workdir} was trained on")
