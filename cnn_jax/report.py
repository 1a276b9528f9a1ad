"""A finished run as one page, report.html, and as pictures.

The page holds all that it shows: a browser asks no other file and no server for anything. What it
says of strangers' classes and files is escaped.
"""

import base64
import html
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax import config, configs, evaluate, files, models, rate_finder, saliency, trees
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError, one_line, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnn_jax.figures import Measured

MISTAKES = 10
"""Images shown of those that the network is most wrong about."""
_BINS = 200  # Points that the losses of single steps are averaged to.
_EXPLAINED = 3  # Images that are drawn with their heat maps.
_LAYERS = 8  # Layers whose feature maps are drawn.


@dataclass(frozen=True)
class Run:
    """A run that has ended: all that its page and its pictures are made of."""

    summary: Mapping[str, Any]
    """What summary.json holds."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    dataset: ImageDataset
    model: models.Classifier
    variables: dict[str, Any]
    test: evaluate.Evaluation

    @cached_property
    def config(self) -> config.Config:
        """The config of the run."""
        return config.from_dict(self.summary["config"])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each test image, float64 [n, classes]."""
        return evaluate.softmax(self.test.logits)

    @cached_property
    def wrong(self) -> np.ndarray:
        """The test images that the network is most wrong about, by index."""
        labels = self.dataset.test.labels
        return evaluate.most_wrong(self.probabilities, labels, MISTAKES)

    @cached_property
    def kernels(self) -> dict[str, np.ndarray]:
        """Of each convolution, in the order they run: float32 [height, width, in, out]."""
        params = trees.named_leaves(self.variables["params"])
        rows = models.summarize(self.model, self.dataset.image_shape)
        kernels = {row.name: params.get(f"{row.name}/kernel") for row in rows}
        return {k: np.asarray(v) for k, v in kernels.items() if v is not None and v.ndim == 4}

    @cached_property
    def scaling(self) -> dict[str, Any]:
        """The mean and the standard deviation that images are normalised by."""
        return {"mean": self.config.data.mean, "std": self.config.data.std}

    @cached_property
    def explained(self) -> np.ndarray:
        """By index the first test images, each of another class, that are taken for their own."""
        labels = self.dataset.test.labels
        right = np.flatnonzero(self.test.logits.argmax(axis=1) == labels)
        _, first = np.unique(labels[right], return_index=True)
        chosen = right[np.sort(first)][:_EXPLAINED]
        return chosen if len(chosen) else np.arange(min(_EXPLAINED, len(labels)))

    @cached_property
    def layer_inputs(self) -> dict[str, np.ndarray]:
        """What layers are given for the explained images, by name, in the order they run."""
        images = self.dataset.test.images[self.explained]
        given = evaluate.every_layer_input(self.model, self.variables, images, **self.scaling)
        rows = models.summarize(self.model, self.dataset.image_shape)
        return {row.name: np.asarray(given[row.name], np.float32) for row in rows}


def write(workdir: Path, run: Run) -> None:
    """Writes report.html as a whole or not at all.

    Raises:
        UserError: the disk is full or read-only.
    """
    _write(workdir / "report.html", page(run).encode())


def write_pictures(workdir: Path, run: Run) -> Iterator[str]:
    """Writes every picture to `figures`, and yields the path of each that is written.

    Raises:
        UserError: the disk is full or read-only.
    """
    from cnn_jax import figures

    for name, figure in _all_pictures(run):
        path = workdir / "figures" / f"{name}.png"
        _write(path, figures.png(figure))
        yield str(path)


def write_rates(workdir: Path, found: rate_finder.Found) -> Path:
    """Draws what the learning-rate finder has found, and returns where.

    Raises:
        UserError: the disk is full or read-only.
    """
    from cnn_jax import figures

    figure = figures.learning_rates(found.rates, found.losses, found.smoothed, found.suggested)
    path = workdir / "figures" / "learning_rates.png"
    _write(path, figures.png(figure))
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UserError(f"{path} can't be written: {one_line(error)}") from None


def pictures(run: Run) -> Iterator[tuple[str, "Figure"]]:
    """Yields the name and the figure of each picture that the page shows, and that there is."""
    # Matplotlib takes half a second to import, which whoever only asks for help should not wait.
    from cnn_jax import figures

    measured = history(run)
    if "train" in measured:
        yield "learning_curves", figures.learning_curves({"": measured}, _steps(run))
    names, test = run.dataset.class_names, run.dataset.test
    yield "confusion", figures.confusion(run.test.confusion, names)
    if len(run.wrong):
        shown = test.images[run.wrong], test.labels[run.wrong], run.probabilities[run.wrong]
        yield "mistakes", figures.mistakes(*shown, names)
    if run.kernels:
        first = next(iter(run.kernels))
        yield "filters_first", figures.filters(run.kernels[first], first)


