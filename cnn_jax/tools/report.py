"""A finished run as one self-contained HTML page, report.html.

The page loads nothing from elsewhere: figures are embedded, and scripts and connections are
forbidden by its Content-Security-Policy. Names of classes and files are escaped.
"""

import base64
import html
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax import configs, fields, files, fit, metrics, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, one_line, printable
from cnn_jax.metrics import Evaluation
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor
from cnn_jax.runs import outcome
from cnn_jax.runs.log import read_metrics
from cnn_jax.step import Setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnn_jax.drawing import Series

MISTAKES = 10
"""Images shown as the worst mistakes."""
_BINS = 200
"""Points that the losses of single steps are averaged to."""


@dataclass(frozen=True)
class FinishedRun:
    """All that the report and the figures of a run are made from."""

    summary: Mapping[str, Any]
    """The contents of summary.json."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    dataset: ImageDataset
    predictor: Predictor
    test: Evaluation

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each test image: float64 [n, classes]."""
        return metrics.softmax(self.test.logits, self.predictor.temperature)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch of the training images."""
        return Setup.of(self.predictor.config, self.dataset).steps_per_epoch

    @cached_property
    def mistakes(self) -> np.ndarray:
        """Indices of the worst mistakes on the test set, the worst first."""
        return metrics.worst_mistakes(self.probabilities, self.dataset.test.labels, MISTAKES)


def load_finished(
    workdir: Path, config: Config, dataset: ImageDataset, kind: str = ""
) -> FinishedRun:
    """Reads a finished run, and evaluates its network on the test images of `dataset`.

    `kind` is "latest" or "best"; "" stands for the checkpoint that the run itself reported on.

    Raises:
        UserError: the run is not finished, or was trained on images of other classes.
    """
    predictor = outcome.load_predictor(workdir, config, kind)
    summary = outcome.read(workdir)
    if summary is None:
        raise UserError(f"{workdir} is not finished; the command that started it continues it")
    outcome.check_classes(workdir, predictor, dataset)
    test = fit.evaluate(predictor, dataset.test)
    run = FinishedRun(summary, read_metrics(workdir), dataset, predictor, test)
    epochs = predictor.step // run.steps_per_epoch  # of the checkpoint of this kind
    return replace(run, summary={**summary, "epochs": epochs})


def write(workdir: Path, run: FinishedRun) -> None:
    """Writes report.html atomically.

    Raises:
        UserError: the disk is full or read-only.
    """
    write_file(workdir / "report.html", page(workdir, run).encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file atomically, in a folder that is created if it is missing.

    Raises:
        UserError: the disk is full or read-only.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UserError(f"{path} can't be written: {one_line(error)}") from None


def pictures(run: FinishedRun) -> Iterator[tuple[str, "Figure"]]:
    """Yields name and figure of each picture on the page, without those that do not apply."""
    from cnn_jax import drawing  # imports matplotlib, which takes half a second

    test_result = {"test_loss": run.test.loss, "test_accuracy": run.test.accuracy}
    curves = history(run.metrics, {**run.summary, **test_result})
    if "train" in curves:
        yield "learning_curves", drawing.learning_curves({"": curves}, _steps(run))
    names, test = run.dataset.class_names, run.dataset.test
    yield "confusion_matrix", drawing.confusion(run.test.confusion, names)
    if len(run.mistakes):
        chosen = run.mistakes
        shown = test.images[chosen], test.labels[chosen], run.probabilities[chosen]
        yield "mistakes", drawing.mistakes(*shown, names)
    kernels = conv_kernels(run.predictor)
    if kernels:
        first = next(iter(kernels))
        yield "filters_first", drawing.filters(kernels[first], first)


def conv_kernels(predictor: Predictor) -> dict[str, np.ndarray]:
    """Returns the kernel of each convolution in running order: [height, width, in, out]."""
    params = trees.named_leaves(predictor.variables["params"])
    rows = inspection.summarize(predictor.model, predictor.seen_shape)
    kernels = {row.name: params.get(f"{row.name}/kernel") for row in rows}
    return {k: np.asarray(v) for k, v in kernels.items() if v is not None and v.ndim == 4}


def history(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None
) -> "dict[str, Series]":
    """Returns the learning curves by part of the data, and the test result as a single point.

    `lines` are those of metrics.jsonl; `summary` is None for a run that is not finished.
    """
    from cnn_jax.drawing import Series

    parts = {}
    for part in ("train", "validation"):
        ends = [line for line in lines if f"{part}_loss" in line]
        columns = [[x[k] for x in ends] for k in ("epoch", f"{part}_loss", f"{part}_accuracy")]
        if ends:
            parts[part] = Series(*map(np.array, columns))
    if summary:
        point = (np.array([summary[k]]) for k in ("epochs", "test_loss", "test_accuracy"))
        parts["test (once)"] = Series(*point, single_point=True)
    return parts


def _steps(run: FinishedRun) -> tuple[np.ndarray, np.ndarray]:
    """Returns epochs and losses of single steps, averaged in at most `_BINS` bins."""
    lines = [line for line in run.metrics if line["loss"] is not None]
    bins = np.array_split(np.arange(len(lines)), min(_BINS, max(len(lines), 1)))
    steps = np.array([line["step"] for line in lines]) / run.steps_per_epoch
    values = np.array([line["loss"] for line in lines])
    return np.array([steps[b].mean() for b in bins]), np.array([values[b].mean() for b in bins])


def command(workdir: Path, config: Config, started: Mapping[str, Any]) -> str:
    """Returns the shell commands that train a config in a workdir, from any folder.

    `started` is that of the run's summary (see `outcome.started`).
    """
    base = _named(config)
    source = config.name if base else os.path.abspath(workdir / "config.json")
    words = [f"--config={source}"]
    if base:
        default = fields.flatten(base)
        for name, value in fields.flatten(config).items():
            if value != default[name] and name != "runtime.cache_dir":
                words.append(f"--{name}={field_text(value)}")
    return _shell(started, [*words, f"--workdir={os.path.abspath(workdir)}"])


def _shell(started: Mapping[str, Any], words: Sequence[str]) -> str:
    """Returns commands that call the main module with these arguments, one a line."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in started["variables"].items()]
    program = [*variables, shlex.quote(started["python"]), "-m", "cnn_jax.main"]
    lines = [" ".join(program), *map(shlex.quote, words)]
    return f"cd {shlex.quote(started['folder'])}\n" + " \\\n    ".join(lines)


