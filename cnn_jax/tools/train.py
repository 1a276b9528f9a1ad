"""--mode=train: trains or resumes a run, evaluates it once on the test set, and reports on it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cnn_jax import data, metrics, trees, user_code
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, printable
from cnn_jax.fit import Result, evaluate, fit
from cnn_jax.hooks import Hook
from cnn_jax.metrics import Evaluation
from cnn_jax.predictor import Predictor
from cnn_jax.runs import outcome, processes
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.lines import NotFinite
from cnn_jax.runs.log import RunLog
from cnn_jax.tools import Request, report
from cnn_jax.tools.evaluate import load_dataset, print_classes
from cnn_jax.tools.report import FinishedRun

_MANY_SKIPPED = 0.1
"""Share of skipped steps from which a run gets a warning."""
_WIDE = 0.05
"""Difference of two accuracies that is not noise, and gets a warning."""

MakeFolder = Callable[[Path], RunFolder]


def run(request: Request) -> None:
    """Trains every seed of the config that is not finished, and prints the results."""
    config, workdir, shared = request.config, request.workdir, request.distributed
    quiet = shared and not processes.is_main()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    folder_type = processes.SharedFolder if shared else RunFolder
    hooks = [user_code.load(name) for name in request.hooks]

    def make_folder(path: Path) -> RunFolder:
        return folder_type(path, lambda path: RunLog(path, console))

    folder = make_folder(workdir)
    if found := folder.finished(config):
        _check_photos(config, workdir, found)
    with folder.claim(config):
        found = folder.finished(config)
        if found:
            console.print(f"{workdir} is finished; to train again, choose another --workdir")
        else:
            dataset = load_dataset(config, console)
            if shared:
                processes.check_same_data(dataset.sha256, dataset.is_streamed)
            summaries = []
            for one, part in _each_seed(config, folder, make_folder):
                with _errors_named(config, one):
                    if not (ended := part.finished(one)):
                        finished = finish(one, dataset, part, fit(one, dataset, part, hooks))
                        ended = dict(finished.summary)
                        if dataset.test.files:
                            print_classes(
                                console, finished.predictor, finished.test, dataset.test.files
                            )
                    summaries.append(ended)
            found = _join(config, folder, summaries)
    _print_result(console, found)
    console.print(f"Run folder: {workdir}")


def train(
    config: Config,
    dataset: ImageDataset,
    workdir: Path,
    *,
    make_log: Callable[[Path], RunLog] = RunLog,
    hooks: Sequence[Hook] = (),
    watch_test: bool = False,
) -> FinishedRun:
    """Trains or resumes a run of one seed, or reads it back if it is finished: for Python programs.

    Raises:
        UserError: the workdir belongs to another config or process, or the run is not finite.
    """
    folder = RunFolder(workdir, make_log)
    with folder.claim(config):
        if folder.finished(config) is not None:
            return report.load_finished(workdir, config, dataset)
        result = fit(config, dataset, folder, hooks, watch_test)
        finished = finish(config, dataset, folder, result)
        return replace(finished, summary=outcome.read(workdir) or {})  # as it is read back later


def finish(
    config: Config,
    dataset: ImageDataset,
    folder: RunFolder,
    result: Result,
    calibrated: bool = False,
) -> FinishedRun:
    """Evaluates a trained network once on the test set, and writes report.html and summary.json.

    With a validation part the temperature of its probabilities is fitted on that, unless it is
    `calibrated` already.

    Raises:
        NotFinite: the network's outputs are not finite. Nothing is written.
    """
    predictor = result.predictor
    test = plain = evaluate(predictor, dataset.test)
    if not math.isfinite(test.loss):
        raise NotFinite(
            f"test loss {test.loss:g} after {predictor.step} steps, of which "
            f"{result.progress.skipped_steps} were skipped: the network's outputs are not finite; "
            "lower optim.learning_rate, or set optim.clip_norm, and choose another --workdir"
        )
    if dataset.validation is not None and not calibrated:
        validation = evaluate(predictor, dataset.validation)
        temperature = metrics.fit_temperature(validation.logits, validation.labels)
        predictor = replace(predictor, temperature=temperature)
    if config.augment.test_time != "none" or config.train.ema_decay:
        plain = evaluate(_without_average(result), dataset.test, "none")
    figures = metrics.figures(test, dataset.class_names, predictor.temperature)
    found = (
        outcome.provenance(config, dataset)
        | _figures(result)
        | _streaming(dataset, result)
        | {f"test_{name}": figure for name, figure in figures.items()}
        | {
            "test_loss": test.loss,
            "test_accuracy_plain": plain.accuracy,
            "temperature": predictor.temperature,
            "warnings": _warnings(config, dataset, result, test, plain),
        }
    )
    finished = FinishedRun(found, folder.read_metrics(), dataset, predictor, test)
    folder.finish(found, lambda: report.write(folder.path, finished))
    return finished


def _streaming(dataset: ImageDataset, result: Result) -> dict[str, Any]:
    """Returns how streamed images were read; nothing for those in memory."""
    if not dataset.is_streamed:
        return {}
    progress = result.progress
    return {
        "wait_share": progress.waited / progress.seconds if progress.seconds else None,
        "replaced_photos": len(dataset.replaced),
    }


def _without_average(result: Result) -> Predictor:
    """Returns the network with the parameters themselves in place of `train.ema_decay`'s average.

    Lookahead's average is what training continues from, so it stays.
    """
    if not result.setup.config.train.ema_decay:
        return result.predictor
    variables = {"params": result.state.params, "batch_stats": result.state.batch_stats}
    return replace(result.predictor, variables=variables)


def _warnings(
    config: Config, dataset: ImageDataset, result: Result, test: Evaluation, plain: Evaluation
) -> list[str]:
    """Returns what to know before one trusts a result."""
    train_counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    lines = metrics.class_warnings(dataset.class_names, train_counts, test.confusion)
    skipped, steps = result.progress.skipped_steps, int(result.state.step)
    if skipped > _MANY_SKIPPED * steps:
        lines.append(
            f"{skipped} of {steps} steps were skipped because their loss or gradient was not "
            "finite: lower optim.learning_rate, or set optim.clip_norm"
        )
    if config.train.ema_decay and abs(test.accuracy - plain.accuracy) > _WIDE:
        lines.append(
            f"the averaged parameters reach {test.accuracy:.1%} and the last ones "
            f"{plain.accuracy:.1%}: train.ema_decay={config.train.ema_decay:g} does not suit a run "
            f"of {steps} steps"
        )
    return lines


def _figures(result: Result) -> dict[str, Any]:
    """Returns the figures of a run's training for its summary."""
    state, progress, steps = result.state, result.progress, int(result.state.step)
    sums = jax.device_get(state.epoch_sums)
    return {
        "train_accuracy": float(sums.correct / sums.count) if steps else None,
        "train_loss": float(sums.loss / sums.count) if steps else None,
        "best_epoch": progress.best_epoch or None,
        f"best_validation_{result.setup.config.train.monitor}": progress.best,
        "epochs": steps // result.setup.steps_per_epoch,
        "steps": steps,
        "skipped_steps": progress.skipped_steps,
        "images_per_second": progress.images / progress.seconds if steps else None,
        "seconds": progress.seconds,
        "param_count": trees.param_count(state.params),
        "params_sha256": trees.sha256(state.eval_variables["params"]),
    }


