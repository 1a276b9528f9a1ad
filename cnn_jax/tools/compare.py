"""--mode=compare RUN RUN ...: what differs between runs in config and result, and their curves."""

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cnn_jax import fields
from cnn_jax.errors import UserError, printable
from cnn_jax.runs import outcome
from cnn_jax.runs.log import read_metrics
from cnn_jax.tools import Request, report

if TYPE_CHECKING:
    from cnn_jax.drawing import Series


@dataclass(frozen=True)
class ComparedRun:
    """What one run contributes to the tables and the figure."""

    path: Path
    config: dict[str, str]
    """The fields of the config by dotted name."""
    result: dict[str, str]
    """The results by name, none if the run is not finished."""
    history: "dict[str, Series]"
    """The curves by part of the data, of the first seed if there are several."""


def run(request: Request) -> None:
    """Prints which fields and results differ between runs, and draws their curves in one figure.

    Raises:
        UserError: fewer than two folders were named, or one does not hold a run.
    """
    paths = list(dict.fromkeys(map(Path, request.paths)))
    if not 2 <= len(paths) <= len(ascii_uppercase):
        raise UserError(
            f"--mode=compare needs the folders of 2 to {len(ascii_uppercase)} runs after the flags"
        )
    runs = [load(path) for path in paths]
    console = Console(highlight=False, markup=False)
    for letter, one in zip(ascii_uppercase, runs, strict=False):
        unfinished = "" if one.result else " (not finished)"
        console.print(printable(f"{letter}  {one.path}{unfinished}"), soft_wrap=True)
    _print_differences(console, "config", [one.config for one in runs])
    _print_differences(console, "result", [one.result for one in runs])
    path = paths[0] / "figures" / "compare.png"
    _draw(runs, path)
    console.print(printable(f"curves: {path}"), soft_wrap=True)


def load(path: Path) -> ComparedRun:
    """Reads a run's folder.

    Raises:
        UserError: it does not hold a run, or a file is damaged.
    """
    if not (path / "config.json").exists():
        raise UserError(f"{path} is not the folder of a run: it has no config.json")
    config = fields.flatten(fields.load(path / "config.json"))
    summary = outcome.read(path)
    seeds = sorted(path.glob("seed-*"))
    of_one = seeds[0] if seeds and not (path / "metrics.jsonl").exists() else path
    return ComparedRun(
        path,
        {name: report.field_text(value) for name, value in config.items()},
        _results(summary) if summary else {},
        report.history(read_metrics(of_one), outcome.read(of_one)),
    )


def _results(summary: dict[str, Any]) -> dict[str, str]:
    runs = summary.get("runs", [summary])
    of_first = runs[0]
    results = {"epochs": str(of_first["epochs"]), "parameters": f"{of_first['param_count']:,}"}
    if "runs" in summary:
        results["seeds"] = str(len(runs))
        mean, std = summary["test_accuracy_mean"], summary["test_accuracy_std"]
        results["test accuracy"] = f"{mean:.2%} ± {std:.2%}"
    else:
        results["test accuracy"] = f"{summary['test_accuracy']:.2%}"
        results["test loss"] = f"{summary['test_loss']:.4f}"
        results["parameters' SHA-256"] = summary["params_sha256"][:12]
    if of_first["steps"]:
        results["training time (s)"] = f"{of_first['seconds']:,.1f}"
        results["images/s"] = f"{of_first['images_per_second']:,.0f}"
    results["data's SHA-256"] = of_first["data"]["sha256"][:12]
    device = {f"device {name}": str(value) for name, value in of_first["device"].items()}
    return results | device | of_first["versions"]


def _print_differences(console: Console, title: str, columns: list[dict[str, str]]) -> None:
    """Prints a table with a row for each name whose values differ between runs."""
    table = Table(title)
    for letter, _ in zip(ascii_uppercase, columns, strict=False):
        table.add_column(letter, overflow="fold")
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "-") for column in columns]
        if len(set(cells)) > 1:
            table.add_row(*map(printable, (name, *cells)))
    if table.row_count:
        console.print(table)
    else:
        console.print(f"{title}: no difference")


def _draw(runs: list[ComparedRun], path: Path) -> None:
    from cnn_jax import drawing  # imports matplotlib, which takes half a second

    letters = zip(ascii_uppercase, runs, strict=False)
    histories = {f"{letter} {one.path.resolve().name}": one.history for letter, one in letters}
    report.write_file(path, drawing.png(drawing.learning_curves(histories)))
