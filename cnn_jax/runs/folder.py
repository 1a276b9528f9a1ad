"""A run's folder: who may write to it, what it belongs to, and its checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnn_jax import fields, files
from cnn_jax.config import Config
from cnn_jax.errors import UserError, one_line
from cnn_jax.runs import outcome
from cnn_jax.runs.checkpoint import Checkpoints
from cnn_jax.runs.log import RunLog, read_metrics
from cnn_jax.runs.stop import StopRequest, on_signals

# What a start that failed or was killed at once may leave behind.
_TRACES = (".lock", "config.json.tmp", "config.json")


class RunFolder:
    """The folder that `fit` resumes from and saves to.

    `runs.processes` has a variant for runs of several processes.
    """

    def __init__(self, path: Path, make_log: Callable[[Path], RunLog] = RunLog) -> None:
        self.path = path
        self.log = make_log(path)
        self._checkpoints: dict[str, Checkpoints] = {}
        self._stop = StopRequest()

    @contextlib.contextmanager
    def claim(self, wanted: Config) -> Iterator[None]:
        """Locks the folder while the block runs, and stores `wanted` as its config.

        A config that trains the folder's run for more epochs is accepted where the first epochs
        do not depend on their number. If the block leaves nothing else there, such as after a
        mistake that it finds, the folder belongs to no config again.

        Raises:
            UserError: another process holds it, it belongs to another config, it lies among the
                images that are learned, or it can't be written.
        """
        path = self.path
        _check_place(path, wanted)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"workdir {path} can't be written: {error.strerror}") from None
        with lock:
            try:
                files.lock(lock)
            except BlockingIOError:
                raise UserError(f"workdir {path} is in use by another process") from None
            check_config(path, wanted, may_extend=True)
            try:
                fields.save(wanted, path / "config.json")
                yield
            except OSError as error:  # of the run's own files; data errors are UserErrors already
                raise UserError(f"{path} can't be written: {one_line(error)}") from None
            finally:
                if _is_unused(path):
                    (path / "config.json").unlink(missing_ok=True)

    def finished(self, wanted: Config) -> dict[str, Any] | None:
        """Returns the summary of the folder's run if it has trained for all epochs, or None.

        Raises:
            UserError: summary.json is damaged.
        """
        found = outcome.read(self.path)
        return found if found and outcome.is_of(found, wanted) else None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Opens the checkpoints and catches signals while the block trains."""
        with (
            Checkpoints(self.path, "latest", writable=True) as latest,
            Checkpoints(self.path, "best", writable=True) as best,
            on_signals() as self._stop,
        ):
            self._checkpoints = {"latest": latest, "best": best}
            yield

    def restore(
        self, kind: str, template: Callable[[int], Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest undamaged state of a kind and its record, or None.

        `template(step)` gives the structure of the state after `step` steps.
        """
        return self._checkpoints[kind].restore_newest(template, self.log.warn)

    def save(self, kind: str, step: int, state: Any, record: dict[str, Any]) -> None:
        """Saves a checkpoint, after all metrics up to its step."""
        self.log.flush()
        self._checkpoints[kind].save(step, state, record)

    def stop_signal(self) -> int:
        """Returns the number of the signal that asked for a stop, or 0."""
        return self._stop.requested

    def read_once(self, read: Callable[[], Any], like: Any) -> Any:
        """Returns `read()`, arrays of the structure, shapes and dtypes of `like`."""
        del like
        return read()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl."""
        return read_metrics(self.path)

    def finish(self, found: dict[str, Any], write_report: Callable[[], None]) -> None:
        """Writes the report, then summary.json, whose presence means that the run has ended."""
        try:
            write_report()
        except UserError:
            raise
        except Exception as error:  # A figure that fails must not cost a long training's result.
            self.log.warn(f"report.html was not written: {one_line(error)}")
        outcome.write_json(self.path / "summary.json", found)


def check_config(workdir: Path, wanted: Config, may_extend: bool = False) -> None:
    """Refuses a workdir that belongs to another config; a new one passes.

    Raises:
        UserError: names the fields that differ, or says why more epochs are not possible.
    """
    if not (workdir / "config.json").exists() or _is_unused(workdir):
        if not workdir.is_dir():
            raise UserError(f"{workdir} does not exist; --workdir names a run's folder")
        if not _is_unused(workdir):
            raise UserError(f"{workdir} holds other files and no config.json; choose a --workdir")
        return
    old = fields.load(workdir / "config.json")
    changes = fields.differences(old, wanted)
    if not changes:
        return
    longer = len(changes) == 1 and wanted.train.epochs > old.train.epochs
    if not (may_extend and longer):
        raise UserError(
            f"{workdir} belongs to another config ({'; '.join(changes)}); choose another --workdir"
        )
    if reason := _why_epochs_matter(wanted):
        raise UserError(
            f"{workdir} was trained for {old.train.epochs} epochs and can't be continued to "
            f"{wanted.train.epochs}: {reason}; choose another --workdir"
        )


def _is_unused(path: Path) -> bool:
    """Returns whether nothing was written into a folder since it was claimed."""
    return all(file.name in _TRACES for file in path.rglob("*") if not file.is_dir())


def _check_place(path: Path, config: Config) -> None:
    """Refuses a folder of results among the photos, which the next run would read as a class."""
    if config.data.name == "folder" and config.data.dir:
        photos = Path(config.data.dir).expanduser().resolve()
        if photos.is_dir() and path.resolve().is_relative_to(photos):
            raise UserError(
                f"--workdir={path} lies in the folder of photos, {config.data.dir}; choose another"
            )


def _why_epochs_matter(config: Config) -> str:
    """Returns why the first epochs of a run depend on their total number, or ""."""
    if config.optim.schedule in ("cosine", "linear"):
        return f"optim.schedule={config.optim.schedule} depends on the number of epochs"
    if config.train.lookahead_steps:
        return "train.lookahead_steps averages by the share of all epochs"
    return ""
