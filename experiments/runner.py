"""Trains what is missing of an experiment, and shows the rows as they come in."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cnn_jax import loop, runs
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog
from experiments.rows import Row, Run, Store, check_images, load_data

_HEADINGS = ("variant", "seed", "epochs", "test accuracy", "train accuracy", "seconds")


class Board:
    """The table of finished runs and, below it, what the current one is at.

    Without a terminal: a line for every epoch and every finished run.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rows: list[Row] = []
        self._current = ""
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._current = ""
            self._live.update(self.table(self._rows), refresh=True)
            self._live.stop()

    def table(self, rows: list[Row]) -> Table:
        """Returns rows as a table, with the current run as its caption."""
        table = Table(*_HEADINGS, caption=self._current or None, caption_justify="left")
        for row in rows:
            table.add_row(*_cells(row))
        return table

    def now(self, text: str, notable: bool = True) -> None:
        """Shows what the current run is at; without a terminal only if it is notable."""
        self._current = text
        if self._live:
            fits = max(self.console.height - 7, 1)
            self._live.update(self.table(self._rows[-fits:]), refresh=True)
        elif notable:
            self.console.print(text, markup=False)

    def add(self, row: Row) -> None:
        """Shows a finished run."""
        self._rows.append(row)
        self.now(" ".join(_cells(row)) if not self._live else "")


def _cells(row: Row) -> list[str]:
    if row["test_accuracy"] is None:
        return [row["variant"], str(row["seed"]), "", "diverged", "", ""]
    return [
        row["variant"],
        str(row["seed"]),
        str(row["epochs"]),
        f"{row['test_accuracy']:.2%}",
        f"{row['train_accuracy']:.2%}" if row["train_accuracy"] is not None else "",
        f"{row['seconds']:.1f}",
    ]


class BoardLog(RunLog):
    """Writes a run's files as ever, and tells the board instead of the terminal."""

    def __init__(self, run: Run, board: Board, workdir: Any) -> None:
        super().__init__(workdir, Console(file=io.StringIO(), quiet=True))
        self._run, self._board = run, board

    def warn(self, line: str) -> None:
        """Prints a line above the table."""
        self._board.console.print(f"warning: {line}", markup=False)

    def segment(self, lines: list[dict[str, Any]], images_per_second: float) -> None:
        """Records the steps and shows the last."""
        super().segment(lines, images_per_second)
        last = lines[-1]
        text = f"{self._run.name}: step {last['step']}, {images_per_second:,.0f} images/s"
        for name in ("train", "validation", "test"):
            if f"{name}_accuracy" in last:
                text += f", {name} {last[f'{name}_accuracy']:.2%}"
        self._board.now(text, notable="epoch" in last)


def states(store: Store, variants: list[str], seeds: int) -> Table:
    """Returns how far every run is."""
    table = Table("variant", "seed", "state", "test accuracy")
    for variant in variants:
        tuning, final = store.runs(variant, seeds)
        for run in (*tuning, *final):
            row = store.row(run)
            accuracy = _cells(row)[3] if row else ""
            table.add_row(run.variant, str(run.config.seed), store.state(run), accuracy)
        if not final:
            table.add_row(variant, f"0-{seeds - 1}", "missing; its learning rate comes first", "")
    return table


def train_missing(store: Store, variants: list[str], seeds: int, board: Board) -> None:
    """Trains or resumes the runs of `variants` that are not done, variant by variant.

    If there are any, what was trained on other images than they are is not done either.

    Raises:
        stop.Stopped: a signal came; the current run is saved, and the next call resumes it.
        UserError: a workdir was made by another config, on other images, or without the test
            figures of every epoch that the experiment asks for.
    """
    planned = [r for v in variants for part in store.runs(v, seeds) for r in part]
    mixed = store.unlike(planned)
    for run in planned:
        if mixed or not store.row(run):
            store.count_only(run)
    for variant in variants:
        tuning, _ = store.runs(variant, seeds)
        for row in _train(store, tuning, board):
            board.add(row)
        _, final = store.runs(variant, seeds)
        for row in _train(store, final, board):
            board.add(row)


def _train(store: Store, wanted: list[Run], board: Board) -> Iterator[Row]:
    """Yields the row of every run; those that differ in the seed alone share one compilation."""
    trainer = None
    for run in wanted:
        if not (row := store.row(run)):
            trainer = _trainer(store, run, trainer)
            row = _train_one(store, run, trainer, board)
        yield row


def _trainer(store: Store, run: Run, last: loop.Trainer | None) -> loop.Trainer:
    if last and replace(last.config, seed=run.config.seed) == run.config:
        return last.with_seed(run.config.seed)
    jax.clear_caches()  # Programs of other variants: a process can't hold hundreds of them.
    dataset = load_data(run.config.data)
    return loop.Trainer(run.config, dataset, watch_test=store.experiment.watch_test)


def _train_one(store: Store, run: Run, trainer: loop.Trainer, board: Board) -> Row:
    workdir = store.workdir(run)
    if changes := store.other_config(run):
        raise UserError(
            f"{workdir} was made by another config ({'; '.join(changes)}); remove it, "
            "or choose another --runs"
        )
    _check_watched(store, run)
    check_images(workdir, trainer.dataset)
    board.now(f"{run.name}: starts")
    with runs.claim(workdir, run.config):
        try:
            runs.run(trainer, workdir, lambda path: BoardLog(run, board, path))
            (workdir / "row.json").unlink(missing_ok=True)  # One of other images may be there.
        except loop.NotFinite as error:
            board.console.print(f"{run.name}: {error}", markup=False)
            store.keep_diverged(run, str(error))
    _check_watched(store, run)  # What was interrupted may have begun without.
    row = store.row(run)
    assert row is not None
    return row


def _check_watched(store: Store, run: Run) -> None:
    if store.unwatched(run):
        raise UserError(
            f"{store.workdir(run)} lacks the test accuracy of some epochs, which is asked for; "
            "remove it, or choose another --runs"
        )
