"""From rows to results/NAME: results.csv, curves.csv, results.md, about.json and a figure."""

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cnn_jax import config, figures, files, runs
from cnn_jax.errors import UserError
from experiments import plots, rows
from experiments.rows import Row, Run, Store
from experiments.spec import (
    TUNING_FRACTION,
    AgainstField,
    AgainstMeasured,
    Bars,
    Curves,
    Dots,
    Points,
)

# Factor and digits after the point.
_PERCENT = (100, 1)
_FORMATS = {
    "test_loss": (1, 3),
    "train_loss": (1, 3),
    "best_epoch": (1, 1),
    "epochs": (1, 1),
    "epochs_run": (1, 1),
    "steps": (1, 0),
    "param_count": (1, 0),
    "flops_per_image": (1e-6, 1),
    "train_flops": (1e-15, 2),
    "images_per_second": (1, 0),
    "seconds": (1, 0),
}
_HEADINGS = {
    "param_count": "parameters",
    "flops_per_image": "MFLOPs an image",
    "train_flops": "PFLOPs of training",
    "test_accuracy_plain": "without test-time averages, %",
    "images_per_second": "images/s",
    "seconds": "seconds of training",
}


def write(name: str, store: Store, seeds: int, folder: Path) -> None:
    """Writes everything that is known of an experiment into `folder`; what is not says missing.

    Raises:
        UserError: it is of different images, so it can't be compared; nothing is written.
    """
    experiment = store.experiment
    planned = {variant: store.runs(variant, seeds) for variant in experiment.variants}
    wanted = [run for pair in planned.values() for part in pair for run in part]
    if unlike := store.unlike(wanted):
        again = f"python -m experiments.run {name} run --seeds={seeds}"
        raise UserError(f"results of different images: {unlike}; train them on the same: {again}")
    folder.mkdir(parents=True, exist_ok=True)
    found = [pair for pair in map(store.find, wanted) if pair]
    done = [row for row, _ in found]
    curves = [line for _, curve in found for line in curve]
    columns = (*rows.COLUMNS, *experiment.measured, *rows.SURROUNDINGS)
    rows.write_csv(folder / "results.csv", columns, done)
    rows.write_csv(folder / "curves.csv", ("variant", "seed", *rows.CURVE), curves)
    about = _about(name, store, seeds, done)
    runs.write_json(folder / "about.json", about)
    final = {variant: pair[1] for variant, pair in planned.items()}
    text = [f"# {experiment.question}", *_notes(store), _table(store, final, seeds)]
    text += [_tuning_table(store)] if experiment.rates else []
    text += [f"![{experiment.question}]({name}.png)", _surroundings(about)]
    files.write(folder / "results.md", "\n\n".join(filter(None, text)) + "\n")
    if any(row["variant"] in final for row in done):
        files.write(folder / f"{name}.png", figures.png(draw(store, final, curves)))


def _notes(store: Store) -> list[str]:
    experiment = store.experiment
    watched = (
        "The test images were evaluated after every epoch, for the curves alone: no epoch, no "
        "checkpoint and no setting was chosen by them, and reported is the last epoch of each run."
    )
    tuned = (
        "Learning rates were chosen by the accuracy in the last epoch on "
        f"{TUNING_FRACTION:.0%} of all training images, held out for it, with seed 0; the test "
        "accuracy of those runs played no part."
    )
    notes = [experiment.note, watched if experiment.watch_test else ""]
    return [*notes, tuned if experiment.rates else ""]


def _about(name: str, store: Store, seeds: int, done: list[Row]) -> dict[str, Any]:
    option = f" --seeds={seeds}" if seeds != store.experiment.seeds else ""
    return {
        "commands": [f"python -m experiments.run {name} {c}{option}" for c in ("run", "report")],
        "runs": len(done),
        **{what: sorted({row[what] for row in done}) for what in rows.SURROUNDINGS},
    }


def _surroundings(about: dict[str, Any]) -> str:
    lines = [f"Made by `{about['commands'][0]}`, then `{about['commands'][1]}`."]
    for what in rows.SURROUNDINGS:
        lines.append(f"- {what}: {'; '.join(about[what]) or 'missing'}")
    return "\n".join([lines[0], "", *lines[1:]])


def cell(column: str, values: list[float | None]) -> str:
    """Returns mean and standard deviation (n - 1) of a column over seeds, as the table has it.

    None stands for a run that diverged, NaN for one that has no such value.
    """
    if not values:
        return "missing"
    finished = [value for value in values if value is not None]
    if not finished:
        return "diverged"
    known = [value for value in finished if not math.isnan(value)]
    without = len(finished) - len(known) if known else 0  # The dash says it.
    lost = {"diverged": len(values) - len(finished), "without": without}
    notes = ", ".join(f"{number} {what}" for what, number in lost.items() if number)
    return (_mean(column, known) if known else "-") + (f" ({notes})" if notes else "")


def _mean(column: str, known: list[float]) -> str:
    factor, digits = _FORMATS.get(column, _PERCENT)
    text = f"{factor * fmean(known):,.{digits}f}"
    if len(known) > 1:
        text += f" ± {factor * stdev(known):,.{digits}f}"
    return text


