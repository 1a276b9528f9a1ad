"""The metrics of a run: metrics.jsonl, TensorBoard events, and progress on the terminal."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import RecordWriter, summary
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

from cnn_jax import files
from cnn_jax.errors import UserError, one_line

# Without a terminal, a line at every epoch's end and otherwise at most this often.
_PLAIN_SECONDS = 20.0


class RunLog:
    """Writes one line per step to metrics.jsonl and to TensorBoard, and shows the run's progress.

    A line has `step`, `loss`, `accuracy` and `learning_rate`. The line of a segment's last step
    also has `grad_norm`, `images_per_second` and, of streamed images, `wait_share`; the line of an
    epoch's last step has `epoch`, `train_loss`, `train_accuracy` and, with a validation split,
    `validation_loss`, `validation_accuracy`, `validation_balanced_accuracy` and
    `validation_macro_f1`. A skipped step has `skipped` and null in place of its metrics.
    """

    def __init__(self, workdir: Path, console: Console | None = None) -> None:
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {line}")

    @contextlib.contextmanager
    def running(self, step: int, total_steps: int, steps_per_epoch: int) -> Iterator[None]:
        """Keeps the files open and the progress bar shown while the block trains on from `step`.

        Lines that an earlier process wrote beyond `step` are dropped, as those steps run again.
        """
        self._open(step, total_steps, steps_per_epoch)
        try:
            yield
        finally:
            self._close()

    def _open(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        _truncate(self._path, step)
        self._file = self._path.open("a")
        self._events.mkdir(exist_ok=True)
        # Not SummaryWriter: on a full disk its thread dies, and the run would wait for it forever.
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(str(self._events / name))
        self._event(file_version="brain.Event:2")
        self._event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._steps_per_epoch = steps_per_epoch
        self._epochs = total_steps // steps_per_epoch
        self._last_plain = time.monotonic()
        if step:
            self.say(f"resuming after step {step} of {total_steps}")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/" + str(self._epochs)),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            epoch = min(step // steps_per_epoch + 1, self._epochs)
            self._task = self._bar.add_task("", total=total_steps, completed=step, epoch=epoch)

    def segment(self, lines: list[dict[str, Any]], images_per_second: float) -> None:
        """Records the steps of a segment, one dict each, and shows the last."""
        last = lines[-1]
        step = last["step"]
        last["images_per_second"] = round(images_per_second, 1)
        self._file.writelines(json.dumps(line) + "\n" for line in lines)
        for name, value in last.items():
            if name not in ("step", "epoch", "skipped") and value is not None:
                self._event(step=step, summary=summary.scalar(name, value))
        self._show(step, last)

    def _event(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _show(self, step: int, last: dict[str, Any]) -> None:
        epoch = (step - 1) // self._steps_per_epoch + 1
        loss = last.get("train_loss", last["loss"])
        accuracy = last.get("train_accuracy", last["accuracy"])
        text = "skipped" if loss is None else f"loss {loss:.4f}  accuracy {accuracy:.2%}"
        if "validation_accuracy" in last:
            text += f"  validation {last['validation_accuracy']:.2%}"
        text += f"  {last['images_per_second']:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text, epoch=epoch)
        now = time.monotonic()
        if "train_loss" in last:
            self.say(f"epoch {epoch}/{self._epochs}  {text}")
            self._last_plain = now
        elif not self._bar and now - self._last_plain >= _PLAIN_SECONDS:
            self.say(f"epoch {epoch}/{self._epochs}  step {step}  {text}")
            self._last_plain = now

    def flush(self) -> None:
        """Writes all records to disk; called before a checkpoint of the same step is saved."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._writer.flush()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
        with contextlib.closing(self._writer), self._file:
            self.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl.

    Raises:
        UserError: it is missing or damaged.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if all({"step", "loss"} <= line.keys() for line in lines):
            return lines
        problem = "it is not the metrics of a run"
    except (OSError, ValueError, AttributeError) as error:
        problem = one_line(error)
    raise UserError(f"{path} can't be read: {problem}")


def _truncate(path: Path, step: int) -> None:
    """Drops the lines beyond `step`, and a last line that a kill left incomplete."""
    if not path.exists():
        return
    kept = []
    text = path.read_text(errors="replace")  # so that a damaged line is named like any other
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} is damaged; repair or remove the file"
            ) from None
        kept.append(line)
    files.write(path, "".join(kept))
