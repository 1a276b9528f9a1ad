"""Prepares CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST from their official archives.

The result is what tfds itself would write, with the examples in the same order, but TensorFlow is
not needed. Addresses, sizes and checksums of the archives are those that tfds records.
"""

import gzip
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import progress
from rich.console import Console

from cnn_jax import files
from cnn_jax.data.download import Archive, download


@dataclass(frozen=True)
class _Contents:
    """What the archives hold."""

    images: Mapping[str, np.ndarray]
    """By split, uint8 [n, height, width, channels]."""
    labels: Mapping[str, Mapping[str, np.ndarray]]
    """By split and name of the label, uint8 [n]."""
    class_names: Mapping[str, Sequence[str]]
    """By name of the label, if the archives name the classes."""


def prepare(builder: Any, archives: Sequence[Archive] = (), pause: float = 1.0) -> Path:
    """Downloads and prepares the set of a tfds builder; returns the folder of its version.

    The folder appears complete or not at all. A broken connection or a killed process leaves a
    folder incomplete.VERSION beside it, and the next call continues from that. While another
    process prepares the same set, this one waits.

    Args:
        builder: `tfds.builder(name, data_dir=..., file_format="array_record")`, a name of `NAMES`.
        archives: what to download; empty: the official archives.
        pause: seconds before another connection to the same server.

    Raises:
        UserError: an archive can't be downloaded.
        OSError, RuntimeError: the disk is full, or the folder can't be written.
    """
    archives = archives or [
        Archive(url, int(info.size), info.checksum) for url, info in builder.url_infos.items()
    ]
    folder = Path(builder.data_dir)
    incomplete = folder.with_name(f"incomplete.{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(incomplete.with_name(f"{incomplete.name}.lock")):
        if not folder.exists():
            incomplete.mkdir(exist_ok=True)
            download(archives, incomplete, pause)
            records = incomplete / "records"
            shutil.rmtree(records, ignore_errors=True)
            records.mkdir()
            _write(builder, _READERS[builder.name](incomplete), records)
            records.rename(folder)
            shutil.rmtree(incomplete)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block; removes the lock file after a success."""
    with path.open("w") as file:
        files.lock(file, wait=True)
        yield
        path.unlink(missing_ok=True)


def _read_cifar(
    folder: Path, archive: str, files: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> _Contents:
    """Reads the binary version of CIFAR: for each image a byte per label, then 3 planes of 32x32.

    Args:
        folder: where the archive is.
        archive: its name.
        files: the members with the images of each split.
        names: for each label, in the order of the bytes, the member with its class names.
    """
    images, labels = {}, {}
    with tarfile.open(folder / archive) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers()}

        def read(name: str) -> bytes:
            file = tar.extractfile(members[name])
            assert file is not None, f"{name} is not a file"
            return file.read()

        for split, parts in files.items():
            data = np.frombuffer(b"".join(map(read, parts)), np.uint8)
            rows = data.reshape(-1, len(names) + 3 * 32 * 32)
            labels[split] = {name: rows[:, column] for column, name in enumerate(names)}
            images[split] = rows[:, len(names) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        class_names = {label: read(member).decode().split() for label, member in names.items()}
    return _Contents(images, labels, class_names)


def _read_mnist(folder: Path) -> _Contents:
    images, labels = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images[split] = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[..., None]
        labels[split] = {"label": _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")}
    return _Contents(images, labels, class_names={})


def _read_idx(path: Path) -> np.ndarray:
    """Returns the array of an IDX file: bytes 0, 0, 8 and the rank; the sizes; the values."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


_READERS = {
    "cifar10": partial(
        _read_cifar,
        archive="cifar-10-binary.tar.gz",
        files={
            "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
            "test": ["test_batch.bin"],
        },
        names={"label": "batches.meta.txt"},
    ),
    "cifar100": partial(
        _read_cifar,
        archive="cifar-100-binary.tar.gz",
        files={"train": ["train.bin"], "test": ["test.bin"]},
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    ),
    "mnist": _read_mnist,
    "fashion_mnist": _read_mnist,
}

NAMES = tuple(_READERS)
"""The sets that can be prepared here."""


def _write(builder: Any, contents: _Contents, folder: Path) -> None:
    """Writes the records, class names and description of a set."""
    import tensorflow_datasets as tfds

    info, splits = builder.info, []
    for split, images in contents.images.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.as_path(folder),
            dataset_name=info.name,
            split=split,
            filetype_suffix="array_record",
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        records = _records(split, images, contents.labels[split], with_id="id" in info.features)
        description = f"writing {info.name} {split}"
        track = progress.track(records, description, len(images), console=Console(stderr=True))
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(images)],
                num_bytes=_write_records(str(path), track),
                filename_template=template,
            )
        )
    for label, names in contents.class_names.items():
        info.features[label].names = names
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


def _write_records(path: str, records: Iterable[bytes]) -> int:
    """Writes an array_record file; returns the number of bytes in its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, n_bytes = ArrayRecordWriter(path, "group_size:1"), 0
    for record in records:
        writer.write(record)
        n_bytes += len(record)
    writer.close()
    return n_bytes


def _records(
    split: str, images: np.ndarray, labels: Mapping[str, np.ndarray], with_id: bool
) -> Iterator[bytes]:
    """Yields each image as PNG with its labels, in serialized tf.train.Example protos."""
    from tensorflow_datasets.proto import tf_example_pb2

    # The order of tfds, which sorts by a hash: the same examples then make up the same batches.
    order = sorted(range(len(images)), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())
    for index in order:
        example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
        features, encoded, pixels = example.features.feature, io.BytesIO(), images[index]
        gray = pixels.shape[-1] == 1
        Image.fromarray(pixels[..., 0] if gray else pixels).save(encoded, "PNG")
        features["image"].bytes_list.value.append(encoded.getvalue())
        for name, values in labels.items():
            features[name].int64_list.value.append(int(values[index]))
        if with_id:
            features["id"].bytes_list.value.append(f"{split}_{index:05}".encode())
        yield example.SerializeToString()