def _each_seed(
    config: Config, folder: RunFolder, make_folder: MakeFolder
) -> Iterator[tuple[Config, RunFolder]]:
    """Yields the config and the claimed folder of each seed: for one seed, the run's own."""
    if config.runtime.seeds == 1:
        outcome.check_single(folder.path)
        yield config, folder
        return
    if (folder.path / "checkpoints").is_dir():
        raise UserError(f"{folder.path} holds a single run; choose another --workdir for seeds")
    for seed in range(config.seed, config.seed + config.runtime.seeds):
        one = replace(config, seed=seed, runtime=replace(config.runtime, seeds=1))
        part = make_folder(folder.path / f"seed-{seed}")
        with part.claim(one):
            yield one, part


@contextlib.contextmanager
def _errors_named(config: Config, one: Config) -> Iterator[None]:
    """Puts the seed before the message of an error, where there are several."""
    try:
        yield
    except UserError as error:
        if config.runtime.seeds == 1:
            raise
        raise type(error)(f"seed {one.seed}: {error}") from None


def _join(config: Config, folder: RunFolder, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary of all seeds; of several, it also writes it."""
    if config.runtime.seeds == 1:
        return summaries[0]
    found = outcome.of_seeds(config, summaries)
    folder.finish(found, lambda: None)
    return found


def _check_photos(config: Config, workdir: Path, found: dict[str, Any]) -> None:
    """Refuses to report a finished run for photos that were added, removed or changed since."""
    if config.data.name != "folder" or not Path(config.data.dir).expanduser().exists():
        return
    trained_on = found.get("runs", [found])[0]["data"]["sha256"]
    # Streamed, as their hash needs no decoded photo.
    if data.load(config.data, config.runtime.cache_dir, "stream").sha256 != trained_on:
        raise UserError(
            f"{workdir} is finished, and the photos in {config.data.dir} have changed since; "
            "choose another --workdir to train on them"
        )


def _print_result(console: Console, found: dict[str, Any]) -> None:
    several = "runs" in found
    for one in found.get("runs", [found]):
        start = f"seed {one['seed']}: " if several else ""
        for line in _result(one):
            console.print(printable(start + line))
    if several:
        console.print(
            f"{len(found['runs'])} seeds: test accuracy {found['test_accuracy_mean']:.2%}, "
            f"standard deviation {found['test_accuracy_std']:.2%}"
        )


def _result(found: dict[str, Any]) -> list[str]:
    """Returns the result of one run: its figures, and what to know about them."""
    line = f"test accuracy {found['test_accuracy']:.2%}, test loss {found['test_loss']:.4f}"
    if found["steps"]:
        line += (
            f" after {found['epochs']} epochs ({found['seconds']:.1f} s of training, "
            f"{found['images_per_second']:,.0f} images/s)"
        )
    if found["skipped_steps"]:
        line += f"; {found['skipped_steps']} of {found['steps']} steps skipped, as not finite"
    if "warnings" not in found:  # A run of an older version.
        return [line]
    figures = {name.removeprefix("test_"): value for name, value in found.items()}
    return [
        line,
        *metrics.format_figures(figures),
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]
