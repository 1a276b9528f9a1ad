"""What is held out of a user's photos, as photos are added, copied and renamed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, write_photos
from PIL import Image

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, Split, split

Load = Callable[..., ImageDataset]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def load(root: Path, tmp_path: Path) -> Load:
    def load(**values: Any) -> ImageDataset:
        config = DataConfig(**{"name": "folder", "dir": str(root), "image_size": 8, **values})
        return data.load(config, str(tmp_path / "cache"))

    return load


def sides(dataset: ImageDataset) -> dict[str, str]:
    """Returns the part of each photo."""
    return {file: part for part, s in dataset.parts.items() for file in s.files}


def add(root: Path, name: str, seed: int) -> None:
    Image.fromarray(noise(12, 12, 3, seed=seed)).save(root / name)


def test_a_photo_that_is_added_moves_no_other(load: Load, root: Path) -> None:
    write_photos(root, {"cat": 50, "dog": 30})
    before = sides(load(validation=0.2))
    assert set(before.values()) == {"train", "validation", "test"}
    for i, name in enumerate(("cat/!first", "cat/025b", "dog/zzz")):
        add(root, f"{name}.png", seed=i)
        after = sides(load(validation=0.2))
        assert {file: after[file] for file in before} == before
    assert len(after) == len(before) + 3


def test_what_is_held_out_follows_seed_class_and_name(load: Load, root: Path) -> None:
    write_photos(root, {"cat": 40, "dog": 40})
    cats, dogs = (
        {file[4:] for file, part in sides(load()).items() if part == "test" and file[:3] == name}
        for name in ("cat", "dog")
    )
    assert cats != dogs
    assert sides(load(split_seed=1)) != sides(load())
    assert sides(load(classes=("dog", "cat"))) == sides(load())


def photos_of_one_class(n: int) -> Split:
    files = tuple(f"cat/{i}.png" for i in range(n))
    return Split(np.zeros((n, 8, 8, 3), np.uint8), np.zeros(n, np.int32), files)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 100])
def test_the_number_held_out_stays_near_its_fraction(n: int) -> None:
    photos = photos_of_one_class(n)
    counts = []
    for seed in range(200):
        kept, aside = split.set_aside(photos, ("cat",), 0.2, seed, "test")
        assert sorted(kept.files + aside.files) == sorted(photos.files)
        counts.append(len(aside))
    assert min(counts) >= max(0.1 * n, 1)
    assert max(counts) <= max(0.3 * n, 1)
    if n >= 10:
        assert np.mean(counts) == pytest.approx(0.2 * n, rel=0.06)


def test_equal_pictures_stay_on_one_side(load: Load, root: Path, warned: list[str]) -> None:
    """Equal files, and the same picture in other names, sizes, formats and qualities."""
    write_photos(root, {"cat": 20, "dog": 20}, size=(40, 40))
    picture = Image.fromarray(noise(6, 8, 3)).resize((320, 240), Image.Resampling.BICUBIC)
    for i in range(6):
        picture.save(root / "cat" / f"copy{i}.png")
    for i in range(6):
        half = picture.resize((160 + i, 120 + i))
        half.save(root / "cat" / f"small{i}.jpg", quality=60 + 5 * i)
    found = set()
    for seed in range(8):
        dataset = load(split_seed=seed)
        copies = {part for f, part in sides(dataset).items() if "copy" in f or "small" in f}
        assert len(copies) == 1
        found |= copies
    assert "train" in found
    assert warned == []


def test_a_class_of_nothing_but_copies_is_divided_with_a_warning(
    load: Load, root: Path, warned: list[str]
) -> None:
    write_photos(root, {"cat": 1, "dog": 20})
    for i in range(1, 12):
        shutil.copy(root / "cat" / "000.png", root / "cat" / f"{i:03}.png")
    dataset = load()
    assert len({part for f, part in sides(dataset).items() if f.startswith("cat")}) == 2
    assert len(warned) == 1
    assert "photo(s) with a copy in another part, whose figures it flatters: cat/0" in warned[0]


def test_copies_in_the_user_s_own_parts_are_counted_and_named(
    load: Load, root: Path, warned: list[str]
) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4})
    write_photos(root / "test", {"hen": 4, "owl": 2})
    for old, new in (("hen", "cat"), ("owl", "dog")):
        (root / "test" / old).rename(root / "test" / new)
    load()
    assert warned == []
    shutil.copy(root / "train" / "cat" / "000.png", root / "test" / "cat" / "same.png")
    shutil.copy(root / "train" / "cat" / "001.png", root / "train" / "dog" / "wrong.png")
    load()
    assert warned == [
        f"folder {root}: 1 photo(s) with a copy in another part, whose figures it flatters: "
        "test/cat/same.png = train/cat/000.png",
        f"folder {root}: 1 photo(s) with a copy in another class: "
        "train/cat/001.png = train/dog/wrong.png",
    ]
