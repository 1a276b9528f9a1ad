"""Folders of photos as people have them: which are parts, which are classes, and what is left out.

Most tests go through `data.load`, as runs do.
"""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, write_photos
from PIL import Image

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, photos
from cnn_jax.errors import UserError

Load = Callable[..., ImageDataset]
Refusal = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of photos, which is still empty."""
    path = tmp_path / "photos"
    path.mkdir()
    return path


@pytest.fixture
def load(root: Path, tmp_path: Path) -> Load:
    """Loads the photos through a cache in this test's own folder."""

    def load(**values: Any) -> ImageDataset:
        config = DataConfig(**{"name": "folder", "dir": str(root), "image_size": 8, **values})
        return data.load(config, str(tmp_path / "cache"))

    return load


@pytest.fixture
def refusal(load: Load, root: Path) -> Refusal:
    """Returns the one line that loading ends with, in which the folder is called PHOTOS."""

    def message(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(**values)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(root), "PHOTOS")

    return message


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Training", "Val", "Testing"),
        ("Train", "valid", "TEST"),
        ("seg_train", "dev", "seg_test"),
        ("train_images", "Validation", "test-set"),
    ],
)
def test_parts_in_other_spellings(
    load: Load, root: Path, train: str, validation: str, test: str
) -> None:
    for name, count in ((train, 4), (validation, 2), (test, 3)):
        write_photos(root / name, {"cat": count, "dog": count})
    dataset = load()
    assert dataset.class_names == ("cat", "dog")
    assert dataset.counts == {"train": 8, "validation": 4, "test": 6}


def test_parts_nested_as_an_archive_has_them(load: Load, root: Path) -> None:
    write_photos(root / "seg_train" / "seg_train", {"cat": 4, "dog": 4})
    write_photos(root / "seg_test" / "seg_test", {"cat": 2, "dog": 2})
    assert load().counts == {"train": 8, "validation": 0, "test": 4}


def test_parts_that_are_not_known_as_such_are_refused(
    load: Load, refusal: Refusal, root: Path
) -> None:
    write_photos(root / "fold_a", {"cat": 2, "dog": 2})
    write_photos(root / "fold_b", {"cat": 2, "dog": 2, "hen": 2})
    assert refusal() == (
        "PHOTOS: fold_a/ and fold_b/ hold the same folders (cat, dog); if they are parts, rename "
        "them to train/, validation/ and test/; if they are classes, name all classes with "
        "--data.classes=fold_a,fold_b"
    )
    assert load(classes=("fold_a", "fold_b")).class_names == ("fold_a", "fold_b")


def test_one_folder_in_each_class_is_no_part(load: Load, root: Path) -> None:
    for name in ("cat", "dog"):
        write_photos(root / name, {"images": 3})
    assert load().class_names == ("cat", "dog")


def test_parts_without_classes_are_refused(refusal: Refusal, root: Path) -> None:
    write_photos(root, {"train": 3, "test": 3})
    assert refusal() == (
        "PHOTOS: test/ and train/ hold no class folders; sort their photos into folders, one a "
        "class, or list the labels in a file: --data.dir=FILE.csv"
    )


def test_a_class_called_train_may_have_folders_of_its_own(load: Load, root: Path) -> None:
    write_photos(root, {"train": 4, "bus": 4})
    write_photos(root / "train", {"steam": 3, "old": 2})
    dataset = load()
    assert dataset.class_names == ("bus", "train")
    assert sum(dataset.counts.values()) == 13


def test_folders_beside_the_parts_are_named(load: Load, root: Path, warned: list[str]) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4})
    write_photos(root / "holdout", {"cat": 2, "dog": 2})
    write_photos(root, {"seg_pred": 2})
    load()
    assert warned[:2] == [
        f"{root}: holdout/ is not used; train/, validation/ and test/ are",
        f"{root}: seg_pred/ is not used; train/, validation/ and test/ are",
    ]


def test_loose_files_in_a_test_part(refusal: Refusal, root: Path) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4})
    write_photos(root, {"test": 3})
    assert refusal() == (
        "PHOTOS: test/ holds 3 files and no class folder; photos without labels can't be "
        "evaluated: sort them into class folders, or move them elsewhere and use --mode=predict"
    )


def test_a_class_that_train_lacks(load: Load, refusal: Refusal, root: Path) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4})
    write_photos(root / "test", {"cat": 4, "dogs": 4})
    assert refusal() == (
        "PHOTOS: test/ has photos of a class that train lacks: dogs (did you mean dog?); rename or "
        "remove it, or choose the classes with data.classes"
    )
    (root / "test" / "dogs").rename(root / "test" / "dog")
    write_photos(root / "test", {"hen": 2})
    assert refusal().startswith("PHOTOS: test/ has photos of a class that train lacks: hen; ")
    assert load(classes=("dog", "cat")).counts["test"] == 8


