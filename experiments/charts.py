"""The kinds of figure that an experiment can have, in the colours of cnn_jax.drawing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from cnn_jax.drawing import COLORS, MARKERS
from experiments.tables import Table, pad, unit

Series = Mapping[str, tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points seeds"]]]
"""Numbers on the horizontal axis and the values at each, by the label of a line."""


class Chart:
    """A kind of figure. A kind of your own defines `columns` and `draw`."""

    columns: Any
    """Names of the columns of the table, or of fields of the config, that are drawn."""
    watch_test = False
    """Whether the test set has to be evaluated after every epoch."""

    def draw(self, table: Table) -> Figure:
        """Returns the figure; missing runs are left out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Curves(Chart):
    """Training and test accuracy by epoch, side by side; means over seeds."""

    columns = ("train_accuracy", "test_accuracy")
    watch_test = True

    def draw(self, table: Table) -> Figure:
        """Returns the figure; missing variants are left out."""
        figure, axes = _axes(width=9.6, columns=2)
        curved = [name for name, rows in table.rows.items() if any(row["curve"] for row in rows)]
        for one, column, part in zip(axes, self.columns, ("training", "test"), strict=True):
            for i, variant in enumerate(curved):
                accuracies = table.mean_curve(variant, column)
                epochs = np.arange(1, len(accuracies) + 1)
                one.plot(epochs, accuracies, **_style(i), label=variant, ms=4)
            one.set(title=f"{part} set", xlabel="epoch")
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("accuracy")
        if curved:
            axes[1].legend()
        return figure


@dataclass(frozen=True)
class Bars(Chart):
    """A group of bars per variant, one for each column: mean, deviation and every seed."""

    columns: tuple[str, ...]
    """Columns with values in [0, 1]."""

    def draw(self, table: Table) -> Figure:
        """Returns the figure; missing variants have no bar."""
        figure, (axes,) = _axes()
        names, width = list(table.configs), 0.8 / len(self.columns)
        for i, column in enumerate(self.columns):
            x = np.arange(len(names)) + (i - (len(self.columns) - 1) / 2) * width
            values = table.all_values(column)
            means, deviations = mean_and_std(values)
            color, label = COLORS[i % len(COLORS)], column.replace("_", " ")
            axes.bar(x, means, 0.9 * width, color=color, yerr=deviations, capsize=3, label=label)
            axes.plot(x, values, ".", color="black", markersize=4)
        axes.set_xticks(np.arange(len(names)), names, rotation=20 if len(names) > 5 else 0)
        axes.set_ylabel("share")
        figure.legend(loc="outside upper center", ncols=2)
        return figure


@dataclass(frozen=True)
class Dots(Chart):
    """The test accuracy of each variant on a line of its own: mean, deviation and every seed.

    The axis need not start at 0, so small differences can be seen.
    """

    columns = ("test_accuracy",)

    def draw(self, table: Table) -> Figure:
        """Returns the figure; the line of a missing variant is empty."""
        names, values = list(table.configs), table.all_values("test_accuracy")
        figure, (axes,) = _axes(height=1 + 0.35 * len(names))
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        means, deviations = mean_and_std(values)
        y = np.arange(len(names))
        axes.errorbar(means, y, xerr=deviations, fmt="o", color=COLORS[0], capsize=4, markersize=8)
        axes.plot(values, y, "|", color="black", markersize=9)
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy")
        return figure


@dataclass(frozen=True)
class AgainstField(Chart):
    """Accuracies against a number in the config, such as "model.dropout".

    The variant "small-16" is the point of the line "small" whose field has the value 16: a line's
    label is the variant's name up to the last "-". `measured` names columns that have lines of
    their own, through the variants for which they are known.
    """

    field: str
    label: str
    logarithmic: bool = False
    measured: tuple[str, ...] = ()

    @property
    def columns(self) -> Collection[str]:
        """The field and the columns that have lines."""
        return (self.field, "test_accuracy", *self.measured)

    def draw(self, table: Table) -> Figure:
        """Returns the figure; missing variants are left out."""
        points: dict[str, list[tuple[float, np.ndarray]]] = {}
        for column in ("test_accuracy", *self.measured):
            for variant in table.configs:
                values = table.values(variant, column)
                if not np.isnan(values).all():
                    own_line = column == "test_accuracy"
                    label = variant.rpartition("-")[0] if own_line else column.replace("_", " ")
                    x = table.field(variant, self.field)
                    points.setdefault(label, []).append((x, values))
        series = {
            label: (np.array([x for x, _ in line], float), pad([values for _, values in line]))
            for label, line in points.items()
        }
        return lines(series, self.label, self.logarithmic)


@dataclass(frozen=True)
class AgainstMeasured(Chart):
    """Measured columns against the number that each stands for, a line per variant."""

    columns: Mapping[str, float]
    """The number of each column."""
    label: str

    def draw(self, table: Table) -> Figure:
        """Returns the figure; the line of a missing variant is empty."""
        x = np.array(list(self.columns.values()), float)
        series = {
            variant: (x, np.stack([table.values(variant, column) for column in self.columns]))
            for variant in table.configs
        }
        return lines(series, self.label)


@dataclass(frozen=True)
class Points(Chart):
    """The test accuracy against another column, a named point per variant: means over seeds."""

    column: str

    @property
    def columns(self) -> Collection[str]:
        """The columns of the two axes."""
        return (self.column, "test_accuracy")

    def draw(self, table: Table) -> Figure:
        """Returns the figure, with the standard deviation of the accuracies."""
        figure, (axes,) = _axes()
        factor, _, label = unit(self.column)
        for i, variant in enumerate(table.configs):
            x = factor * table.values(variant, self.column)
            means, deviations = mean_and_std(np.stack([x, table.values(variant, "test_accuracy")]))
            axes.errorbar(
                means[:1], means[1:], deviations[1:], **_style(i), capsize=3, linestyle="none"
            )
            axes.annotate(variant, tuple(means), (6, 4), textcoords="offset points")
        axes.margins(x=0.15, y=0.1)
        axes.set(xlabel=label, ylabel="test accuracy")
        return figure


def lines(series: Series, label: str, logarithmic: bool = False) -> Figure:
    """Returns mean test accuracies against a number, in a band of one standard deviation.

    A logarithmic axis has its ticks at the points.
    """
    figure, (axes,) = _axes()
    for i, (name, (x, values)) in enumerate(series.items()):
        order = np.argsort(x)
        x, (means, deviations) = x[order], mean_and_std(values[order])
        axes.plot(x, means, **_style(i), label=name)
        low, high = means - deviations, means + deviations
        axes.fill_between(x, low, high, color=_style(i)["color"], alpha=0.2, lw=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = np.unique([tick for x, _ in series.values() for tick in x])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label, ylabel="test accuracy")
    if len(series) > 4:
        figure.legend(loc="outside upper center", ncols=3)
    elif len(series) > 1:
        axes.legend()
    return figure


def mean_and_std(
    values: Float[np.ndarray, "points seeds"],
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Returns the mean and standard deviation (n - 1) of each row without its NaN.

    The mean of no values is NaN, and the deviation of fewer than two is 0.
    """
    known = [row[~np.isnan(row)] for row in values]
    means = [row.mean() if len(row) else np.nan for row in known]
    deviations = [row.std(ddof=1) if len(row) > 1 else 0.0 for row in known]
    return np.array(means), np.array(deviations)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _axes(width: float = 6.4, height: float = 4.0, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(axis="y", alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        one.yaxis.set_major_formatter(PercentFormatter(1))
    return figure, axes
