"""The tables of --mode=evaluate at the width of a terminal."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from helpers.predictors import random_predictor
from helpers.training import edit
from rich.console import Console

from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.fit import evaluate
from cnn_jax.tools.evaluate import class_table, confusion_table, print_evaluation

CIFAR = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
LONG = tuple(f"{'zyxwvutsrq'[i]}-classname{i}" for i in range(10))


def printed(table, width: int = 80) -> list[str]:
    """Returns the lines that a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(table)
    return console.file.getvalue().splitlines()  # pyright: ignore


def counts(n: int, largest: int) -> np.ndarray:
    """Returns distinct counts, so that a cell shows which one it is."""
    return largest - np.arange(n * n).reshape(n, n)


@pytest.mark.parametrize("largest", [99, 9999, 99999])
@pytest.mark.parametrize("names", [CIFAR, LONG], ids=["cifar10", "long"])
def test_ten_classes_can_be_told_apart_in_the_confusion_matrix(
    names: tuple[str, ...], largest: int
):
    """Every name is whole, every count is in the row and column of its classes."""
    confusion = counts(10, largest)
    head, *rows = printed(confusion_table(names, confusion))
    letters = head.split()
    assert len(rows) == len(set(letters)) == 10
    for letter, name, line, expected in zip(letters, names, rows, confusion, strict=True):
        assert len(line) <= 80
        assert line.split()[:2] == [letter, name]
        assert list(map(int, line.split()[2:])) == expected.tolist()
    ends = [[word.end() for word in re.finditer(r"\S+", line)][-10:] for line in (head, *rows)]
    assert all(row == ends[0] for row in ends), "counts are not below their letters"


def test_short_names_stand_above_the_confusion_matrix():
    names = tuple("0123456789")
    head, first, *_ = printed(confusion_table(names, counts(10, 999)))
    assert head.split() == list(names)
    assert first.split() == ["0", *map(str, range(999, 989, -1))]


@pytest.mark.parametrize("names", [CIFAR, LONG], ids=["cifar10", "long"])
def test_the_class_table_names_what_a_class_is_confused_with(names: tuple[str, ...]):
    confusion = np.diag(np.full(10, 9000)) + np.eye(10, k=1, dtype=int) * 1000
    lines = printed(class_table(names, confusion))
    assert all(len(line) <= 80 for line in lines)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows[0] == [names[0], "10000", "90.00%", "100.00%", "94.74%", f"{names[1]} (1000)"]
    assert rows[1][:4] == [names[1], "10000", "90.00%", "90.00%"]
    assert rows[9] == [names[9], "9000", "100.00%", "90.00%", "94.74%", "-"]
    assert len(rows) == 10


def test_a_name_that_is_too_long_is_folded_and_not_cut():
    names = ("a" * 70, "b" * 70)
    for table in (class_table(names, counts(2, 9)), confusion_table(names, counts(2, 9))):
        text = "".join(printed(table))
        found = Counter(text)
        assert found["a"] >= 70 and found["b"] >= 70
        assert "…" not in text


def test_names_cannot_control_the_terminal():
    for table in (
        class_table(("\x1b[2J", "[red]x"), counts(2, 9)),
        confusion_table(("\x1b[2J", "[red]x"), counts(2, 9)),
    ):
        text = "\n".join(printed(table))
        assert "\x1b" not in text
        assert "[red]x" in text


@pytest.mark.parametrize("n_classes", [3, 13])
def test_many_classes_have_no_confusion_matrix(tiny: Config, dataset: ImageDataset, n_classes: int):
    names = (*dataset.class_names, *(f"class{i}" for i in range(10)))[:n_classes]
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    predictor = random_predictor(tiny, names)
    test = evaluate(predictor, dataset.test)
    other = ImageDataset(**{**vars(dataset), "class_names": names})
    print_evaluation(console, predictor, other, test)
    text = console.file.getvalue()  # pyright: ignore
    assert f"step 0: test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}" in text
    assert ("confusion matrix" in text) == (n_classes == 3)
    assert "most confused with" in text
    assert "worst mistakes" not in text  # The images come from no files.


def test_the_worst_mistakes_are_named_by_their_files(tiny: Config, dataset: ImageDataset):
    files = tuple(f"{i}\x1b.png" for i in range(10))
    split = type(dataset.test)(dataset.test.images, dataset.test.labels, files)
    photos = ImageDataset(**{**vars(dataset), "test": split})
    predictor = random_predictor(edit(tiny, augment={"test_time": "none"}))
    test = evaluate(predictor, split)
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    print_evaluation(console, predictor, photos, test)
    text = console.file.getvalue()  # pyright: ignore
    wrong = int(np.sum(test.logits.argmax(axis=1) != split.labels))
    assert 0 < wrong == text.count("\\x1b.png: ")
    assert "\x1b.png" not in text