def test_a_test_part_may_lack_a_class(load: Load, root: Path, warned: list[str]) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4, "hen": 4})
    write_photos(root / "test", {"cat": 4, "dog": 4})
    dataset = load()
    assert dataset.class_names == ("cat", "dog", "hen")
    assert np.bincount(dataset.test.labels, minlength=3).tolist() == [4, 4, 0]
    assert warned[0] == f"{root}: test/ has no photos of hen"


def test_names_that_differ_in_their_unicode_form(load: Load, root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write_photos(root / "train", {composed: 3, "bar": 3})
    write_photos(root / "test", {decomposed: 2, "bar": 2})
    dataset = load()
    assert dataset.class_names == ("bar", composed)
    assert dataset.counts == {"train": 6, "validation": 0, "test": 4}
    assert load(classes=(decomposed, "bar")).class_names == (composed, "bar")


def test_folders_that_are_no_class(load: Load, root: Path, warned: list[str]) -> None:
    write_photos(root, {"cat": 5, "dog": 5, "misc": 0})
    (root / "misc" / "notes.txt").write_text("words")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "__MACOSX" / "cat" / "._000.png").write_bytes(b"\0\5\x16\7")
    thumbnails = root / "cat" / "@eaDir" / "000.png"
    thumbnails.mkdir(parents=True)
    (root / "@eaDir").mkdir()
    for folder in (thumbnails, root / "@eaDir"):
        Image.fromarray(noise(9, 9, 3)).save(folder / "SYNOPHOTO_THUMB_XL.png")
    (root / "lost+found").mkdir(mode=0)
    dataset = load()
    assert dataset.class_names == ("cat", "dog")
    assert sum(dataset.counts.values()) == 10
    assert dataset.skipped == (
        "@eaDir: a folder of the system, without photos",
        "__MACOSX: a folder of the system, without photos",
        "lost+found: a folder of the system, without photos",
        "misc/notes.txt: not an image of a known format",
        "misc: a folder without photos",
    )
    assert len(warned) == 1
    assert warned[0].startswith(f"folder {root}: 5 files skipped, the first: @eaDir: ")


def test_classes_are_chosen_before_anything_is_refused(
    load: Load, refusal: Refusal, root: Path
) -> None:
    write_photos(root, {"cat": 3, "dog": 3, "phone": 0, "void": 0})
    (root / "phone" / "1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    assert refusal() == (
        "PHOTOS: class phone of train has no readable image: phone/1.heic: HEIC (an iPhone's "
        "format) can't be read; convert it to JPEG or PNG, as `magick mogrify -format jpg FILES` "
        "does"
    )
    assert load(classes=("dog", "cat")).class_names == ("dog", "cat")
    assert refusal(classes=("cat", "phone")).startswith("PHOTOS: class phone of train has no rea")
    assert refusal(classes=("cat", "void")) == (
        "PHOTOS: class void of train has no readable image, and no file at all"
    )
    assert refusal(classes=("cat", "dig")) == (
        "data.classes: there is no class dig (did you mean dog?)"
    )


def test_a_chosen_class_is_read_alone(load: Load, root: Path) -> None:
    write_photos(root, {"cat": 3, "dog": 3, "hen": 3})
    (root / "hen" / "broken.png").write_bytes(b"")
    assert load(classes=("cat", "dog")).skipped == ()
    assert len(load().skipped) == 1


def test_linked_folders_and_files_are_named(refusal: Refusal, root: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "store", {"cat": 3, "dog": 3})
    write_photos(root, {"dog": 3})
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    assert refusal() == (
        "PHOTOS needs two subfolders of images or more, one a class; 1 file skipped, the first: "
        "cat: a link to a folder is not followed"
    )
    assert refusal(classes=("cat", "dog")) == (
        "PHOTOS: class cat can't be read: cat: a link to a folder is not followed"
    )
    (root / "cat").unlink()
    (root / "cat").mkdir()
    for path in (tmp_path / "store" / "cat").iterdir():
        (root / "cat" / path.name).symlink_to(path)
    assert refusal() == (
        "PHOTOS: class cat of train has no readable image: cat/000.png: a link that leaves the "
        "folder"
    )


def test_a_folder_around_the_folder_is_named(refusal: Refusal, root: Path) -> None:
    write_photos(root / "archive", {"cat": 3, "dog": 3})
    assert refusal() == (
        "PHOTOS needs two subfolders of images or more, one a class; did you mean "
        "--data.dir=PHOTOS/archive?"
    )


