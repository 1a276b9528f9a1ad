"""--mode=evaluate: a trained network on the test set, class by class."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from cnn_jax import data, fields, fit, losses, metrics
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, photo_set
from cnn_jax.errors import UserError, printable
from cnn_jax.metrics import Evaluation
from cnn_jax.predictor import Predictor
from cnn_jax.runs import outcome
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

    Of photos, the files of the worst mistakes follow. If --data.dir names other photos than those
    of the run, all of them are scored.

    Raises:
        UserError: the workdir holds no trained network, or its network knows other classes.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if _names_other_photos(request):
        check_config(request.workdir, request.config)
        predictor = load_predictor(request.workdir, request.config, request.checkpoint)
        test, files = score_all(predictor, request.config, console)
        metrics.check_finite(test.logits)
        print_evaluation(console, predictor, test, files, "accuracy")
        return
    predictor, dataset = load_run(request, console)
    test = fit.evaluate(predictor, dataset.test)
    metrics.check_finite(test.logits)
    print_evaluation(console, predictor, test, dataset.test.files)
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    for line in metrics.class_warnings(dataset.class_names, counts, test.confusion):
        console.print(printable(f"warning: {line}"))


def _names_other_photos(request: Request) -> bool:
    """Returns whether --data.dir names photos that are not those of the run, moved or not."""
    config, workdir = request.config, request.workdir
    if config.data.name != "folder" or "data.dir" not in request.given:
        return False
    old = fields.load(workdir / "config.json").data.dir
    if Path(config.data.dir).expanduser().resolve() == Path(old).expanduser().resolve():
        return False
    found = outcome.read(workdir)
    try:
        dataset = data.load(config.data, config.runtime.cache_dir, "stream")
    except UserError:  # These photos would not do for training, which they need not.
        return True
    return found is None or dataset.sha256 != found["data"]["sha256"]


def score_all(
    predictor: Predictor, config: Config, console: Console
) -> tuple[Evaluation, tuple[str, ...]]:
    """Evaluates a network on every photo that `config.data.dir` names, and returns their files.

    Classes are matched by their names. Photos of classes that the network does not know are left
    out, with a warning. Images are read when they are needed.

    Raises:
        UserError: there are no such photos, or none of a class that the network knows.
    """
    everything = replace(config.data, classes=(), skip_broken=False)
    cache_dir = data.cache_folder(config.runtime.cache_dir)
    source = photo_set.source(everything, cache_dir, least_classes=1)
    assert source.list_photos is not None
    listed, known = source.list_photos(), list(predictor.class_names)
    numbers = np.array([known.index(n) if n in known else -1 for n in listed.class_names], np.int32)
    unknown = [name for name, number in zip(listed.class_names, numbers, strict=True) if number < 0]
    parts = {name: replace(s, labels=numbers[s.labels]) for name, s in listed.parts.items()}
    kept = {name: split.take(split.labels >= 0) for name, split in parts.items()}
    kept = {name: split for name, split in kept.items() if len(split)}
    if not kept:
        raise UserError(
            f"{source.description}: none of its classes ({', '.join(unknown)}) is one of the "
            f"network's: {', '.join(known)}"
        )
    counts = {name: len(split) for name, split in kept.items()}
    of_parts = ", ".join(f"{n:,} of {name}" for name, n in counts.items())
    shown = f", {of_parts}" if len(counts) > 1 else ""
    n = sum(counts.values())
    console.print(printable(f"{source.description}: all {n:,} images are scored{shown}"))
    if unknown:
        left = sum(map(len, parts.values())) - n
        names = ", ".join(unknown)
        line = f"warning: {left:,} images of classes that the network does not know: {names}"
        console.print(printable(line))
    logits = np.concatenate([predictor.logits(split.images) for split in kept.values()])
    labels = np.concatenate([split.labels for split in kept.values()])
    files = tuple(file for split in kept.values() for file in split.files)
    return metrics.score(logits, labels, losses.from_config(predictor.config.train)), files


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
    dataset = data.load(config.data, config.runtime.cache_dir, config.runtime.storage)
    counts = ", ".join(f"{n:,} {name}" for name, n in dataset.counts.items() if n)
    line = f"{dataset.source}: {counts} images, {len(dataset.class_names)} classes"
    console.print(printable(line))
    return dataset


def print_evaluation(
    console: Console,
    predictor: Predictor,
    test: Evaluation,
    files: Sequence[str],
    name: str = "test accuracy",
) -> None:
    """Prints the figures of an evaluation, and what `print_classes` prints."""
    loss = name.replace("accuracy", "loss")
    console.print(f"step {predictor.step}: {name} {test.accuracy:.2%}, {loss} {test.loss:.4f}")
    temperature = predictor.temperature
    figures = metrics.figures(test, predictor.class_names, temperature)
    for line in metrics.format_figures(figures | {"temperature": temperature}):
        console.print(line)
    print_classes(console, predictor, test, files)


def print_classes(
    console: Console, predictor: Predictor, test: Evaluation, files: Sequence[str]
) -> None:
    """Prints the scores of each class and the confusion matrix.

    Of images from `files`, the worst mistakes follow.
    """
    names = predictor.class_names
    # Without soft wrap, which would cut long names instead of folding them.
    console.print(class_table(names, test.confusion), soft_wrap=False)
    if len(names) <= _MATRIX_CLASSES:
        console.print("confusion matrix: true classes in rows, predicted classes in columns")
        console.print(confusion_table(names, test.confusion), soft_wrap=False)
    probabilities = metrics.softmax(test.logits, predictor.temperature)
    wrong = metrics.worst_mistakes(probabilities, test.labels, _MISTAKES)
    if files and len(wrong):
        console.print("worst mistakes, lowest probability of the true class first:")
        for line in metrics.format_mistakes(wrong, probabilities, test.labels, files, names):
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