def _table(store: Store, final: dict[str, list[Run]], seeds: int) -> str:
    """Returns a line a variant as Markdown: mean and standard deviation over its seeds."""
    experiment = store.experiment
    headings = ["variant", "seeds", *(_heading(column) for column in experiment.columns)]
    headings += ["the chapter's test accuracy, %"] if experiment.reference else []
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for variant, wanted in final.items():
        found = [row for row in map(store.row, wanted) if row]
        expected = len(wanted) or seeds  # None are known while its learning rate is not.
        missing = f" of {expected}, the others missing" if len(found) < expected else ""
        cells = [variant, f"{len(found)}{missing}"]
        for column in experiment.columns:
            if "." in column:
                cells.append(f"{config.flatten(wanted[0].config)[column]}" if wanted else "missing")
            else:
                cells.append(cell(column, [rows.value(row, column) for row in found]))
        if experiment.reference:
            known = variant in experiment.reference
            cells.append(f"{100 * experiment.reference[variant]:.1f}" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _heading(column: str) -> str:
    if "." in column:
        return column.partition(".")[2].replace("_", " ")
    if column in _HEADINGS:
        return _HEADINGS[column]
    return column.replace("_", " ") + ("" if column in _FORMATS else ", %")


def _tuning_table(store: Store) -> str:
    lines = ["| variant | learning rate | validation accuracy, % |", "|---|---|---|"]
    for variant in store.experiment.rates:
        tuning, _ = store.runs(variant, 1)
        for run in tuning:
            row = store.row(run)
            values = [rows.value(row, "validation_accuracy")] if row else []
            accuracy = cell("validation_accuracy", values)
            rate = run.config.optim.learning_rate
            lines.append(f"| {variant} | {rate:g} | {accuracy} |")
    return "\n".join(lines)


def draw(store: Store, final: dict[str, list[Run]], curves: list[Row]) -> Figure:
    """Returns the experiment's figure; what is missing is left out of it."""
    kind = store.experiment.figure
    if isinstance(kind, Curves):
        return plots.learning_curves(_mean_curves(final, curves))
    if isinstance(kind, Bars):
        groups = {
            column.replace("_", " "): _stack([_values(store, r, column) for r in final.values()])
            for column in kind.columns
        }
        return plots.bars(list(final), groups)
    if isinstance(kind, Dots):
        accuracies = [_values(store, wanted, "test_accuracy") for wanted in final.values()]
        return plots.dots(list(final), _stack(accuracies), label="test accuracy")
    if isinstance(kind, AgainstMeasured):
        x = np.array(list(kind.columns.values()), float)
        series = {
            variant: (x, np.stack([_values(store, wanted, c) for c in kind.columns]))
            for variant, wanted in final.items()
        }
        return plots.lines(series, x_label=kind.label, y_label="test accuracy")
    if isinstance(kind, Points):
        factor, _ = _FORMATS.get(kind.column, _PERCENT)
        points = {
            variant: (
                factor * _values(store, wanted, kind.column),
                _values(store, wanted, "test_accuracy"),
            )
            for variant, wanted in final.items()
        }
        return plots.points(points, x_label=_heading(kind.column), y_label="test accuracy")
    return plots.lines(
        _against_field(store, final, kind),
        x_label=kind.label,
        y_label="test accuracy",
        logarithmic=kind.logarithmic,
    )


def _against_field(
    store: Store, final: dict[str, list[Run]], kind: AgainstField
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    points: dict[str, list[tuple[float, np.ndarray]]] = {}
    for variant, wanted in final.items():
        if wanted:
            x = config.flatten(wanted[0].config)[kind.name]
            point = (x, _values(store, wanted, "test_accuracy"))
            points.setdefault(variant.rpartition("-")[0], []).append(point)
    return {
        label: (np.array([x for x, _ in line], float), _stack([y for _, y in line]))
        for label, line in points.items()
    }


def _values(store: Store, wanted: list[Run], column: str) -> np.ndarray:
    """Returns a column by seed, NaN where a run is missing or has diverged."""
    found = [store.row(run) for run in wanted] or [None]
    values = [rows.value(row, column) if row else None for row in found]
    return np.array([np.nan if value is None else value for value in values])


def _stack(values: list[np.ndarray]) -> np.ndarray:
    """Returns a row each, with NaN after the last seed of variants that have fewer."""
    longest = max(map(len, values))
    return np.array([[*row, *[np.nan] * (longest - len(row))] for row in values])


def _mean_curves(
    final: dict[str, list[Run]], curves: list[Row]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns train and test accuracy by epoch, mean over the seeds that got so far."""
    means = {}
    for variant in final:
        by_epoch: dict[int, list[Row]] = {}
        for line in curves:
            if line["variant"] == variant:
                by_epoch.setdefault(line["epoch"], []).append(line)
        if by_epoch:
            means[variant] = tuple(
                np.array([fmean(line[name] for line in by_epoch[e]) for e in sorted(by_epoch)])
                for name in ("train_accuracy", "test_accuracy")
            )
    return means
