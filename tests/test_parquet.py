"""Images and labels in parquet files, as `datasets` of Hugging Face writes them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise
from PIL import Image

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, parquet
from cnn_jax.errors import UserError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq  # noqa: E402

Load = Callable[..., ImageDataset]
NAMES = ["cat", "dog"]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(**values: Any) -> ImageDataset:
        config = {"name": "folder", "dir": str(tmp_path / "set"), "image_size": 8, **values}
        return data.load(DataConfig(**config), str(tmp_path / "cache"))

    return load


@pytest.fixture
def refusal(load: Load, tmp_path: Path) -> Callable[..., str]:
    def message(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(**values)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "TMP")

    return message


def pixels(number: int) -> np.ndarray:
    return noise(8, 8, 3, seed=number)


def write(
    path: Path,
    numbers: range,
    described: bool = True,
    label: Callable[[int], Any] = lambda n: n % 2,
    column: str = "image",
    struct: bool = True,
) -> None:
    """Writes a file of images whose pixels are `pixels` of these numbers."""
    encoded = []
    for number in numbers:
        file = io.BytesIO()
        Image.fromarray(pixels(number)).save(file, "PNG")
        encoded.append(file.getvalue())
    images = [{"bytes": image, "path": "x.png"} for image in encoded] if struct else encoded
    table = pa.table({column: images, "label": [label(n) for n in numbers], "id": [*numbers]})
    if described:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def check(dataset: ImageDataset, counts: dict[str, int], names: list[str] = NAMES) -> None:
    """Every image is there once, in its part's order, with its label."""
    assert dataset.class_names == tuple(sorted(names))
    assert dataset.counts == counts
    expected = {pixels(n).tobytes(): names[n % 2] for n in range(sum(counts.values()))}
    for split in dataset.parts.values():
        for image, label in zip(split.images, split.labels, strict=True):
            assert expected.pop(image.tobytes()) == dataset.class_names[label]
    assert not expected


def test_files_in_parts_with_names_for_labels(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    write(folder / "train-00000-of-00002.parquet", range(10))
    write(folder / "train-00001-of-00002.parquet", range(10, 20))
    write(folder / "validation-00000-of-00001.parquet", range(20, 24))
    write(folder / "test-00000-of-00001.parquet", range(24, 30))
    for storage in ("memory", "stream"):
        config = DataConfig(name="folder", dir=str(tmp_path / "set"), image_size=8)
        dataset = data.load(config, str(tmp_path / "cache"), storage)
        check(dataset, {"train": 20, "validation": 4, "test": 6})
        assert dataset.source == f"parquet {tmp_path / 'set'}"
    assert dataset.train.files[0] == "data/train-00000-of-00002/000000"


def test_converted_sets_and_plain_bytes(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "set" / "default" / "train" / "0000.parquet", range(12), struct=False)
    check(load(), {"train": 10, "validation": 0, "test": 2})


@pytest.mark.parametrize("place", ["dataset_info.json", "README.md", "neither"])
def test_names_beside_the_files(load: Load, tmp_path: Path, place: str) -> None:
    write(tmp_path / "set" / "train.parquet", range(8), described=False)
    write(tmp_path / "set" / "test.parquet", range(8, 12), described=False)
    if place == "dataset_info.json":
        info = {"features": {"label": {"_type": "ClassLabel", "names": NAMES}}}
        (tmp_path / "set" / place).write_text(json.dumps(info))
    elif place == "README.md":
        (tmp_path / "set" / place).write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n"
            "    dtype:\n      class_label:\n        names:\n          '0': cat\n"
            "          '1': dog\n---\n# Words\n"
        )
    names = ["0", "1"] if place == "neither" else NAMES
    check(load(), {"train": 8, "validation": 0, "test": 4}, names)


def test_labels_that_are_names(load: Load, tmp_path: Path) -> None:
    write(
        tmp_path / "set" / "train.parquet", range(20), described=False, label=lambda n: NAMES[n % 2]
    )
    dataset = load()
    assert dataset.class_names == ("cat", "dog")
    assert load(classes=("dog", "cat")).class_names == ("dog", "cat")


def test_images_are_unpacked_once(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set" / "train.parquet", range(20))
    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_rows", lambda *args: pytest.fail("unpacked again"))
        assert load().sha256 == first.sha256
        write(tmp_path / "set" / "train.parquet", range(22))
        with pytest.raises(pytest.fail.Exception):
            load()
    assert sum(load().counts.values()) == 22
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len([name for name in names if name.startswith("parquet-")]) == 1


def test_two_processes_may_unpack_at_once(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has finished when this one is about to put its folder in place."""
    write(tmp_path / "set" / "train.parquet", range(20))
    expected = load().sha256
    unpacked, asked = parquet._unpacked, []
    monkeypatch.setattr(
        parquet, "_unpacked", lambda *args: unpacked(*args) if asked else asked.append(1)
    )
    monkeypatch.setattr(parquet.shutil, "rmtree", lambda *args, **kwargs: None)
    assert load().sha256 == expected


def test_refusals(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "set" / "part-0.parquet"
    write(path, range(4))
    assert refusal() == "TMP/set/part-0.parquet: its name must begin with train, validation or test"
    path.rename(path.with_name("test.parquet"))
    assert refusal() == "TMP/set has no parquet file of a train part"
    path = path.with_name("train.parquet")
    write(path, range(8), label=lambda n: n)
    assert refusal() == "TMP/set/train.parquet: row 2 has an unknown label"
    write(path, range(8), column="pixels")
    pq.write_table(pq.read_table(path).drop_columns(["pixels"]), path)
    assert refusal() == (
        "TMP/set/train.parquet: which column holds the images is not clear: label, id"
    )
    write(path, range(8), described=False)
    pq.write_table(pq.read_table(path).rename_columns(["image", "a", "b"]), path)
    assert refusal() == (
        "TMP/set/train.parquet: which column holds the labels is not clear: image, a, b"
    )
    path.write_bytes(path.read_bytes()[:200])
    assert refusal().startswith("TMP/set can't be read: ")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == []


def test_without_pyarrow_the_extra_is_named(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set" / "train.parquet", range(4))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal() == (
        "TMP/set holds parquet files, and reading them needs pyarrow; install it with pip install "
        "-e '.[parquet]'"
    )