def _all_pictures(run: Run) -> Iterator[tuple[str, "Figure"]]:
    from cnn_jax import figures

    yield from pictures(run)
    names, shape = run.dataset.class_names, run.dataset.image_shape
    if len(run.kernels) > 1:
        last = next(reversed(run.kernels))
        yield "filters_last", figures.filters(run.kernels[last], last)
    rows = models.summarize(run.model, shape)
    yield "architecture", figures.architecture(rows, shape, run.config.name)
    train, test = run.dataset.train, run.dataset.test
    yield "samples", figures.samples(train.images, train.labels, names)
    image = test.images[run.explained[0]]
    yield "feature_maps", figures.feature_maps(image, _feature_maps(run))
    yield "heat_maps", heat_maps(run)
    images = figures.CHAPTER_IMAGE, figures.CHAPTER_KERNEL
    yield "convolution", figures.worked_convolution(*images)
    yield "activation_functions", figures.activation_functions()


def history(run: Run) -> "dict[str, Measured]":
    """Returns what was measured by part; of the test set, once at the epoch that is reported."""
    from cnn_jax.figures import Measured

    parts = {}
    for part in ("train", "validation"):
        lines = [line for line in run.metrics if f"{part}_loss" in line]
        columns = [[x[k] for x in lines] for k in ("epoch", f"{part}_loss", f"{part}_accuracy")]
        if lines:
            parts[part] = Measured(*map(np.array, columns))
    single = run.summary["epochs"], run.test.loss, run.test.accuracy
    parts["test, once"] = Measured(*(np.array([value]) for value in single), once=True)
    return parts