def test_a_file_of_labels_in_the_folder_is_named(refusal: Refusal, root: Path) -> None:
    write_photos(root, {"images": 5})
    (root / "labels.csv").write_text("path,label\n")
    assert refusal() == (
        "PHOTOS needs two subfolders of images or more, one a class; did you mean the labels in "
        "--data.dir=PHOTOS/labels.csv?"
    )


def test_classes_that_differ_only_in_case_get_a_warning(
    load: Load, root: Path, warned: list[str]
) -> None:
    write_photos(root, {"Cat": 4, "cat": 4, "dog": 4})
    assert load().class_names == ("Cat", "cat", "dog")
    assert warned == [f"folder {root}: classes Cat and cat differ only in upper and lower case"]


def test_each_layout_has_a_cache_of_its_own(load: Load, root: Path) -> None:
    write_photos(root, {"cat": 3, "dog": 3}, size=(24, 16))
    layouts = (
        {"image_size": 12},
        {"image_size": 12, "fit": "pad"},
        {"image_size": 12, "fit": "stretch"},
        {"image_size": 12, "interpolation": "bicubic"},
        {"image_size": 12, "crop": 0.5},
    )
    seen = set()
    for values in (*layouts, *layouts):  # First written, then read.
        train = load(**values).train
        image = train.images[0]
        layout = photos.Layout.of(DataConfig(**values))
        np.testing.assert_array_equal(image, photos.load_image(root / train.files[0], layout))
        seen.add(image.tobytes())
    assert len(seen) == len(layouts)


def test_choices_of_classes_keep_what_was_found_apart(
    load: Load, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(root, {"cat": 4, "dog": 4, "hen": 4})
    choices = ((), ("cat", "dog"), ("dog", "hen"))
    for classes in choices:
        load(classes=classes)
    monkeypatch.setattr(photos, "read_images", lambda *args: pytest.fail("read again"))
    for classes in choices:
        load(classes=classes)


def test_files_that_would_vanish(load: Load, root: Path, warned: list[str]) -> None:
    """Photos without the suffix of one, files that are no photos, and photos beside the classes."""
    write_photos(root, {"cat": 9, "dog": 3})
    cats = root / "cat"
    (cats / "000.png").rename(cats / "000.jpg_large")
    (cats / "001.png").rename(cats / "001.jpeg?w=640")
    (cats / "002.png").rename(cats / "002")
    (cats / "003.png").rename(cats / "003.jpg")  # Which it is not, but it can be read.
    (cats / "004.png").rename(root / "loose.png")
    (cats / "new.jxl").write_bytes(b"\xff\x0a and more")
    (cats / "raw.dng").write_bytes(b"II*\0 and more")
    (cats / "list.txt").write_text("words")
    dataset = load()
    assert sum(dataset.counts.values()) == 8 + 3
    files = {file for split in dataset.parts.values() for file in split.files}
    assert {"cat/000.jpg_large", "cat/001.jpeg?w=640", "cat/002", "cat/003.jpg"} < files
    convert = "can't be read; convert it to JPEG or PNG, as `magick mogrify -format jpg FILES` does"
    assert dataset.skipped == (
        "cat/list.txt: not an image of a known format",
        f"cat/new.jxl: JPEG XL {convert}",
        f"cat/raw.dng: a camera's raw format {convert}",
        "loose.png: beside the class folders",
    )
    assert warned == [f"folder {root}: 4 files skipped, the first: " + "; ".join(dataset.skipped)]


def test_system_files_are_passed_over_in_silence(load: Load, root: Path) -> None:
    write_photos(root, {"cat": 3, "dog": 3})
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "cat" / name).write_bytes(b"x")
    assert load().skipped == ()


def test_a_class_whose_photos_are_all_broken_in_the_test_part(
    load: Load, root: Path, warned: list[str]
) -> None:
    write_photos(root / "train", {"cat": 4, "dog": 4})
    write_photos(root / "test", {"cat": 2, "dog": 1})
    (root / "test" / "dog" / "000.png").write_bytes(b"")
    assert load().counts["test"] == 2
    assert warned[0] == (
        f"{root}: class dog of test has no readable image: test/dog/000.png: not an image of a "
        "known format"
    )


def test_an_unreadable_folder_is_one_line(refusal: Refusal, root: Path) -> None:
    write_photos(root, {"cat": 3, "dog": 3})
    if os.access(root, os.W_OK) and os.geteuid() == 0:
        pytest.skip("root may read every folder")
    (root / "cat").chmod(0)
    assert "Permission denied" in refusal()
