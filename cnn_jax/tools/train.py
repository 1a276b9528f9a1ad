"""--mode=train: trains or resumes a run, evaluates it once on the test set, and reports on it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from cnn_jax import data, trees, user_code
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.fit import Hook, Result, evaluate, fit
from cnn_jax.runs import outcome, processes
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.tools import Request, report
from cnn_jax.tools.evaluate import load_dataset, print_evaluation
from cnn_jax.tools.report import FinishedRun

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
                processes.check_same_data(dataset.sha256)
            summaries = []
            for one, part in _each_seed(config, folder, make_folder):
                with _errors_named(config, one):
                    if not (ended := part.finished(one)):
                        finished = finish(one, dataset, part, fit(one, dataset, part, hooks))
                        ended = dict(finished.summary)
                        if dataset.test.files:
                            print_evaluation(console, finished.predictor, dataset, finished.test)
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


def finish(config: Config, dataset: ImageDataset, folder: RunFolder, result: Result) -> FinishedRun:
    """Evaluates a trained network once on the test set, and writes report.html and summary.json."""
    test = plain = evaluate(result.predictor, dataset.test)
    if config.augment.test_time != "none":
        plain = evaluate(result.predictor, dataset.test, "none")
    found = (
        outcome.provenance(config, dataset)
        | _figures(result)
        | {
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_accuracy_plain": plain.accuracy,
        }
    )
    metrics = folder.read_metrics()
    finished = FinishedRun(found, metrics, dataset, result.predictor, test)
    folder.finish(found, lambda: report.write(folder.path, finished))
    return finished


def _figures(result: Result) -> dict[str, Any]:
    """Returns the figures of a run's training for its summary."""
    state, progress, steps = result.state, result.progress, int(result.state.step)
    sums = jax.device_get(state.epoch_sums)
    return {
        "train_accuracy": float(sums.correct / sums.count) if steps else None,
        "train_loss": float(sums.loss / sums.count) if steps else None,
        "best_epoch": progress.best_epoch or None,
        "best_validation_accuracy": progress.best_accuracy if progress.best_epoch else None,
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
    if config.data.name != "folder" or not Path(config.data.dir).expanduser().is_dir():
        return
    trained_on = found.get("runs", [found])[0]["data"]["sha256"]
    if data.load(config.data, config.runtime.cache_dir).sha256 != trained_on:
        raise UserError(
            f"{workdir} is finished, and the photos in {config.data.dir} have changed since; "
            "choose another --workdir to train on them"
        )


def _print_result(console: Console, found: dict[str, Any]) -> None:
    if "runs" not in found:
        console.print(_result(found))
        return
    for one in found["runs"]:
        console.print(f"seed {one['seed']}: {_result(one)}")
    console.print(
        f"{len(found['runs'])} seeds: test accuracy {found['test_accuracy_mean']:.2%}, "
        f"standard deviation {found['test_accuracy_std']:.2%}"
    )


def _result(found: dict[str, Any]) -> str:
    line = f"test accuracy {found['test_accuracy']:.2%}, test loss {found['test_loss']:.4f}"
    if found["steps"]:
        line += (
            f" after {found['epochs']} epochs ({found['seconds']:.1f} s of training, "
            f"{found['images_per_second']:,.0f} images/s)"
        )
    return line
