"""Every source of images on small sets made here, and the real CIFAR-10 where it is."""

import http.server
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, seed_of, write_photos
from PIL import Image

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, Split
from cnn_jax.data.photos import Layout, load_image
from cnn_jax.errors import UserError

Load = Callable[..., ImageDataset]
Refusal = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the images of a DataConfig through a cache in this test's own folder."""
    return lambda **values: data.load(DataConfig(**values), str(tmp_path / "cache"))


@pytest.fixture
def refusal(load: Load) -> Refusal:
    """Returns the one line that a DataConfig ends with."""

    def message(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(**values)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tfds(
    root: Path,
    name: str,
    splits: Mapping[str, list[tuple[np.ndarray, int]]],
    version: str = "3.0.2",
    file_format: str = "array_record",
    label_key: str = "label",
    kind: str = "PNG",
) -> Path:
    """Writes what tfds' own preparation leaves: records in two shards, and three descriptions."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / name / version
    folder.mkdir(parents=True)
    infos = []
    for split, examples in splits.items():
        half = len(examples) // 2
        for number, shard in enumerate((examples[:half], examples[half:])):
            path = folder / f"{name}-{split}.{file_format}-0000{number}-of-00002"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for pixels, label in shard:
                example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
                features = example.features.feature
                features["image"].bytes_list.value.append(encoded(pixels, kind))
                features["label"].int64_list.value.append(label)
                writer.write(example.SerializeToString())
            writer.close()
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1000",
                "shardLengths": [str(half), str(len(examples) - half)],
            }
        )
    pixels = next(iter(splits.values()))[0][0]
    sides = [str(side) for side in (*pixels.shape, 1)[:3]]
    module = "tensorflow_datasets.core.features"
    features_json = {
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{module}.image_feature.Image",
                    "image": {"dtype": "uint8", "shape": {"dimensions": sides}},
                },
                label_key: {
                    "pythonClassName": f"{module}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": "3"},
                },
            }
        },
    }
    info = {"fileFormat": file_format, "name": name, "splits": infos, "version": version}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features_json))
    (folder / f"{label_key}.labels.txt").write_text("ant\nbee\ncat\n")
    return folder


def examples(n: int, *shape: int, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    return [(noise(*shape, seed=seed + i), i % 3) for i in range(n)]


def rows(split: Split | None) -> list[bytes]:
    assert split is not None
    return [image.tobytes() for image in split.images]


def test_import_is_light() -> None:
    script = (
        "import sys, cnn_jax.data; heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'sklearn'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_digits(load: Load) -> None:
    dataset = load()
    assert dataset.name == "digits"
    assert dataset.source == "scikit-learn load_digits, scaled to 32x32x3"
    assert dataset.class_names == tuple("0123456789")
    assert dataset.counts == {"train": 1438, "validation": 0, "test": 359}
    assert dataset.train.images.shape == (1438, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert np.bincount(dataset.test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert dataset.train.images.max() == 255
    np.testing.assert_array_equal(dataset.train.images[..., 0], dataset.train.images[..., 2])


def test_digits_are_the_scans(load: Load) -> None:
    from sklearn.datasets import load_digits

    dataset = load(image_size=8)
    scans = load_digits(return_X_y=True)[0]
    parts = dataset.train.images, dataset.test.images
    ours = sorted(image[..., 0].tobytes() for part in parts for image in part)
    assert ours == sorted(np.round(scan * 255 / 16).astype(np.uint8).tobytes() for scan in scans)


def test_split_is_the_same_for_ever(load: Load) -> None:
    # The literal hash also guards splits against a new release of NumPy.
    dataset = load(image_size=8, validation=0.1)
    expected = "d99e0ce7a24af27965f5125a6321e6ed22fec5f575f280c0323921b141005195"
    assert dataset.sha256 == expected


def test_digits_keep_their_bits(load: Load) -> None:
    expected = "48baf5bf46602413de91c5d43feed568754bcf0b1c427038f1914c013944bd5c"
    assert load().sha256 == expected


def test_digits_are_stored_larger_than_the_network_sees_them(load: Load) -> None:
    assert load(image_size=14, crop=0.875).image_shape == (16, 16, 3)


def test_second_load_reads_the_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load()
    monkeypatch.setattr(data.digits, "_decode", lambda size: pytest.fail("decoded again"))
    second = load()
    assert first.sha256 == second.sha256
    with pytest.raises(pytest.fail.Exception):
        load(image_size=16)


def test_validation_is_taken_from_train_by_class(load: Load) -> None:
    whole = load(image_size=8)
    dataset = load(image_size=8, validation=0.25)
    assert dataset.validation is not None
    assert dataset.counts == {"train": 1079, "validation": 359, "test": 359}
    assert rows(dataset.test) == rows(whole.test)
    assert sorted(rows(dataset.train) + rows(dataset.validation)) == sorted(rows(whole.train))
    shares = np.bincount(dataset.validation.labels) / np.bincount(whole.train.labels)
    np.testing.assert_allclose(shares, 0.25, atol=0.005)
    kept = set(rows(dataset.train))
    assert rows(dataset.train) == [row for row in rows(whole.train) if row in kept]


def test_split_seed_alone_moves_the_split(load: Load) -> None:
    first, again = load(image_size=8), load(image_size=8)
    other = load(image_size=8, split_seed=1)
    assert rows(first.test) == rows(again.test)
    assert rows(first.test) != rows(other.test)
    assert len(first.test) == len(other.test)


def test_classes_are_relabelled_in_order(load: Load) -> None:
    whole = load(image_size=8, validation=0.1)
    dataset = load(image_size=8, validation=0.1, classes=("7", "2"))
    assert dataset.class_names == ("7", "2")
    for part in ("train", "validation", "test"):
        few, all_ = dataset.parts[part], whole.parts[part]
        for label, name in enumerate((7, 2)):
            assert rows(few.take(few.labels == label)) == rows(all_.take(all_.labels == name))
        assert set(few.labels.tolist()) == {0, 1}
        assert few.labels.dtype == np.int32


def test_images_per_class(load: Load) -> None:
    whole = load(image_size=8, validation=0.1)
    few = load(image_size=8, validation=0.1, images_per_class=20)
    fewer = load(image_size=8, validation=0.1, images_per_class=5)
    assert np.bincount(few.train.labels).tolist() == [20] * 10
    assert rows(few.validation) == rows(whole.validation)
    assert rows(few.test) == rows(whole.test)
    assert set(rows(fewer.train)) < set(rows(few.train)) < set(rows(whole.train))
    other = load(image_size=8, validation=0.1, images_per_class=20, split_seed=1)
    assert rows(other.train) != rows(few.train)


def test_wrong_choices_are_one_line(refusal: Refusal) -> None:
    assert refusal(images_per_class=500) == (
        "data.images_per_class=500: class 0 has 142 training images"
    )
    # Of those 142, validation takes 14 first.
    assert refusal(images_per_class=129, validation=0.1) == (
        "data.images_per_class=129: class 0 has 128 training images"
    )
    known = "; known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert refusal(classes=("1", "x")) == f"data.classes: there is no class x{known}"


def test_unknown_class_gets_the_nearest_name(refusal: Refusal, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"horse": 2, "zebra": 2})
    message = refusal(name="folder", dir=str(tmp_path / "photos"), classes=("hors", "zebra"))
    assert message == "data.classes: there is no class hors (did you mean horse?)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 3], np.int32)}, "labels must be in [0, 3), not 0 to 3"),
        ({"labels": np.array([0, 1, -1], np.int32)}, "labels must be in [0, 3), not -1 to 1"),
        ({"labels": np.array([0, 1, 2])}, "labels must be int32 [n], not int64 [3]"),
        ({"labels": np.array([0, 1], np.int32)}, "3 images but 2 labels"),
        ({"labels": np.zeros((3, 1), np.int32)}, "labels must be int32 [n], not int32 [3, 1]"),
        (
            {"images": np.zeros((3, 8, 8, 3), np.float32)},
            "images must be uint8 [n, height, width, 3], not float32 [3, 8, 8, 3]",
        ),
        (
            {"images": np.zeros((3, 8, 8, 1), np.uint8)},
            "images must be uint8 [n, height, width, 3], not uint8 [3, 8, 8, 1]",
        ),
        ({"images": np.zeros((3, 8, 7, 3), np.uint8)}, "images must be at least 8x8, not [8, 7]"),
        (
            {"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, np.int32)},
            "there are no images",
        ),
    ],
)
def test_check_split(change: dict[str, np.ndarray], message: str) -> None:
    good = {"images": np.zeros((3, 8, 8, 3), np.uint8), "labels": np.arange(3, dtype=np.int32)}
    fine, odd = Split(**good), Split(**good | change)
    names = ("a", "b", "c")
    data.check(ImageDataset("n", "src", names, fine, fine, fine, ()))
    for part in ("train", "validation", "test"):
        parts = {"train": fine, "validation": fine, "test": fine} | {part: odd}
        with pytest.raises(UserError) as caught:
            data.check(ImageDataset("n", "src", names, skipped=(), **parts))
        assert str(caught.value) == f"src, {part}: {message}"


def test_check_dataset() -> None:
    small = Split(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3, dtype=np.int32))
    large = Split(np.zeros((3, 8, 9, 3), np.uint8), np.arange(3, dtype=np.int32))
    with pytest.raises(UserError, match=r"^src: test and train differ in size: \(8, 9\) and \(8,"):
        data.check(ImageDataset("n", "src", ("a", "b", "c"), small, None, large, ()))
    with pytest.raises(UserError, match=r"^src: class d has no training images$"):
        data.check(ImageDataset("n", "src", ("a", "b", "c", "d"), small, None, small, ()))
    single = small.take(small.labels == 0)
    with pytest.raises(UserError, match=r"^src: training needs two classes or more$"):
        data.check(ImageDataset("n", "src", ("a",), single, None, single, ()))


def test_sha256_sees_every_part() -> None:
    def build(**change: Any) -> str:
        split = Split(noise(3, 8, 8, 3), np.arange(3, dtype=np.int32))
        values: dict[str, Any] = {"train": split, "validation": None, "test": split}
        values |= {"class_names": ("a", "b", "c")} | change
        return ImageDataset("n", "src", skipped=(), **values).sha256

    pixels = noise(3, 8, 8, 3)
    pixels[2, 7, 7, 2] ^= 1
    pixel = Split(pixels, np.arange(3, dtype=np.int32))
    label = Split(noise(3, 8, 8, 3), np.array([0, 1, 1], np.int32))
    changes: list[dict[str, Any]] = [
        {"train": pixel},
        {"test": pixel},
        {"test": label},
        {"validation": label},
        {"class_names": ("a", "b", "d")},
    ]
    assert len({build(), *(build(**change) for change in changes)}) == 6
    assert build() == build()


def test_tfds_colour(load: Load, tmp_path: Path) -> None:
    train, test = examples(7, 9, 8, 3), examples(3, 9, 8, 3, seed=50)
    splits = {"train": train, "test": test, "extra": [(noise(9, 8, 3), -1)] * 2}
    write_tfds(tmp_path / "sets", "svhn_cropped", splits)
    dataset = load(name="svhn_cropped", dir=str(tmp_path / "sets"))
    assert dataset.source == f"tfds svhn_cropped 3.0.2 in {tmp_path / 'sets'}"
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.counts == {"train": 7, "validation": 0, "test": 3}
    for split, expected in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(split.images, np.stack([pixels for pixels, _ in expected]))
        assert split.labels.tolist() == [label for _, label in expected]
        assert split.labels.dtype == np.int32


def test_tfds_reads_in_chunks(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.tfds, "_CHUNK", 3)
    train = examples(8, 8, 8, 3)
    write_tfds(tmp_path, "cifar10", {"train": train, "test": train[:3]})
    dataset = load(name="cifar10", dir=str(tmp_path))
    np.testing.assert_array_equal(dataset.train.images, np.stack([pixels for pixels, _ in train]))


def test_tfds_gray_is_repeated(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = examples(6, 28, 28)
    write_tfds(tmp_path, "mnist", {"train": train, "test": train[:3]})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    dataset = load(name="mnist")
    assert dataset.train.images.shape == (6, 28, 28, 3)
    for channel in range(3):
        assert (dataset.train.images[2, :, :, channel] == train[2][0]).all()


def test_tfds_jpeg(load: Load, tmp_path: Path) -> None:
    flat = [(np.full((8, 8, 3), 40 * i, np.uint8), i % 3) for i in range(6)]
    write_tfds(tmp_path, "flowers", {"train": flat, "test": flat}, kind="JPEG")
    dataset = load(name="flowers", dir=str(tmp_path))
    assert dataset.train.images[:, 4, 4, 1].tolist() == [0, 40, 80, 120, 160, 200]


def test_tfds_without_test_part_holds_one_out(load: Load, tmp_path: Path) -> None:
    write_tfds(tmp_path, "flowers", {"train": examples(30, 8, 8, 3)})
    dataset = load(name="flowers", dir=str(tmp_path), test_fraction=0.3)
    assert dataset.counts == {"train": 21, "validation": 0, "test": 9}


def test_tfds_takes_the_latest_version(load: Load, tmp_path: Path) -> None:
    for version, count in (("3.0.9", 3), ("3.0.10", 6), ("2.9.9", 9)):
        splits = {"train": examples(count, 8, 8, 3), "test": examples(3, 8, 8, 3)}
        write_tfds(tmp_path, "mnist", splits, version=version)
    (tmp_path / "mnist" / "incomplete.4.0.0").mkdir()
    (tmp_path / "mnist" / "incomplete.4.0.0" / "dataset_info.json").write_text("{}")
    assert len(load(name="mnist", dir=str(tmp_path)).train) == 6


def test_tfds_cache(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": examples(6, 8, 8, 3), "test": examples(3, 8, 8, 3)}
    folder = write_tfds(tmp_path / "sets", "mnist", splits)
    config = dict(name="mnist", dir=str(tmp_path / "sets"))
    first = load(**config)
    with monkeypatch.context() as patch:
        patch.setattr(data.tfds, "_decode", lambda *args: pytest.fail("decoded again"))
        assert load(**config).sha256 == first.sha256
        changed = folder / "label.labels.txt"
        changed.write_text("ant\nbee\ncow\n")
        with pytest.raises(pytest.fail.Exception):
            load(**config)
    assert load(**config).class_names == ("ant", "bee", "cow")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # The new one replaced the old one.


def test_tfds_refusals(refusal: Refusal, tmp_path: Path) -> None:
    good = examples(6, 8, 8, 3)

    def message(case: str, splits: Mapping[str, Any], **values: Any) -> str:
        folder = write_tfds(tmp_path / case, "mnist", splits, **values)
        line = refusal(name="mnist", dir=str(tmp_path / case))
        return line.replace(str(folder), "FOLDER").replace(str(tmp_path), "TMP")

    assert message("sizes", {"train": [*good, (noise(8, 9, 3), 0)], "test": good}) == (
        "FOLDER has images of several sizes: [8, 8] and [8, 9]"
    )
    assert message("labels", {"train": good, "test": [(good[0][0], 3), (good[1][0], 1)]}) == (
        "tfds mnist 3.0.2 in TMP/labels, test: labels must be in [0, 3), not 1 to 3"
    )
    assert message("key", {"train": good}, label_key="score") == (
        "FOLDER is not a set of images with one label each"
    )
    assert message("test", {"test": good}) == "FOLDER has no train split"
    assert not (tmp_path / "cache").exists()
    assert message("absent", {"train": [e for e in good if e[1] != 1], "test": good}) == (
        "tfds mnist 3.0.2 in TMP/absent: class bee has no training images"
    )


@pytest.mark.parametrize("damage", ["truncated", "gone", "flipped"])
def test_tfds_damage_is_one_line(refusal: Refusal, tmp_path: Path, damage: str) -> None:
    splits = {"train": examples(40, 32, 32, 3), "test": examples(4, 32, 32, 3)}
    folder = write_tfds(tmp_path, "mnist", splits)
    shard = folder / "mnist-train.array_record-00000-of-00002"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        shard.write_bytes(content[:5000] + bytes(500) + content[5500:])
    message = refusal(name="mnist", dir=str(tmp_path))
    assert message.startswith(f"{folder} can't be read: ")
    assert message.endswith("; delete it and prepare it again")


WAYS = (
    ". Point TFDS_DATA_DIR or --data.dir at a folder in which tfds prepared it as array_record; or "
    "run this once with a network, and it is prepared; or use other images: --data.name=digits "
    "(bundled), or --data.name=folder --data.dir=PHOTOS"
)


def test_other_sets_name_the_extra_that_prepares_them(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.tfds, "_installed", lambda module: module != "tensorflow")
    monkeypatch.setattr(data.tfds, "_reachable", lambda url: pytest.fail("went online for nothing"))
    assert refusal(name="svhn_cropped", dir=str(tmp_path / "none")) == (
        f"svhn_cropped is not in {tmp_path / 'none'}, and tfds needs TensorFlow to prepare it; "
        "install that with pip install -e '.[tfds-prepare]', or point TFDS_DATA_DIR or --data.dir "
        "at a folder in which tfds prepared it as array_record"
    )


def test_a_set_whose_code_needs_another_package(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    def builder(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'pandas'\nand 20 lines more")

    monkeypatch.setattr(tfds, "builder", builder)
    message = refusal(name="qm9", dir=str(tmp_path))
    assert message == "tfds can't prepare qm9: No module named 'pandas'"


def test_unprepared_offline_fails_fast(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(data.tfds, "_installed", lambda module: module != "tensorflow")
    monkeypatch.setattr(data.tfds, "_reachable", lambda url: bool(asked.append(url)))
    start = time.monotonic()
    assert refusal(name="cifar10", dir=str(tmp_path)) == (
        f"cifar10 is not in {tmp_path}, and there is no network{WAYS}"
    )
    assert time.monotonic() - start < 5
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("name", ["cifar10", "svhn_cropped"])
def test_prepares_on_first_use(
    load: Load, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A set with official archives by their module, another one by tfds itself."""
    import tensorflow_datasets as tfds

    def builder(name: str, data_dir: Path, file_format: str) -> SimpleNamespace:
        assert file_format == "array_record"

        def prepare(*args: Any) -> None:
            if "broken" in str(data_dir):
                raise RuntimeError("two\nlines")
            if "void" not in str(data_dir):
                splits = {"train": examples(6, 8, 8, 3), "test": examples(3, 8, 8)}
                write_tfds(data_dir, name, splits)

        if name == "cifar10":
            monkeypatch.setattr(data.tfds.archives, "prepare", prepare)
            return SimpleNamespace(url_infos=None)
        return SimpleNamespace(url_infos=None, download_and_prepare=prepare)

    monkeypatch.setattr(data.tfds, "_installed", lambda module: name == "svhn_cropped")
    monkeypatch.setattr(data.tfds, "_reachable", lambda url: True)
    monkeypatch.setattr(tfds, "builder", builder)
    dataset = load(name=name, dir=str(tmp_path / "fine"))
    assert dataset.counts == {"train": 6, "validation": 0, "test": 3}
    assert refusal(name=name, dir=str(tmp_path / "broken")) == (
        f"{name} is not in {tmp_path / 'broken'}, and preparing it failed: two lines{WAYS}"
    )
    assert refusal(name=name, dir=str(tmp_path / "void")) == (
        f"{name} is not in {tmp_path / 'void'}, and tfds prepared nothing{WAYS}"
    )


def test_a_set_in_another_format_is_prepared_beside(
    load: Load, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": examples(6, 8, 8, 3), "test": examples(3, 8, 8, 3)}
    root = tmp_path / "it's here"
    folder = write_tfds(root, "mnist", splits, file_format="tfrecord")
    asked: list[tuple[str, str]] = []

    def prepare(name: str, data_dir: Path | str) -> Path:
        asked.append((name, str(data_dir)))
        if len(asked) == 1:
            raise data.tfds._not_prepared(name, data_dir, "there is no network")
        return write_tfds(Path(data_dir), name, splits)

    monkeypatch.setattr(data.tfds, "prepare", prepare)
    message = refusal(name="mnist", dir=str(root))
    assert message.startswith(
        f"{folder} was not prepared as array_record, the only format that is read without "
        "TensorFlow, and preparing it beside failed: mnist is not in "
        f"{root}/array_record, and there is no network. With a network, run: python -c "
    )
    # The command that the user can copy.
    command = shlex.split(message.partition("run: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    assert asked == [("mnist", f"{root}/array_record")] * 2
    for _ in range(2):  # What was prepared beside is found.
        assert len(load(name="mnist", dir=str(root)).train) == 6
    assert len(asked) == 2


def test_a_set_in_another_format_does_not_hide_an_older_one(load: Load, tmp_path: Path) -> None:
    splits = {"train": examples(6, 8, 8, 3), "test": examples(3, 8, 8, 3)}
    write_tfds(tmp_path, "mnist", splits, version="3.0.1")
    write_tfds(tmp_path, "mnist", splits, version="3.0.2", file_format="tfrecord")
    assert load(name="mnist", dir=str(tmp_path)).source.startswith("tfds mnist 3.0.1 ")


def test_reachable() -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set.tar.gz"
        assert data.tfds._reachable(url)  # A server that answers "not found" answers.
        server.shutdown()
    assert not data.tfds._reachable(url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert not data.tfds._reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.2)
        assert time.monotonic() - start < 2


def test_reachable_waits_for_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *args, **kwargs: done.wait(30) and BytesIO()
    )
    start = time.monotonic()
    assert not data.tfds._reachable("http://a.name/", seconds=0.1)
    assert time.monotonic() - start < 5
    done.set()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifr10", " (did you mean cifar10?)"),
        ("CIFAR-10", " (did you mean cifar10?)"),
        ("digit", " (did you mean digits?)"),
        ("fashionmnist", " (did you mean fashion_mnist?)"),
        ("no such set", ""),
    ],
)
def test_unknown_name(refusal: Refusal, tmp_path: Path, name: str, hint: str) -> None:
    known = "digits, folder, cifar10, cifar100, mnist, fashion_mnist, svhn_cropped"
    message = refusal(name=name, dir=str(tmp_path))
    assert message == f"unknown data set {name}{hint}; known: {known}"


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").iterdir()
    assert path.suffix == ".npz"
    return path


def test_damaged_cache_is_rebuilt(load: Load, tmp_path: Path, warned: list[str]) -> None:
    expected = load(image_size=8).sha256
    path = cache_file(tmp_path)
    content = path.read_bytes()
    damages = [b"", content[:100], content[:-1], content[: len(content) // 2], b"x" * len(content)]
    middle = len(content) // 2
    damages.append(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    for number, damage in enumerate(damages, start=1):
        path.write_bytes(damage)
        assert load(image_size=8).sha256 == expected
        assert len(warned) == number
        assert warned[-1].startswith(f"cache {path} is damaged and is rebuilt: ")
        assert path.read_bytes() == content
    assert load(image_size=8).sha256 == expected
    assert len(warned) == len(damages)


def test_no_flipped_byte_passes(load: Load, tmp_path: Path, warned: list[str]) -> None:
    write_tfds(tmp_path, "mnist", {"train": examples(3, 8, 8, 3), "test": examples(3, 8, 8, 3)})
    expected = load(name="mnist", dir=str(tmp_path))
    path = cache_file(tmp_path)
    content = path.read_bytes()
    fingerprint = str(np.load(path)["fingerprint"])
    noticed = 0
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        decoded = data.cache._read(path, fingerprint)
        noticed += decoded is None
        if decoded is not None:  # Bytes of the container that nothing reads, such as dates.
            assert decoded.class_names == expected.class_names
            assert rows(decoded.parts["train"]) == rows(expected.train)
            assert decoded.parts["test"].labels.tolist() == expected.test.labels.tolist()
    assert noticed > 0.7 * len(content) / 7


def test_cache_folder_that_cannot_be_made(tmp_path: Path, warned: list[str]) -> None:
    (tmp_path / "file").write_text("")
    dataset = data.load(DataConfig(image_size=8), str(tmp_path / "file" / "cache"))
    assert len(dataset.train) == 1438
    assert len(warned) == 1
    assert warned[0].startswith(f"decoded images are not cached in {tmp_path / 'file' / 'cache'}:")


@pytest.mark.slow
def test_full_disk_while_caching(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from cnn_jax import data; from cnn_jax.config import DataConfig;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "print(len(data.load(DataConfig(image_size=8), sys.argv[1]).train))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "1438\n"
    assert f"decoded images are not cached in {tmp_path / 'cache'}:" in run.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.load(DataConfig(image_size=8))
    assert len(list((tmp_path / "xdg" / "cnn_jax").glob("digits-*.npz"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data.load(DataConfig(image_size=8))
    assert len(list((tmp_path / "home" / ".cache" / "cnn_jax").glob("digits-*.npz"))) == 1


def test_folder_without_parts(load: Load, tmp_path: Path, warned: list[str]) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, {"zebra": 10, "ape": 5}, size=(16, 16))
    (photos / "ape" / ".hidden.png").write_bytes(b"")
    (photos / "ape" / "notes.txt").write_text("no image")
    (photos / ".git").mkdir()
    (photos / "ape" / ".thumbnails").mkdir()
    Image.fromarray(noise(9, 9, 3)).save(photos / "ape" / ".thumbnails" / "000.png")
    dataset = load(name="folder", dir=str(photos), image_size=16)
    assert dataset.source == f"folder {photos}"
    assert dataset.class_names == ("ape", "zebra")
    assert dataset.counts == {"train": 11, "validation": 0, "test": 4}
    assert np.bincount(dataset.test.labels).tolist() == [1, 3]
    unknown = "ape/notes.txt: not an image of a known format"
    assert dataset.skipped == (unknown,)
    assert warned == [f"folder {photos}: 1 file skipped, the first: {unknown}"]
    written = [noise(16, 16, 3, seed=seed_of("zebra") + i).tobytes() for i in range(10)]
    zebras = [*rows(dataset.train.take(dataset.train.labels == 1))]
    assert len(zebras) == 7
    assert zebras == [row for row in written if row in set(zebras)]


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_folder_with_parts(load: Load, tmp_path: Path, validation: str) -> None:
    for part, counts in (("train", (4, 5)), ("test", (2, 3)), (validation, (1, 2))):
        write_photos(tmp_path / "photos" / part, dict(zip(("a", "b"), counts, strict=True)))
    dataset = load(name="folder", dir=str(tmp_path / "photos"), image_size=8)
    assert dataset.counts == {"train": 9, "validation": 3, "test": 5}
    assert dataset.validation is not None
    assert dataset.validation.labels.tolist() == [0, 1, 1]
    own = load(name="folder", dir=str(tmp_path / "photos"), image_size=8, validation=0.3)
    assert own.sha256 == dataset.sha256


def test_class_may_be_called_train(load: Load, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"train": 3, "bus": 3})
    dataset = load(name="folder", dir=str(tmp_path / "photos"), image_size=8)
    assert dataset.class_names == ("bus", "train")


def test_folder_cache(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, {"a": 3, "b": 3})
    (photos / "a" / "empty.png").write_bytes(b"")
    config = dict(name="folder", dir=str(photos), image_size=8)
    first = load(**config)
    with monkeypatch.context() as patch:
        patch.setattr(data.photo_set, "_decode", lambda *args: pytest.fail("decoded again"))
        second = load(**config)
        assert (second.sha256, second.skipped) == (first.sha256, first.skipped)
        assert second.test.files == first.test.files != ()
        os.utime(photos / "b" / "001.png", (1, 1))
        with pytest.raises(pytest.fail.Exception):
            load(**config)
    (photos / "b" / "001.png").unlink()
    assert len(load(**config).train) + len(load(**config).test) == 5


def test_a_folder_s_images_know_their_files(load: Load, tmp_path: Path) -> None:
    """Through the cache, the choice of classes, the split and a file that is skipped."""
    photos = tmp_path / "photos"
    write_photos(photos, {"a": 4, "b": 5, "c": 3})
    (photos / "b" / "000.png").write_bytes(b"broken")
    config = dict(name="folder", dir=str(photos), image_size=8, classes=("b", "c"))
    for _ in range(2):
        dataset = load(**config)
        for split in dataset.parts.values():
            assert len(split.files) == len(split)
            for image, label, file in zip(split.images, split.labels, split.files, strict=True):
                assert file.startswith(f"{dataset.class_names[label]}/")
                np.testing.assert_array_equal(image, load_image(photos / file, Layout(8)))
        listed = [file for split in dataset.parts.values() for file in split.files]
        assert len(set(listed)) == 7


def test_folder_skips_what_cannot_be_read(
    load: Load, tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, outside = tmp_path / "photos", tmp_path / "outside"
    write_photos(photos, {"a": 3, "b": 2})
    write_photos(outside, {"c": 1})
    a = photos / "a"
    (a / "empty.jpg").write_bytes(b"")
    (a / "text.png").write_text("not an image")
    (a / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (a / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (a / "truncated.png").write_bytes((a / "000.png").read_bytes()[:200])
    Image.fromarray(noise(40, 50, 3)).save(a / "bomb.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(a / "float.tif")
    (a / "leaves.png").symlink_to(outside / "c" / "000.png")
    (a / "broken.png").symlink_to(a / "gone.png")
    (a / "loop.png").symlink_to(a / "loop.png")
    (a / "inside.png").symlink_to(a / "000.png")
    (photos / "linked").symlink_to(outside / "c")
    os.mkfifo(a / "pipe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # Twice as many is an error already.
    dataset = load(name="folder", dir=str(photos), image_size=8)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.train) + len(dataset.test) == 6  # With the link that stays inside.
    reasons = dict(line.split(": ", 1) for line in dataset.skipped)
    assert sorted(reasons) == sorted(
        ["linked"]
        + [
            f"a/{name}"
            for name in (
                *("bomb.png", "broken.png", "empty.jpg", "float.tif", "leaves.png", "loop.png"),
                *("phone.heic", "pipe.png", "script.jpg", "text.png", "truncated.png"),
            )
        ]
    )
    unknown = "not an image of a known format"
    for name in ("empty.jpg", "text.png", "script.jpg"):
        assert reasons[f"a/{name}"] == unknown
    assert reasons["a/phone.heic"].startswith("HEIC (an iPhone's format) can't be read; convert it")
    assert reasons["linked"] == "a link to a folder is not followed"
    assert reasons["a/leaves.png"] == "a link that leaves the folder"
    assert reasons["a/pipe.png"] == reasons["a/broken.png"] == "not a file"
    assert reasons["a/loop.png"] == "Too many levels of symbolic links"
    assert "decompression bomb" in reasons["a/bomb.png"]
    assert reasons["a/float.tif"] == "its pixels are floats of unknown range"
    assert len(warned) == 1
    assert warned[0].startswith(f"folder {photos}: 12 files skipped, the first: a/bomb.png: ")


def test_folder_refusals(refusal: Refusal, tmp_path: Path) -> None:
    def message(case: str) -> str:
        return refusal(name="folder", dir=str(tmp_path / case), image_size=8).replace(
            str(tmp_path), "TMP"
        )

    assert refusal(name="folder") == (
        "data.name=folder needs --data.dir=PHOTOS, one subfolder per class"
    )
    assert message("none") == (
        "data.dir=TMP/none is neither a folder nor a file of labels (.csv, .jsonl)"
    )
    write_photos(tmp_path / "one", {"a": 2})
    assert message("one") == "TMP/one needs two subfolders of images or more, one a class"
    write_photos(tmp_path / "bad", {"a": 2, "b": 1})
    (tmp_path / "bad" / "b" / "000.png").write_bytes(b"")
    assert message("bad") == (
        "TMP/bad: class b of train has no readable image: b/000.png: not an image of a known format"
    )
    write_photos(tmp_path / "both" / "train", {"a": 2, "b": 2})
    write_photos(tmp_path / "both" / "val", {"a": 2, "b": 2})
    write_photos(tmp_path / "both" / "validation", {"a": 2, "b": 2})
    assert message("both") == "TMP/both has both val/ and validation/; keep one"
    write_photos(tmp_path / "few", {"a": 2, "b": 1})
    assert message("few") == "class b has 1 training image(s): too few for a test part"


OWN = """
import numpy as np

OWN_CLASSES = ["square", "circle"]

def shapes(config):
    n, size = 40, config.image_size
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    return {"class_names": ["square", "circle"], "train": (images, np.arange(n) % 2)}

def with_parts(config):
    whole = shapes(config)
    images, labels = whole["train"]
    parts = {"train": slice(20), "validation": slice(20, 30), "test": slice(30, 40)}
    return whole | {part: (images[s], labels[s]) for part, s in parts.items()}

def returns_none(config):
    return None

def misspelt(config):
    return shapes(config) | {"tset": ()}

def no_pair(config):
    return shapes(config) | {"test": shapes(config)["train"][0]}

def triple(config):
    images, labels = shapes(config)["train"]
    return {"class_names": ["a", "b"], "train": (images, labels, labels)}

def gray(config):
    images, labels = shapes(config)["train"]
    return {"class_names": ["a", "b"], "train": (images[..., 0], labels)}

def large_label(config):
    return {"class_names": ["a", "b"], "train": (shapes(config)["train"][0], [2**32] * 40)}

def half_label(config):
    return {"class_names": ["a", "b"], "train": (shapes(config)["train"][0], [0.5] * 40)}

def three(config):
    return {"class_names": ["a", "b"], "train": (shapes(config)["train"][0], np.arange(40) % 3)}

def unreadable(config):
    open("/no/such/file")

def faulty(config):
    return {}["images"]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file of the user's."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_a_function_of_the_user_s(load: Load, own: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": f"{own}:shapes", "image_size": 12}
    dataset = load(**values, validation=0.25)
    assert dataset.name == dataset.source == f"{own}:shapes"
    assert dataset.class_names == ("square", "circle")
    assert dataset.image_shape == (12, 12, 3)
    assert dataset.counts == {"train": 24, "validation": 8, "test": 8}
    assert dataset.train.labels.dtype == np.int32
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    kept = {image.tobytes(): i % 2 for i, image in enumerate(images)}
    for split in dataset.parts.values():
        assert [kept[row] for row in rows(split)] == split.labels.tolist()
    assert load(**values, classes=("circle", "square")).class_names == ("circle", "square")
    assert data.describe(DataConfig(**values)) == ((12, 12, 3), 2)
    # What the function reads may change, so nothing is cached.
    assert not (tmp_path / "cache").exists()


def test_a_function_with_parts_of_its_own(load: Load, own: str) -> None:
    dataset = load(name=f"{own}:with_parts", validation=0.5)
    assert dataset.counts == {"train": 20, "validation": 10, "test": 10}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "returns_none",
            "OWN must return a dict with the keys class_names and train, and optionally validation "
            "and test",
        ),
        ("OWN_CLASSES", "data.name=OWN is not a function"),
        ("misspelt", "OWN returned an unknown key tset (did you mean test?)"),
        ("no_pair", "OWN, test: not a pair (images, labels)"),
        ("triple", "OWN, train: not a pair (images, labels)"),
        (
            "gray",
            "OWN, train: images must be uint8 [n, height, width, 3], not uint8 [40, 32, 32]",
        ),
        ("large_label", "OWN, train: labels must be in [0, 2), not -1 to -1"),
        ("half_label", "OWN, train: labels must be int32 [n], not float64 [40]"),
        ("three", "OWN, train: labels must be in [0, 2), not 0 to 2"),
        (
            "unreadable",
            "data.name=OWN can't be read: [Errno 2] No such file or directory: '/no/such/file'",
        ),
    ],
)
def test_what_a_function_returns_is_checked(
    refusal: Refusal, own: str, function: str, message: str
) -> None:
    name = f"{own}:{function}"
    assert refusal(name=name).replace(name, "OWN") == message


def test_a_fault_in_a_function_keeps_its_traceback(load: Load, own: str) -> None:
    with pytest.raises(KeyError):
        load(name=f"{own}:faulty")


@pytest.fixture(scope="module")
def cifar10_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = os.environ.get("TFDS_DATA_DIR")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("TFDS_DATA_DIR names no data_dir with cifar10")
    cache = str(tmp_path_factory.mktemp("cifar10"))
    data.load(DataConfig(name="cifar10"), cache)
    return cache


@pytest.mark.slow
def test_cifar10(cifar10_cache: str) -> None:
    config, seconds = DataConfig(name="cifar10"), []
    for _ in range(3):  # The best of three, as other work on the machine only ever adds time.
        start = time.monotonic()
        data.load(config, cifar10_cache)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1
    dataset = data.load(config, cifar10_cache)
    assert dataset.counts == {"train": 50_000, "validation": 0, "test": 10_000}
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    animals = ("bird", "cat", "deer", "dog", "frog", "horse")
    assert dataset.class_names == ("airplane", "automobile", *animals, "ship", "truck")
    # The order is tfds' own, and a JPEG copy differs from the original by little.
    first = dataset.train.images[0].astype(int)
    assert dataset.train.labels[:5].tolist() == [3, 8, 9, 0, 5]
    np.testing.assert_allclose(first[0, 0], [102, 98, 115], atol=20)
    np.testing.assert_allclose(first.mean(), 381004 / 3072, atol=1)


def test_cifar10_pixels_of_the_jpeg_copy(cifar10_cache: str) -> None:
    dataset = data.load(DataConfig(name="cifar10", validation=0.1), cifar10_cache)
    assert dataset.counts == {"train": 45_000, "validation": 5000, "test": 10_000}
    assert dataset.test.labels[:5].tolist() == [4, 9, 7, 3, 2]
    whole = data.load(DataConfig(name="cifar10"), cifar10_cache)
    if whole.train.images[0, 0, 0].tolist() != [102, 98, 115]:
        pytest.skip("this is not the JPEG copy of CIFAR-10")
    assert whole.train.images[0, 0, 1].tolist() == [107, 104, 121]
    assert whole.train.images[0, -1, -1].tolist() == [108, 85, 103]
    assert whole.test.images[0, 0, :2].tolist() == [[35, 32, 25], [20, 20, 10]]
    assert whole.sha256 == "ab757d226ebaa6f5b35182e4fb9483a28eb2e25e8ac74648e09c0bb7964642ab"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_describe_needs_no_images_of_a_known_set(name: str) -> None:
    config = DataConfig(name=name, dir="/nowhere")
    assert data.describe(config) == ((32, 32, 3), 10)


def test_describe_counts_the_chosen_classes() -> None:
    assert data.describe(DataConfig(name="mnist", classes=("3", "5")))[1] == 2
