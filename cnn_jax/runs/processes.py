"""Runs of several processes (`--distributed`). A reader who trains on one machine can skip this.

All processes run the same program on the mesh of all their devices. Process 0, the main process,
alone reads and writes the run's folder, and the others receive from it what it read.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cnn_jax.config import Config
from cnn_jax.errors import UserError, one_line
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.stop import on_signals


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a run; must be called before JAX looks for its devices.

    Arguments left None are taken from SLURM or Open MPI, where JAX detects them.

    Raises:
        UserError: nothing says who the others are, or they can't be reached.
    """
    try:
        if coordinator and not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator={coordinator} names no port.")
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            _local_devices(),
            # How long the others wait after one has failed; healthy ones all end within seconds.
            shutdown_timeout_seconds=30,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {one_line(error)} Start it with srun or mpirun, or set "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def _local_devices() -> list[int] | None:
    """Returns [0] if the launcher shows this process a single GPU, else None: as JAX chooses.

    Of the devices that it sees, JAX would take the one whose number is the process's own number on
    its machine. Of the only one (srun --gpus-per-task=1) that fails in all processes but the first.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [0] if visible and "," not in visible else None


def is_main() -> bool:
    """Returns whether this process is the one that reads and writes the run's folder."""
    return jax.process_index() == 0


class SharedFolder(RunFolder):
    """The run folder of several processes: the main one uses it, the others receive its results."""

    def __init__(self, path: Path, make_log: Callable[[Path], RunLog] = RunLog) -> None:
        super().__init__(path, make_log if is_main() else _NoLog)

    @contextlib.contextmanager
    def claim(self, wanted: Config) -> Iterator[None]:
        """Locks the folder in the main process; an error there is raised in all."""
        with contextlib.ExitStack() as held:
            run_on_main(lambda: held.enter_context(super(SharedFolder, self).claim(wanted)))
            yield

    def finished(self, wanted: Config) -> dict[str, Any] | None:
        """Returns in every process what the main one reads."""
        return broadcast_json(run_on_main(lambda: super(SharedFolder, self).finished(wanted)))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Opens the checkpoints in the main process, and catches signals in all."""
        if is_main():
            with super().training():
                yield
        else:
            with on_signals() as self._stop:
                yield

    def restore(
        self, kind: str, template: Callable[[int], Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Returns in every process what the main one restores."""
        found = run_on_main(lambda: super(SharedFolder, self).restore(kind, template))
        header = broadcast_json(found and (int(found[0].step), found[1]))
        if header is None:
            return None
        step, record = header
        return broadcast(found[0] if found else template(step)), record

    def save(self, kind: str, step: int, state: Any, record: dict[str, Any]) -> None:
        """Saves a checkpoint in the main process."""
        if is_main():
            super().save(kind, step, state, record)

    def stop_signal(self) -> int:
        """Returns the signal that any process has received, so that all stop at one step."""
        return int(np.max(multihost_utils.process_allgather(np.int32(super().stop_signal()))))

    def read_once(self, read: Callable[[], Any], like: Any) -> Any:
        """Returns in every process what the main one reads."""
        found = run_on_main(read)
        return broadcast(like if found is None else found)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines in the main process, and none in the others."""
        return super().read_metrics() if is_main() else []

    def finish(self, found: dict[str, Any], write_report: Callable[[], None]) -> None:
        """Writes report and summary in the main process."""
        run_on_main(lambda: super(SharedFolder, self).finish(found, write_report))


class _NoLog(RunLog):
    """A log that records nothing."""

    def say(self, line: str) -> None:
        """Prints nothing."""

    @contextlib.contextmanager
    def running(self, step: int, total_steps: int, steps_per_epoch: int) -> Iterator[None]:
        """Opens nothing."""
        yield

    def segment(self, lines: list[dict[str, Any]], images_per_second: float) -> None:
        """Records nothing."""

    def flush(self) -> None:
        """Has nothing to write."""


def check_same_data(sha256: str, is_streamed: bool) -> None:
    """Refuses to train where a process has other images than the main one, or stores them else.

    Raises:
        UserError: this process has.
    """
    main_sha256, main_streams = broadcast_json([sha256, is_streamed])
    if main_sha256 != sha256:
        raise UserError(f"process {jax.process_index()} has other images than process 0")
    if main_streams != is_streamed:
        raise UserError(
            f"process {jax.process_index()} and process 0 have different amounts of free memory, "
            "and only one of them streams its images; set runtime.storage=stream"
        )


def run_on_main(function: Callable[[], Any]) -> Any:
    """Returns `function()` in the main process and None in the others.

    Raises:
        UserError: in every process, if the main one raised it.
    """
    value, problem = None, ""
    if is_main():
        try:
            value = function()
        except UserError as error:
            problem = str(error)
    if problem := broadcast_json(problem):
        raise UserError(problem)
    return value


def broadcast_json(value: Any) -> Any:
    """Returns in every process the main one's value, which must be representable in JSON."""
    text = np.frombuffer(json.dumps(value).encode() if is_main() else b"", np.uint8)
    length = int(broadcast(np.int32(len(text))))
    return json.loads(broadcast(text if is_main() else np.zeros(length, np.uint8)).tobytes())


def broadcast(tree: Any) -> Any:
    """Returns in every process the main one's arrays, as numpy arrays.

    The others pass a tree of the same structure, shapes and dtypes; its values are ignored.
    """

    def share(leaf: Any) -> np.ndarray:
        # As bytes, because the broadcast is a sum, in which -0.0 would become 0.0.
        sent = np.zeros(leaf.size * leaf.dtype.itemsize, np.uint8)
        if is_main():
            sent[:] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
        return received.view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(share, tree)