def _named(config: Config) -> Config | None:
    """Returns the config that `--config=NAME` stands for, or None for configs made in Python."""
    return configs.get(config.name) if config.name in configs.CONFIGS else None


def field_text(value: Any) -> str:
    """Returns a value of `fields.flatten` as text: as its flag takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def page(workdir: Path, run: FinishedRun) -> str:
    """Returns the run as one HTML page."""
    from cnn_jax import drawing

    config = run.predictor.config
    title = f"{config.name}, seed {config.seed}"
    images = {name: _image(name, drawing.png(figure)) for name, figure in pictures(run)}
    missing = {
        "learning_curves": "<p>No training step was run.</p>",
        "mistakes": "<p>All test images are classified correctly.</p>",
        "filters_first": "<p>The network has no convolution.</p>",
    }
    shown = missing | images
    sections = [
        _section("Learning curves", shown["learning_curves"]),
        _section("Confusion matrix", shown["confusion_matrix"] + _classes(run)),
        _section("Worst mistakes", shown["mistakes"] + _mistake_files(run)),
        _section("First-layer filters", shown["filters_first"]),
        _section("Reproduce this run", _reproduce(workdir, run)),
        _section("Environment", _table(_environment(run))),
        _section("Config", _config_table(config)),
    ]
    head = f"<h1>{_text(title)}</h1>{_result(run)}"
    return _PAGE.format(title=_text(title), style=_STYLE, body=head + "".join(sections))


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 780px; padding: 0 16px 48px; }
td, dd, pre, li, h1 { overflow-wrap: anywhere; }
h1 { font-size: 1.6em; margin: 24px 0 8px; } h2 { font-size: 1.2em; margin: 36px 0 8px; }
img { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
     margin: 16px 0; }
dl div { background: #f2f5f8; border-radius: 6px; padding: 10px 12px; }
dt { font-size: 0.85em; color: #444; } dd { margin: 0; font-size: 1.25em; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 0.92em; }
td, th { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
pre { background: #f2f5f8; border-radius: 6px; padding: 12px; white-space: pre-wrap; }
td + td, th + td { padding-right: 0; } tr th { font-weight: 500; }
tr.changed { background: #fff3d6; } summary { cursor: pointer; padding: 8px 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _text(value: object) -> str:
    """Returns any text as HTML that shows it and does nothing else."""
    return html.escape(printable(str(value)))


def _section(title: str, body: str) -> str:
    return f"\n<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _image(name: str, content: bytes) -> str:
    encoded = base64.b64encode(content).decode()
    alt = _text(name.replace("_", " "))
    return f'<img alt="{alt}" src="data:image/png;base64,{encoded}">\n'


def _table(rows: Mapping[str, object]) -> str:
    cells = (f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items())
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def _result(run: FinishedRun) -> str:
    summary, test = run.summary, run.test
    found = metrics.figures(test, run.dataset.class_names, run.predictor.temperature)

    def with_interval(name: str) -> str:
        return f"{found[name]:.2%} ({metrics.format_interval(found[f'{name}_interval'])})"

    results = {
        "test accuracy": with_interval("accuracy"),
        "macro-F1": with_interval("macro_f1"),
        "balanced accuracy": with_interval("balanced_accuracy"),
        "test loss": f"{test.loss:.4f}",
        "calibration error": f"{found['calibration_error']:.1%}",
        "epochs": summary["epochs"],
        "parameters": f"{summary['param_count']:,}",
    }
    if found["top5_accuracy"] is not None:
        results["top-5 accuracy"] = f"{found['top5_accuracy']:.2%}"
    if summary["steps"]:
        results["training time"] = f"{summary['seconds']:,.1f} s"
        results["training speed"] = f"{summary['images_per_second']:,.0f} images/s"
    if summary["best_epoch"]:
        monitor = run.predictor.config.train.monitor
        best = summary[f"best_validation_{monitor}"]
        text = f"{best:.4f}" if monitor == "loss" else f"{best:.2%}"
        name = f"best validation {monitor.replace('_', ' ')}"
        results[name] = f"{text} in epoch {summary['best_epoch']}"
    cells = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in results.items())
    note = (
        "Ranges in brackets are 95% intervals: Wilson's of the accuracy, the others bootstrapped."
    )
    warnings = "".join(f"<p><b>Warning:</b> {_text(w)}</p>" for w in summary.get("warnings", ()))
    return f"\n<dl>{''.join(cells)}</dl>\n<p>{note}</p>{warnings}"


def _classes(run: FinishedRun) -> str:
    """Returns a table with the scores of each class."""
    names, rows = run.dataset.class_names, []
    for name, scores in zip(names, metrics.class_scores(run.test.confusion), strict=True):
        cells = (
            name,
            scores.images,
            metrics.format_share(scores.recall, 1),
            metrics.format_share(scores.precision, 1),
            metrics.format_share(scores.f1, 1),
            metrics.format_confused(scores, names),
        )
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    headings = ("class", "test images", "recall", "precision", "F1", "most confused with")
    head = "<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"
    table = "\n".join([head, *rows])
    return f"<details><summary>Scores by class</summary>\n<table>\n{table}\n</table></details>"


def _mistake_files(run: FinishedRun) -> str:
    """Returns the files of the worst mistakes, if the images come from files."""
    test, names = run.dataset.test, run.dataset.class_names
    if not test.files:
        return ""
    of_test = run.probabilities, test.labels, test.files
    lines = metrics.format_mistakes(run.mistakes, *of_test, names)
    return f"<ol>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ol>"


def _reproduce(workdir: Path, run: FinishedRun) -> str:
    config = run.predictor.config
    started = run.summary.get("started") or outcome.started()
    verify = _shell(started, ["--mode=verify", f"--workdir={os.path.abspath(workdir)}"])
    return (
        f"<pre>{_text_lines(command(workdir, config, started))}</pre>\n"
        "<p>If the folder still exists, the command shows its result. The following one trains "
        "the run a second time and compares the parameters:</p>\n"
        f"<pre>{_text_lines(verify)}</pre>"
    )


def _text_lines(text: str) -> str:
    """Returns text of several lines as HTML."""
    return "\n".join(map(_text, text.split("\n")))


def _environment(run: FinishedRun) -> dict[str, object]:
    data, device = run.summary["data"], run.summary["device"]
    counts = ", ".join(f"{n:,} {part}" for part, n in data["counts"].items() if n)
    return {
        "data": f"{data['source']}: {counts} images, {len(run.dataset.class_names)} classes",
        "SHA-256 of the data": data["sha256"],
        "SHA-256 of the parameters": run.summary["params_sha256"],
        "device": f"{device['count']} x {device['kind']} ({device['platform']}), "
        f"{device['cpu_count']} CPU cores",
        **run.summary["versions"],
    }


def _config_table(config: Config) -> str:
    """Returns all fields, and highlights those that differ from the named config."""
    named = _named(config)
    base = fields.flatten(named or Config())
    rows = []
    for name, value in fields.flatten(config).items():
        mark = ' class="changed"' if value != base[name] else ""
        rows.append(f"<tr{mark}><th>{_text(name)}</th><td>{_text(field_text(value))}</td></tr>")
    reference = f"the config {config.name}" if named else "the defaults"
    note = f"<p>Highlighted fields differ from {_text(reference)}.</p>"
    return f"{note}<table>\n" + "\n".join(rows) + "\n</table>"
