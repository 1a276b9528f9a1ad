"""--mode=evaluate: a trained network on the test set, class by class."""

from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from cnn_jax import data, fit, metrics
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import printable
from cnn_jax.metrics import Evaluation
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import check_config
from cnn_jax.runs.outcome import check_classes, load_predictor
from cnn_jax.tools import Request

_MISTAKES = 10
"""Photos that are listed as the worst mistakes."""
_MATRIX_CLASSES = 12
"""Classes up to which the confusion matrix fits on a terminal of 80 columns."""
_SHORT_NAME = 4
"""Columns up to which class names, instead of letters, stand above the confusion matrix."""


def run(request: Request) -> None:
    """Prints accuracy and loss, the scores of each class, and the confusion matrix.

    Of photos, the files of the worst mistakes follow.

    Raises:
        UserError: the workdir holds no trained network, or its network knows other classes.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    predictor, dataset = load_run(request, console)
    print_evaluation(console, predictor, dataset, fit.evaluate(predictor, dataset.test))


def load_run(request: Request, console: Console) -> tuple[Predictor, ImageDataset]:
    """Reads the trained network of a workdir and the images of its config.

    Raises:
        UserError: the workdir holds no trained network, or its network knows other classes.
    """
    check_config(request.workdir, request.config)
    predictor = load_predictor(request.workdir, request.config, request.checkpoint)
    dataset = load_dataset(request.config, console)
    check_classes(request.workdir, predictor, dataset)
    return predictor, dataset


def load_dataset(config: Config, console: Console) -> ImageDataset:
    """Loads the images that a config names, and prints their source and counts."""
    dataset = data.load(config.data, config.runtime.cache_dir)
    counts = ", ".join(f"{n:,} {name}" for name, n in dataset.counts.items() if n)
    line = f"{dataset.source}: {counts} images, {len(dataset.class_names)} classes"
    console.print(printable(line))
    return dataset


def print_evaluation(
    console: Console, predictor: Predictor, dataset: ImageDataset, test: Evaluation
) -> None:
    """Prints what `run` prints, for an evaluation of the test images."""
    console.print(
        f"step {predictor.step}: test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}"
    )
    temperature = predictor.temperature
    figures = metrics.figures(test, dataset.class_names, temperature) | {"temperature": temperature}
    for line in metrics.format_figures(figures):
        console.print(line)
    print_classes(console, predictor, dataset, test)
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    for line in metrics.class_warnings(dataset.class_names, counts, test.confusion):
        console.print(printable(f"warning: {line}"))


def print_classes(
    console: Console, predictor: Predictor, dataset: ImageDataset, test: Evaluation
) -> None:
    """Prints the scores of each class, the confusion matrix and, of photos, the worst mistakes."""
    split, names = dataset.test, dataset.class_names
    # Without soft wrap, which would cut long names instead of folding them.
    console.print(class_table(names, test.confusion), soft_wrap=False)
    if len(names) <= _MATRIX_CLASSES:
        console.print("confusion matrix: true classes in rows, predicted classes in columns")
        console.print(confusion_table(names, test.confusion), soft_wrap=False)
    probabilities = metrics.softmax(test.logits, predictor.temperature)
    wrong = metrics.worst_mistakes(probabilities, split.labels, _MISTAKES)
    if split.files and len(wrong):
        console.print("worst mistakes, lowest probability of the true class first:")
        for line in metrics.format_mistakes(wrong, probabilities, split.labels, split.files, names):
            console.print(printable(f"  {line}"))


def class_table(class_names: Sequence[str], confusion: np.ndarray) -> Table:
    """Returns a row per class: images, recall, precision, F1 and the most frequent mistake."""
    table = Table()
    for heading in ("class", "images", "recall", "precision", "F1", "most confused with"):
        number = heading in ("images", "recall", "precision", "F1")
        justify = "right" if number else "left"
        table.add_column(heading, justify=justify, no_wrap=number, overflow="fold")
    for name, scores in zip(class_names, metrics.class_scores(confusion), strict=True):
        cells = (
            name,
            str(scores.images),
            metrics.format_share(scores.recall, 2),
            metrics.format_share(scores.precision, 2),
            metrics.format_share(scores.f1, 2),
            metrics.format_confused(scores, class_names),
        )
        table.add_row(*map(printable, cells))
    return table


def confusion_table(class_names: Sequence[str], confusion: np.ndarray) -> Table:
    """Returns the confusion matrix, where letters stand for class names above the columns."""
    names = [printable(name) for name in class_names]
    letters = list(ascii_lowercase[: len(names)])
    short = max(map(cell_len, names)) <= _SHORT_NAME
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    for heading in names if short else letters:
        table.add_column(heading, justify="right", no_wrap=True)
    for letter, name, counts in zip(letters, names, confusion.tolist(), strict=True):
        table.add_row(name if short else f"{letter} {name}", *map(str, counts))
    return table
