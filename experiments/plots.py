"""Figures that compare variants over seeds, in the colours of cnn_jax.figures."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from cnn_jax.figures import COLORS, MARKERS


def _axes(figure: Figure, rows: int = 1, columns: int = 1) -> list[Axes]:
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(axis="y", alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        one.yaxis.set_major_formatter(PercentFormatter(1))
    return axes


def _figure(width: float = 6.4, height: float = 4.0) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def mean_and_std(
    values: Float[np.ndarray, "points seeds"],
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Returns mean and standard deviation (n - 1) of what is not NaN, a row each.

    NaN stands for the mean of nothing; the deviation of fewer than two is 0.
    """
    known = [row[~np.isnan(row)] for row in values]
    means = [row.mean() if len(row) else np.nan for row in known]
    deviations = [row.std(ddof=1) if len(row) > 1 else 0.0 for row in known]
    return np.array(means), np.array(deviations)


def learning_curves(
    curves: Mapping[str, tuple[Float[np.ndarray, "epochs"], Float[np.ndarray, "epochs"]]],
) -> Figure:
    """Returns accuracy by epoch: on the training set to the left, on the test set to the right."""
    figure = _figure(width=9.6)
    axes = _axes(figure, columns=2)
    for i, (label, pair) in enumerate(curves.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        for one, accuracy in zip(axes, pair, strict=True):
            epochs = np.arange(1, len(accuracy) + 1)
            one.plot(epochs, accuracy, color=color, label=label, marker=marker, ms=4)
    for one, title in zip(axes, ("training set", "test set"), strict=True):
        one.set(title=title, xlabel="epoch")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("accuracy")
    if curves:
        axes[1].legend()
    return figure


def bars(names: Sequence[str], groups: Mapping[str, Float[np.ndarray, "names seeds"]]) -> Figure:
    """Returns a group of bars a name, the mean over seeds with its deviation, and every seed."""
    figure = _figure()
    (axes,) = _axes(figure)
    width = 0.8 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
        means, deviations = mean_and_std(values)
        axes.bar(
            x,
            means,
            0.9 * width,
            color=COLORS[i % len(COLORS)],
            yerr=deviations,
            capsize=3,
            label=label,
        )
        axes.plot(x, values, ".", color="black", markersize=4)
    axes.set_xticks(np.arange(len(names)), names, rotation=20 if len(names) > 5 else 0)
    axes.set_ylabel("share")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def dots(names: Sequence[str], values: Float[np.ndarray, "names seeds"], *, label: str) -> Figure:
    """Returns a row a name, from the top: the mean over seeds with its deviation, and every seed.

    The axis need not start at 0, so it shows what differs by little.
    """
    figure = _figure(height=1 + 0.35 * len(names))
    (axes,) = _axes(figure)
    axes.grid(axis="x", alpha=0.3)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    means, deviations = mean_and_std(values)
    y = np.arange(len(names))
    axes.errorbar(means, y, xerr=deviations, fmt="o", color=COLORS[0], capsize=4, markersize=8)
    axes.plot(values, y, "|", color="black", markersize=9)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure


def points(
    series: Mapping[str, tuple[Float[np.ndarray, "seeds"], Float[np.ndarray, "seeds"]]],
    *,
    x_label: str,
    y_label: str,
) -> Figure:
    """Returns a named point a series, the means of x and y over seeds, with the deviations of y."""
    figure = _figure()
    (axes,) = _axes(figure)
    for i, (label, (x, y)) in enumerate(series.items()):
        (means, deviations) = mean_and_std(np.stack([x, y]))
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axes.errorbar(
            means[:1], means[1:], deviations[1:], color=color, marker=marker, capsize=3, ls="none"
        )
        axes.annotate(label, tuple(means), (6, 4), textcoords="offset points")
    axes.margins(x=0.15, y=0.1)
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure


def lines(
    series: Mapping[str, tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points seeds"]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> Figure:
    """Returns means over seeds against a number, in a band of one standard deviation each way.

    On a logarithmic axis ticks stand where the points do.
    """
    figure = _figure()
    (axes,) = _axes(figure)
    for i, (label, (x, values)) in enumerate(series.items()):
        order = np.argsort(x)
        x, (means, deviations) = x[order], mean_and_std(values[order])
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, means, color=color, marker=marker, label=label)
        axes.fill_between(x, means - deviations, means + deviations, color=color, alpha=0.2, lw=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = np.unique([tick for x, _ in series.values() for tick in x])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x_label, ylabel=y_label)
    if len(series) > 4:
        figure.legend(loc="outside upper center", ncols=3)
    elif len(series) > 1:
        axes.legend()
    return figure
