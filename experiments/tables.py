"""The rows of an experiment: their columns, how a column is printed, and the rows by variant."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jaxtyping import Float

from cnn_jax import fields
from cnn_jax.config import Config

Row = dict[str, Any]
"""One run, by column, and as "curve" one row per epoch. None stands for an unknown value."""

RESULTS = (
    "variant", "seed", "test_accuracy", "test_accuracy_plain", "test_loss", "train_accuracy",
    "train_loss", "validation_accuracy", "best_epoch", "epochs", "steps", "param_count",
    "flops_per_image", "images_per_second", "seconds", "params_sha256",
)  # fmt: skip
"""`epochs` is the epoch that the results are those of, and None for a run that diverged."""
PROVENANCE = ("data", "data_sha256", "device", "versions", "commit")
TEXTS = ("variant", "params_sha256", *PROVENANCE)
CURVE = (
    "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss",
    "test_accuracy",
)  # fmt: skip
DERIVED: Mapping[str, Callable[[Row], float]] = {
    # With early stopping more than `epochs`.
    "epochs_run": lambda row: len(row["curve"]),
    # Training on an image counts as three forward passes, since the gradients with respect to
    # inputs and kernels are products of the same size.
    "train_flops": lambda row: (
        3 * row["flops_per_image"] * row["images_per_second"] * row["seconds"]
    ),
}
"""Columns that are computed from others."""

# Factor, number of decimals, and heading with the unit; all other columns are in percent.
_FORMATS = {
    "test_loss": (1, 3, "test loss"),
    "train_loss": (1, 3, "train loss"),
    "best_epoch": (1, 1, "best epoch"),
    "epochs": (1, 1, "epochs"),
    "epochs_run": (1, 1, "epochs run"),
    "steps": (1, 0, "steps"),
    "param_count": (1, 0, "parameters"),
    "flops_per_image": (1e-6, 1, "MFLOPs per image"),
    "train_flops": (1e-15, 2, "training PFLOPs"),
    "images_per_second": (1, 0, "images/s"),
    "seconds": (1, 0, "training time, s"),
    "test_accuracy_plain": (100, 1, "without test-time augmentation, %"),
}


def value(row: Row, column: str) -> float | None:
    """Returns a numeric column: None if the run diverged, NaN if the value is unknown."""
    if row["epochs"] is None:
        return None
    known = {name: math.nan if found is None else found for name, found in row.items()}
    return DERIVED[column](known) if column in DERIVED else known[column]


def unit(column: str) -> tuple[float, int, str]:
    """Returns the factor to a column's printed unit, the number of decimals, and the heading."""
    if "." in column:  # a field of the config
        return 1, 0, column.partition(".")[2].replace("_", " ")
    return _FORMATS.get(column, (100, 1, column.replace("_", " ") + ", %"))


def cell(column: str, values: Sequence[float | None]) -> str:
    """Returns mean and standard deviation (n - 1) over seeds; None and NaN are as in `value`."""
    if not values:
        return "missing"
    finished = [value for value in values if value is not None]
    if not finished:
        return "diverged"
    known = [value for value in finished if not math.isnan(value)]
    unknown = len(finished) - len(known) if known else 0  # "-" says it where all are unknown
    counts = {"diverged": len(values) - len(finished), "without": unknown}
    notes = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return (_mean(column, known) if known else "-") + (f" ({notes})" if notes else "")


def _mean(column: str, known: list[float]) -> str:
    factor, digits, _ = unit(column)
    text = f"{factor * fmean(known):,.{digits}f}"
    if len(known) > 1:
        text += f" ± {factor * stdev(known):,.{digits}f}"
    return text


@dataclass(frozen=True)
class Table:
    """What a report shows, by variant."""

    configs: Mapping[str, Sequence[Config]]
    """One per seed; none before the variant's learning rate is chosen."""
    rows: Mapping[str, Sequence[Row]]
    """Those of finished or diverged runs."""

    def field(self, variant: str, name: str) -> Any:
        """Returns a field of the variant's config by its dotted name, or None if it is unknown."""
        configs = self.configs[variant]
        return fields.flatten(configs[0])[name] if configs else None

    def values(self, variant: str, column: str) -> Float[np.ndarray, "seeds"]:
        """Returns a column with NaN for runs that diverged; without runs it is a single NaN."""
        found = [value(row, column) for row in self.rows[variant]] or [None]
        return np.array([math.nan if one is None else one for one in found], float)

    def all_values(self, column: str) -> Float[np.ndarray, "variants seeds"]:
        """Returns `values` of every variant, padded with NaN to the largest number of seeds."""
        return pad([self.values(variant, column) for variant in self.configs])

    def mean_curve(self, variant: str, column: str) -> Float[np.ndarray, "epochs"]:
        """Returns a column of the curves: the mean over the seeds that reached each epoch."""
        by_epoch: dict[int, list[float]] = {}
        for line in (line for row in self.rows[variant] for line in row["curve"]):
            by_epoch.setdefault(line["epoch"], []).append(line[column])
        return np.array([fmean(by_epoch[epoch]) for epoch in sorted(by_epoch)])


def pad(rows: Sequence[np.ndarray]) -> Float[np.ndarray, "rows longest"]:
    """Returns one-dimensional arrays as the rows of one array, padded with NaN."""
    padded = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
