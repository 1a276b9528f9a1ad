"""Photos whose labels come from a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import write_photos

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset
from cnn_jax.data.photos import Layout, load_image
from cnn_jax.errors import UserError

Load = Callable[..., ImageDataset]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with images/0 to images/9 in folders that are no classes."""
    write_photos(tmp_path, {"one": 6, "two": 6})
    return tmp_path


@pytest.fixture
def load(store: Path) -> Load:
    def load(file: str, **values: Any) -> ImageDataset:
        config = DataConfig(**{"name": "folder", "dir": str(store / file), "image_size": 8})
        config = DataConfig(**{**vars(config), **values})
        return data.load(config, str(store / "cache"))

    return load


@pytest.fixture
def refusal(load: Load, store: Path):
    def message(file: str, text: str, **values: Any) -> str:
        (store / file).write_text(text)
        with pytest.raises(UserError) as caught:
            load(file, **values)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(store), "STORE")

    return message


def rows() -> list[tuple[str, str, str]]:
    """Returns path, label and split of ten photos."""
    parts = ("train", "train", "train", "val", "Test")
    return [
        (f"{folder}/{i:03}.png", "cat" if (i + (folder == "two")) % 2 else "dog", parts[i])
        for folder in ("one", "two")
        for i in range(5)
    ]


def check(dataset: ImageDataset, store: Path) -> None:
    """Every photo is in its part, with its label."""
    assert dataset.class_names == ("cat", "dog")
    expected = {path: (label, split) for path, label, split in rows()}
    spelled = {"train": "train", "validation": "val", "test": "Test"}
    seen = []
    for part, split in dataset.parts.items():
        for image, label, file in zip(split.images, split.labels, split.files, strict=True):
            assert expected[file] == (dataset.class_names[label], spelled[part])
            np.testing.assert_array_equal(image, load_image(store / file, Layout(8)))
            seen.append(file)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_file(load: Load, store: Path, delimiter: str) -> None:
    lines = [delimiter.join(values) for values in (("Path", "note", "label", "split"),)]
    lines += [delimiter.join((path, "x", label, split)) for path, label, split in rows()]
    (store / "labels.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n")
    dataset = load("labels.csv")
    assert dataset.source == f"labels {store / 'labels.csv'}"
    check(dataset, store)


def test_json_lines(load: Load, store: Path) -> None:
    keys = ("path", "label", "split")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows()]
    (store / "labels.jsonl").write_text("\n\n".join(lines))
    check(load("labels.jsonl"), store)


def test_without_splits_a_part_is_held_out(load: Load, store: Path) -> None:
    lines = ["path,label", *(f"{path},{label}" for path, label, _ in rows())]
    (store / "labels.csv").write_text("\n".join(lines))
    dataset = load("labels.csv", test_fraction=0.2)
    assert dataset.counts == {"train": 8, "validation": 0, "test": 2}
    assert load("labels.csv", classes=("dog", "cat")).class_names == ("dog", "cat")


def test_a_label_that_is_corrected_counts(load: Load, store: Path) -> None:
    """Though no photo has changed, nor the order of all photos, and the decoded ones are cached."""
    for first_dog in (6, 5):
        numbers = [(folder, i) for folder in ("one", "two") for i in range(6)]
        lines = [
            f"{folder}/{i:03}.png,{'cat' if place < first_dog else 'dog'}"
            for place, (folder, i) in enumerate(numbers)
        ]
        (store / "labels.csv").write_text("\n".join(["path,label", *lines]))
        dataset = load("labels.csv")
        labels = np.concatenate([split.labels for split in dataset.parts.values()])
        assert np.bincount(labels).tolist() == [first_dog, 12 - first_dog]


def test_broken_photos_of_a_csv_are_skipped(load: Load, store: Path, warned: list[str]) -> None:
    lines = ["path,label", *(f"{path},{label}" for path, label, _ in rows())]
    (store / "labels.csv").write_text("\n".join(lines))
    (store / "one" / "001.png").write_bytes(b"")
    dataset = load("labels.csv")
    assert dataset.skipped == ("one/001.png: not an image of a known format",)
    assert sum(dataset.counts.values()) == 9


def test_the_first_five_are_named(refusal) -> None:
    """Missing files, doubles, and labels that are empty or that train lacks."""
    known = [",".join(row) for row in rows()]
    heading = "path,label,split"

    def of(*lines: str) -> str:
        return refusal("labels.csv", "\n".join([heading, *known, *lines]))

    missing = [f"gone/{i}.png,cat,train" for i in range(7)]
    assert of(*missing) == (
        "STORE/labels.csv: does not exist: gone/0.png (line 12), gone/1.png (line 13), "
        "gone/2.png (line 14), gone/3.png (line 15), gone/4.png (line 16) and 2 more"
    )
    assert of(known[0]) == (
        "STORE/labels.csv: is named more than once: one/000.png (line 2), one/000.png (line 12)"
    )
    assert of("./one/../one/003.png,cat,train") == (
        "STORE/labels.csv: is named more than once: one/003.png (line 5), one/003.png (line 12)"
    )
    assert of("one/005.png,,train") == "STORE/labels.csv: has no label: one/005.png (line 12)"
    assert of("one/005.png,hen,test") == (
        "STORE/labels.csv: has a label that no training photo has: one/005.png (line 12)"
    )
    assert of("one/005.png,cat,later") == (
        "STORE/labels.csv: has a split other than train, validation or test: one/005.png (line 12)"
    )


def test_files_that_are_no_labels(refusal) -> None:
    assert refusal("a.csv", "file,class\n") == (
        "STORE/a.csv can't be read: its first line must name the columns path and label, not "
        "file, class"
    )
    assert refusal("a.csv", "") == (
        "STORE/a.csv can't be read: its first line must name the columns path and label, not "
        "nothing"
    )
    assert refusal("a.jsonl", '{"path": "x"}\n') == (
        "STORE/a.jsonl can't be read: line 1 must be an object with path and label"
    )
    assert refusal("a.jsonl", "words\n").startswith("STORE/a.jsonl can't be read: Expecting value")
    assert refusal("a.csv", "path,label\none/000.png,cat\n") == (
        "STORE/a.csv needs training photos of two labels or more"
    )
    assert refusal("a.csv", "path,label\none/000.png,cat\n", classes=("cat", "cot")) == (
        "data.classes: there is no class cot (did you mean cat?)"
    )
    assert refusal("a.txt", "path,label\n") == (
        "data.dir=STORE/a.txt is neither a folder nor a file of labels (.csv, .jsonl)"
    )
