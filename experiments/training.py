"""Trains the missing runs of an experiment."""

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from cnn_jax import fields
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.runs import outcome
from cnn_jax.runs.lines import NotFinite
from cnn_jax.runs.log import RunLog
from cnn_jax.tools.report import FinishedRun
from cnn_jax.tools.train import train
from experiments.store import Run, Store, load_data
from experiments.tables import CURVE, RESULTS, Row


def states(store: Store, variants: Sequence[str], seeds: int) -> Table:
    """Returns how far every run is, as a table."""
    table = Table("variant", "seed", "state", "test accuracy")
    for run in store.all_runs(variants, seeds):
        accuracy = _accuracy(store.row(run))
        table.add_row(run.variant, str(run.config.seed), store.state(run), accuracy)
    for variant in variants:
        if not store.runs(variant, seeds)[1]:
            table.add_row(variant, f"0-{seeds - 1}", "missing; its learning rate comes first", "")
    return table


def _accuracy(row: Row | None) -> str:
    accuracy = row["test_accuracy"] if row else None
    return "" if accuracy is None else f"{accuracy:.2%}"


def train_missing(store: Store, variants: Sequence[str], seeds: int, console: Console) -> None:
    """Trains or resumes the runs of `variants` that are not done, variant by variant.

    If there are any, all images are loaded, and rows of other images are not done either.

    Raises:
        stop.Stopped: a signal came; the current run is saved, and the next call resumes it.
        UserError: a workdir belongs to another config, to other images, or lacks the test
            accuracies of some epochs.
    """
    planned = store.all_runs(variants, seeds)
    rates_known = all(store.runs(variant, seeds)[1] for variant in variants)
    done = rates_known and all(map(store.row, planned)) and not store.different_images(planned)
    last = None
    for variant in variants:
        for part in (0, 1):  # the final runs are known once the tuning runs are done
            for run in store.runs(variant, seeds)[part]:
                if not done:
                    _load(store, run)
            for run in store.runs(variant, seeds)[part]:
                row = store.row(run)
                if row is None:
                    if last and replace(last, seed=run.config.seed) != run.config:
                        jax.clear_caches()  # a process can't hold hundreds of compiled programs
                    row, last = _train(store, run, console), run.config
                accuracy = ", test accuracy " + _accuracy(row) if _accuracy(row) else ""
                console.print(f"{run.name}: {store.state(run)}{accuracy}", markup=False)


def _load(store: Store, run: Run) -> ImageDataset:
    """Returns the images of a run, and lets the store know them."""
    dataset = load_data(run.config.data, run.config.runtime.cache_dir)
    store.images[run.config.data] = dataset.sha256
    return dataset


def _train(store: Store, run: Run, console: Console) -> Row:
    """Trains or resumes a run, and returns its row."""
    config, workdir = run.config, store.workdir(run)
    if run.pretraining and (pretraining := store.pretraining_run()):
        source = _pretrain(store, pretraining, console)
        # A folder of its own for each pretrained network, so that no two are mixed.
        workdir /= f"from-{source['params_sha256'][:8]}"
        init = replace(config.init, checkpoint=str(store.workdir(pretraining)))
        config = replace(config, init=init)
    _check_config(workdir, config)
    dataset = _load(store, run)
    console.print(f"{run.name}: starts", markup=False)
    try:
        finished = train(
            config,
            dataset,
            workdir,
            make_log=lambda path: RunLog(path, console),
            watch_test=store.experiment.figure.watch_test,
        )
    except NotFinite as error:
        console.print(f"{run.name}: {error}", markup=False)
        row = dict.fromkeys((*RESULTS, *store.experiment.measured))
        row |= _provenance(outcome.provenance(config, dataset)) | {"curve": []}
    else:
        row = _row(store, workdir, finished)
    return store.keep(run, row)


def _pretrain(store: Store, run: Run, console: Console) -> dict[str, Any]:
    """Returns the summary of the network that others start from, and trains it if it is missing."""
    workdir = store.workdir(run)
    _check_config(workdir, run.config)
    if store.row(run) is None or outcome.read(workdir) is None:
        _train(store, run, console)
    return outcome.read(workdir) or {}


def _check_config(workdir: Path, config: Config) -> None:
    path = workdir / "config.json"
    changes = fields.differences(fields.load(path), config) if path.exists() else []
    if changes:
        raise UserError(
            f"{workdir} belongs to another config ({'; '.join(changes)}); remove it, or choose "
            "another --runs"
        )


def _row(store: Store, workdir: Path, finished: FinishedRun) -> Row:
    """Returns the row of a finished run, with all that the experiment measures."""
    found, experiment, predictor = finished.summary, store.experiment, finished.predictor
    lines = [line for line in finished.metrics if "epoch" in line]
    curve = [{name: line.get(name) for name in CURVE} for line in lines]
    problem = ""
    if found["data"]["sha256"] != finished.dataset.sha256:
        problem = "was trained on other images"
    elif experiment.figure.watch_test and any(line["test_accuracy"] is None for line in curve):
        problem = "lacks the test accuracies of some epochs"
    if problem:
        raise UserError(f"{workdir} {problem}; remove it, or choose another --runs")
    validated = {line["epoch"]: line["validation_accuracy"] for line in curve}
    layers = inspection.summarize(predictor.model, predictor.seen_shape)
    row = {name: found.get(name) for name in RESULTS}
    row |= {
        "validation_accuracy": validated.get(found["epochs"]),
        "flops_per_image": sum(layer.flops for layer in layers),
        "curve": curve,
    }
    measured = experiment.measure(predictor, finished.dataset) if experiment.measure else {}
    row |= dict.fromkeys(experiment.measured) | measured | _provenance(found)
    infinite = [name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    return row | dict.fromkeys(infinite)  # None, since JSON has no such numbers


def _provenance(found: Any) -> Row:
    """Returns what a result depends on, from a summary."""
    device, versions = found["device"], found["versions"]
    where = f"{device['count']} x {device['kind']}, {device['cpu_count']} cores"
    return {
        "data": found["data"]["source"],
        "data_sha256": found["data"]["sha256"],
        "device": f"{where} of {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": outcome.commit(),
    }
