"""The tables of --mode=evaluate at the width of a terminal."""

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import SMALL, finish, refuse
from helpers.data import write_photos
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
    print_evaluation(console, predictor, test, ())
    text = console.file.getvalue()  # pyright: ignore
    assert f"step 0: test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f}" in text
    assert ("confusion matrix" in text) == (n_classes == 3)
    assert "most confused with" in text
    assert "worst mistakes" not in text  # The images come from no files.


def test_the_worst_mistakes_are_named_by_their_files(tiny: Config, dataset: ImageDataset):
    files = tuple(f"{i}\x1b.png" for i in range(10))
    split = type(dataset.test)(dataset.test.images, dataset.test.labels, files)
    predictor = random_predictor(edit(tiny, augment={"test_time": "none"}))
    test = evaluate(predictor, split)
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    print_evaluation(console, predictor, test, files)
    text = console.file.getvalue()  # pyright: ignore
    wrong = int(np.sum(test.logits.argmax(axis=1) != split.labels))
    assert 0 < wrong == text.count("\\x1b.png: ")
    assert "\x1b.png" not in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos of three classes, 15 of each."""
    folder = tmp_path_factory.mktemp("trained")
    write_photos(folder / "photos", {"blue": 15, "green": 15, "red": 15})
    data = ("--data.name=folder", "--data.dir=photos", "--data.images_per_class=0")
    finish(*SMALL, *data, "--workdir=run", cwd=folder)
    return folder


def evaluated(trained: Path, folder: str) -> str:
    flags = ("--mode=evaluate", "--workdir=run", f"--data.dir={folder}")
    return finish(*flags, cwd=trained).stdout


@pytest.mark.slow
def test_every_photo_of_another_folder_is_scored(trained: Path):
    """Classes are matched by name, whatever their numbers there; the network knows no amber."""
    write_photos(trained / "other", {"red": 4, "amber": 3, "green": 7})
    (trained / "other/broken").mkdir()
    out = evaluated(trained, "other")
    assert "folder other: all 11 images are scored\n" in out
    assert "warning: 3 images of classes that the network does not know: amber\n" in out
    rows = {row[1]: row for line in out.splitlines() if len(row := line.split("│")) > 5}
    images = {name.strip(): int(row[2]) for name, row in rows.items()}
    assert images == {"blue": 0, "green": 7, "red": 4}
    answers = json.loads(
        finish("--mode=predict", "--workdir=run", "--json", "other", cwd=trained).stdout
    )
    right = sum(a["file"].split("/")[1] == a["class"] for a in answers)
    assert f"step 2: accuracy {right / 11:.2%}, loss " in out


def test_all_parts_of_another_folder_are_scored(trained: Path):
    for part, n in (("Training", 2), ("valid", 3), ("test", 4)):
        write_photos(trained / "parts" / part, {"red": n, "blue": n})
    out = evaluated(trained, "parts")
    line = "all 18 images are scored, 4 of train, 6 of validation, 8 of test\n"
    assert f"folder parts: {line}" in out


def test_a_folder_of_one_class_is_scored(trained: Path):
    write_photos(trained / "single", {"red": 3})
    assert "folder single: all 3 images are scored\n" in evaluated(trained, "single")
    (trained / "empty").mkdir()
    line = refuse("--mode=evaluate", "--workdir=run", "--data.dir=empty", cwd=trained)
    assert line.startswith("empty needs subfolders of images")


@pytest.mark.slow
def test_the_photos_of_the_run_are_not_others_where_they_have_moved(trained: Path):
    own = finish("--mode=evaluate", "--workdir=run", cwd=trained).stdout
    assert re.search(r"folder photos: \d+ train, \d test images", own)
    shutil.copytree(trained / "photos", trained / "moved")
    for place in ("moved", "./photos", str(trained / "photos")):
        out = evaluated(trained, place)
        assert out.split("\n", 1)[1] == own.split("\n", 1)[1]
    next((trained / "moved/red").iterdir()).unlink()
    assert "all 44 images are scored" in evaluated(trained, "moved")


def test_another_folder_without_a_known_class_is_refused(trained: Path):
    write_photos(trained / "animals", {"cat": 2, "dog": 2})
    flags = ("--mode=evaluate", "--workdir=run", "--data.dir=animals")
    line = refuse(*flags, cwd=trained)
    assert line.endswith("(cat, dog) is one of the network's: blue, green, red")