def _steps(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns epochs and losses of single steps, averaged to a number that can be drawn."""
    lines = [line for line in run.metrics if line["loss"] is not None]
    bins = np.array_split(np.arange(len(lines)), min(_BINS, max(len(lines), 1)))
    per_epoch = -(-len(run.dataset.train) // run.config.train.batch_size)
    steps = np.array([line["step"] for line in lines]) / per_epoch
    losses = np.array([line["loss"] for line in lines])
    return np.array([steps[b].mean() for b in bins]), np.array([losses[b].mean() for b in bins])


def _feature_maps(run: Run) -> dict[str, np.ndarray]:
    """Returns an image's feature maps by layer, past the activation function.

    They are what the next layer is given, where that has the size of the layer's own output. Of a
    deep network some layers are left out.
    """
    rows = models.summarize(run.model, run.dataset.image_shape)
    maps = {}
    for row, following in itertools.pairwise(rows):
        values = run.layer_inputs[following.name][0]
        if len(row.output_shape) == 3 and values.size == math.prod(row.output_shape):
            maps[row.name] = values.reshape(row.output_shape)
    kept = np.linspace(0, len(maps) - 1, min(_LAYERS, len(maps))).round().astype(int)
    return {name: maps[name] for name in np.array(list(maps))[kept].tolist()}


def heat_maps(run: Run) -> "Figure":
    """Draws what the likeliest class of each explained image rests on."""
    from cnn_jax import figures

    chosen = run.explained
    images = run.dataset.test.images[chosen]
    layer = [name for name, given in run.layer_inputs.items() if given.ndim == 4][-1]
    # Of the probabilities and not of the image alone, as they may be averages over several views.
    probabilities = run.probabilities[chosen]
    targets = probabilities.argmax(axis=1)
    network = run.model, run.variables
    pairs = zip(images, targets.tolist(), strict=True)
    occluded = [saliency.occlusion(*network, image, k, **run.scaling) for image, k in pairs]
    cam = saliency.grad_cam(*network, images, targets, layer, **run.scaling)
    shares = zip(targets.tolist(), probabilities.max(axis=1), strict=True)
    names = [f"{run.dataset.class_names[target]}, {share:.1%}" for target, share in shares]
    square = saliency.square(*images.shape[1:3])
    return figures.heat_maps(images, names, np.stack(occluded), square, np.asarray(cam))


def command(run_config: config.Config) -> str:
    """Returns the shell command that trains the config, whatever it was called with.

    It is empty where the config comes from no entry of `configs.CONFIGS`.
    """
    if run_config.name not in configs.CONFIGS:
        return ""
    base, wanted = config.flatten(configs.get(run_config.name)), config.flatten(run_config)
    words = ["python", "-m", "cnn_jax.main", f"--config={run_config.name}"]
    for name, value in wanted.items():
        if value != base[name] and not name.startswith(("data.cache_dir", "features.")):
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--set={name}={text}")
    return " ".join(words[:3]) + " " + " \\\n    ".join(map(shlex.quote, words[3:]))


def page(run: Run) -> str:
    """Returns the run as one HTML page."""
    from cnn_jax import figures

    title = f"{run.config.name}, seed {run.config.seed}"
    images = {name: _image(name, figures.png(figure)) for name, figure in pictures(run)}
    missing = {
        "learning_curves": "<p>No step of training was run.</p>",
        "mistakes": "<p>No test image is taken for another class.</p>",
        "filters_first": "<p>The network has no convolution.</p>",
    }
    shown = missing | images
    sections = [
        _section("Learning", shown["learning_curves"]),
        _section("What is taken for what", shown["confusion"] + _classes(run)),
        _section("Most wrong", shown["mistakes"] + _wrong_files(run)),
        _section("First filters", shown["filters_first"]),
        _section("Again", _again(run)),
        _section("Made with", _table(_surroundings(run))),
        _section("Config", _config_table(run)),
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
    """Returns a stranger's text as HTML that shows it and does nothing else."""
    return html.escape(printable(str(value)))


def _section(title: str, body: str) -> str:
    return f"\n<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _image(name: str, content: bytes) -> str:
    encoded = base64.b64encode(content).decode()
    words = _text(name.replace("_", " "))
    return f'<img alt="{words}" src="data:image/png;base64,{encoded}">\n'


def _table(rows: Mapping[str, object]) -> str:
    cells = (f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items())
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def _result(run: Run) -> str:
    summary = run.summary
    facts = {
        "test accuracy": f"{summary['test_accuracy']:.2%}",
        "test loss": f"{summary['test_loss']:.4f}",
        "epochs": summary["epochs"],
        "parameters": f"{summary['param_count']:,}",
    }
    if summary["steps"]:
        facts["training"] = f"{summary['seconds']:,.1f} s"
        facts["speed"] = f"{summary['images_per_second']:,.0f} images/s"
    if summary["best_epoch"]:
        best = f"{summary['best_validation_accuracy']:.2%} in epoch {summary['best_epoch']}"
        facts["best validation accuracy"] = best
    cells = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return f"\n<dl>{''.join(cells)}</dl>"


def _classes(run: Run) -> str:
    """Returns a table of the classes: images, accuracy, and what they are most taken for."""
    names, rows = run.dataset.class_names, []
    taken = evaluate.most_taken_for(run.test.confusion, names)
    for label, counts in enumerate(run.test.confusion):
        accuracy = f"{counts[label] / counts.sum():.1%}" if counts.sum() else "-"
        cells = (names[label], counts.sum(), accuracy, taken[label])
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>class</th><th>test images</th><th>accuracy</th><th>most taken for</th></tr>"
    table = "\n".join([head, *rows])
    return f"<details><summary>Class by class</summary>\n<table>\n{table}\n</table></details>"


def _wrong_files(run: Run) -> str:
    """Returns the files of what is most wrong, where the images come from files."""
    test, names = run.dataset.test, run.dataset.class_names
    if not test.files:
        return ""
    lines = evaluate.tell_mistakes(run.wrong, run.probabilities, test.labels, test.files, names)
    return f"<ol>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ol>"


def _again(run: Run) -> str:
    if line := command(run.config):
        return f"<pre>{_text(line)}</pre>"
    return "<p>The config was made by a program; config.json beside this page holds it.</p>"


def _surroundings(run: Run) -> dict[str, object]:
    summary, data = run.summary, run.summary["data"]
    device = summary["device"]
    counts = ", ".join(f"{n:,} {part}" for part, n in data["counts"].items() if n)
    return {
        "data": f"{data['source']}: {counts} images, {len(run.dataset.class_names)} classes",
        "SHA-256 of the data": data["sha256"],
        "SHA-256 of the parameters": summary["params_sha256"],
        "device": f"{device['count']} x {device['kind']} ({device['platform']}), "
        f"{device['cpu_count']} CPU cores",
        **summary["versions"],
    }


def _config_table(run: Run) -> str:
    """Returns every field, those marked that the named config has another value in."""
    named = run.config.name in configs.CONFIGS
    base = config.flatten(configs.get(run.config.name) if named else config.Config())
    rows = []
    for name, value in config.flatten(run.config).items():
        mark = ' class="changed"' if value != base[name] else ""
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<tr{mark}><th>{_text(name)}</th><td>{_text(text)}</td></tr>")
    of = f"the config {run.config.name}" if named else "the defaults"
    note = f"<p>Marked is what differs from {_text(of)}.</p>"
    return f"{note}<table>\n" + "\n".join(rows) + "\n</table>"
