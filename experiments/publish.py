"""Writes results/NAME: results.csv, curves.csv, about.json, results.md and a figure."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnn_jax import drawing, files
from cnn_jax.errors import UserError
from experiments.spec import Experiment
from experiments.store import Run, Store
from experiments.tables import PROVENANCE, Row, Table, cell, unit, value


def write(name: str, store: Store, seeds: int, folder: Path) -> None:
    """Writes all results of an experiment into `folder`; missing ones are called missing.

    Raises:
        UserError: results that would be compared are of different images; nothing is written.
    """
    experiment = store.experiment
    runs = store.all_runs(experiment.variants, seeds)
    if different := store.different_images(runs):
        command = f"python -m experiments.run {name} run --seeds={seeds}"
        raise UserError(f"results of different images: {different}; to train both: {command}")
    found = {run: row for run in runs if (row := store.row(run))}
    about = _about(name, store, seeds, list(found.values()))
    store.write(folder, found, **about)
    table = store.table(seeds)
    text = [f"# {experiment.question}", experiment.note, *_notes(store, seeds)]
    text += [_table(experiment, table, seeds), _tuning_table(store)]
    text += [f"![{experiment.question}]({name}.png)", _origin(about)]
    files.write(folder / "results.md", "\n\n".join(filter(None, text)) + "\n")
    if any(table.rows.values()):
        files.write(folder / f"{name}.png", drawing.png(experiment.figure.draw(table)))


def _about(name: str, store: Store, seeds: int, rows: list[Row]) -> dict[str, Any]:
    option = f" --seeds={seeds}" if seeds != store.experiment.seeds else ""
    return {
        "commands": [f"python -m experiments.run {name} {c}{option}" for c in ("run", "report")],
        "runs": len(rows),
        **{what: sorted({row[what] for row in rows if row[what]}) for what in PROVENANCE},
    }


def _origin(about: dict[str, Any]) -> str:
    lines = [f"Made by `{about['commands'][0]}`, then `{about['commands'][1]}`.", ""]
    names = {"data": "data", "device": "device", "versions": "versions", "commit": "code"}
    lines += [f"- {text}: {'; '.join(about[what]) or 'unknown'}" for what, text in names.items()]
    return "\n".join(lines)


def _notes(store: Store, seeds: int) -> list[str]:
    """Returns what the test set was not used for, and how networks were pretrained and tuned."""
    experiment, notes = store.experiment, []
    if pretraining := store.pretraining_run():
        accuracy = cell("test_accuracy", _values(store, [pretraining], "test_accuracy"))
        notes.append(f"Test accuracy of the pretrained network on its own classes: {accuracy} %.")
    if experiment.figure.watch_test:
        notes.append(
            "The test images were evaluated after every epoch, for the curves only: no epoch, "
            "checkpoint or setting was chosen by them, and the table has the last epoch of each "
            "run."
        )
    if experiment.rates:
        (first, *_), _ = store.runs(next(iter(experiment.rates)), seeds)
        notes.append(
            "Learning rates were chosen by the validation accuracy in the last epoch, with "
            f"{first.config.data.validation:.0%} of all training images held out and seed "
            f"{first.config.seed}. The test set was not used to choose them."
        )
    return notes


def _table(experiment: Experiment, table: Table, seeds: int) -> str:
    """Returns a line per variant as Markdown: mean and standard deviation over its seeds."""
    headings = ["variant", "seeds", *(unit(column)[2] for column in experiment.columns)]
    headings += ["the chapter's test accuracy, %"] if experiment.reference else []
    lines = []
    for variant, rows in table.rows.items():
        expected = len(table.configs[variant]) or seeds  # none before the learning rate is chosen
        missing = f" of {expected}, others missing" if len(rows) < expected else ""
        cells = [variant, f"{len(rows)}{missing}"]
        for column in experiment.columns:
            if "." in column:
                known = table.configs[variant]
                cells.append(f"{table.field(variant, column)}" if known else "missing")
            else:
                cells.append(cell(column, [value(row, column) for row in rows]))
        if experiment.reference:
            known = variant in experiment.reference
            cells.append(f"{100 * experiment.reference[variant]:.1f}" if known else "")
        lines.append(cells)
    return markdown(headings, lines)


def _tuning_table(store: Store) -> str:
    """Returns the validation accuracy at every learning rate as Markdown."""
    if not store.experiment.rates:
        return ""
    lines = []
    for variant, rates in store.experiment.rates.items():
        for run in [] if isinstance(rates, str) else store.runs(variant, 1)[0]:
            accuracies = _values(store, [run], "validation_accuracy")
            rate = f"{run.config.optim.learning_rate:g}"
            lines.append([variant, rate, cell("validation_accuracy", accuracies)])
    return markdown(["variant", "learning rate", "validation accuracy, %"], lines)


def _values(store: Store, runs: Iterable[Run], column: str) -> list[float | None]:
    return [value(row, column) for run in runs if (row := store.row(run))]


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """Returns a table with a line of headings."""
    rule = "|---" * len(headings) + "|"
    rows = ["| " + " | ".join(cells) + " |" for cells in (headings, *lines)]
    return "\n".join([rows[0], rule, *rows[1:]])
