"""Image-classification sets of TensorFlow Datasets (tfds), read without TensorFlow.

Only sets that were prepared as array_record can be read without it. What is not prepared yet is
downloaded and prepared: by `archives` if it knows the set, else by tfds, which needs TensorFlow.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from cnn_jax.config import DataConfig
from cnn_jax.data import archives
from cnn_jax.data.cache import digest, file_states
from cnn_jax.data.dataset import Decoded, Source, Split
from cnn_jax.errors import UserError, nearest, one_line

SHAPES = {
    "cifar10": (32, 10),
    "cifar100": (32, 100),
    "mnist": (28, 10),
    "fashion_mnist": (28, 10),
    "svhn_cropped": (32, 10),
}
"""Side in pixels and number of classes of well-known sets."""

_KNOWN = ("digits", "folder", *SHAPES)
_CHUNK = 1000  # Records per call of the reader: the call costs little then, and so does memory.


def source(config: DataConfig) -> Source:
    """Returns the latest prepared version of the set `config.name`; prepares one if there is none.

    Raises:
        UserError: tfds does not know the set, or it can't be prepared.
        OSError: the prepared files can't be examined.
    """
    data_dir = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(data_dir).expanduser()
    folder = _prepared(config.name, root)
    if folder is None:
        folder = prepare(config.name, root)
    elif not _is_readable(folder):
        folder = _beside(folder, config.name, root)
    return Source(
        name=config.name,
        identity=str(folder.resolve()),
        fingerprint=digest(file_states(sorted(folder.iterdir()), folder)),
        description=f"tfds {config.name} {folder.name} in {root}",
        decode=lambda: _decode(folder),
    )


def prepare(name: str, root: Path | str) -> Path:
    """Downloads a set, prepares it as array_record and returns its folder, `root`/name/version.

    Raises:
        UserError: tfds does not know the set, TensorFlow is needed but not installed, or the
            download or the preparation failed.
    """
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(name, data_dir=root, file_format="array_record")
    except ValueError:  # DatasetNotFoundError is a ValueError, whose message has 300 lines.
        known, guess = ", ".join(_KNOWN), nearest(name.lower(), _KNOWN)
        raise UserError(f"unknown data set {name}{guess}; known: {known}") from None
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"tfds can't prepare {name}: {reason}") from None
    if name not in archives.NAMES and not _installed("tensorflow"):
        raise UserError(
            f"{name} is not in {root}, and tfds needs TensorFlow to prepare it; install that with "
            "pip install -e '.[tfds-prepare]', or point TFDS_DATA_DIR or --data.dir at a folder "
            "in which tfds prepared it as array_record"
        )
    if not _reachable(next(iter(builder.url_infos or {}), None)):
        raise _not_prepared(name, root, "there is no network")
    try:
        if name in archives.NAMES:
            archives.prepare(builder)
        else:
            builder.download_and_prepare()
    except Exception as error:
        raise _not_prepared(name, root, f"preparing it failed: {one_line(error)}") from None
    folder = _prepared(name, Path(root))
    if folder is None:
        raise _not_prepared(name, root, "tfds prepared nothing")
    return folder


def _not_prepared(name: str, root: Path | str, reason: str) -> UserError:
    return UserError(
        f"{name} is not in {root}, and {reason}. Point TFDS_DATA_DIR or --data.dir at a folder in "
        "which tfds prepared it as array_record; or run this once with a network, and it is "
        "prepared; or use other images: --data.name=digits (bundled), or --data.name=folder "
        "--data.dir=PHOTOS"
    )


def _prepared(name: str, root: Path) -> Path | None:
    """Returns the folder of a set that tfds has prepared, if any.

    It is that of the latest version that can be read, or of the latest one if none can be.
    """
    versions = {
        tuple(int(number) for number in info.parent.name.split(".")): info.parent
        for info in (root / name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    }
    latest = [versions[number] for number in sorted(versions, reverse=True)]
    return next((folder for folder in latest if _is_readable(folder)), next(iter(latest), None))


def _is_readable(folder: Path) -> bool:
    """Returns whether a set was prepared as array_record; tfrecord is what tfds writes itself."""
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        return info.get("fileFormat") == "array_record"
    except (OSError, ValueError, AttributeError):
        return True  # Damaged. `_decode` says so.


def _beside(folder: Path, name: str, root: Path) -> Path:
    """Returns a set that is prepared as array_record beside one that can't be read.

    Raises:
        UserError: it is not there, and can't be prepared; the message says how to.
    """
    beside = root / "array_record"
    if found := _prepared(name, beside):
        return found
    logging.warning("%s was not prepared as array_record; preparing it in %s", folder, beside)
    try:
        return prepare(name, beside)
    except UserError as error:
        reason = str(error).partition(". Point TFDS_DATA_DIR")[0]
        arguments = f"{json.dumps(name)}, {json.dumps(str(beside))}"
        code = f"from cnn_jax.data import tfds; tfds.prepare({arguments})"
        raise UserError(
            f"{folder} was not prepared as array_record, the only format that is read without "
            f"TensorFlow, and preparing it beside failed: {reason}. With a network, run: "
            f"python -c {shlex.quote(code)}"
        ) from None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _reachable(url: str | None, seconds: float = 5.0) -> bool:
    """Returns whether a server answers; tfds itself would retry for minutes before it gives up."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url or "https://www.tensorflow.org", method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        answers.append(True)

    # In a thread that can be abandoned, as the timeout does not cover the look-up of the host name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return bool(answers)


def _decode(folder: Path) -> Decoded:
    import tensorflow_datasets

    try:
        builder: Any = tensorflow_datasets.builder_from_directory(folder)
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise UserError(f"{folder} is not a set of images with one label each")
        raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
        splits = [split for split in ("train", "test") if split in builder.info.splits]
        parts = {
            split: _decode_records(
                builder.as_data_source(split=split, deserialize_method=raw), folder
            )
            for split in splits
        }
    except (UserError, MemoryError):
        raise
    except Exception as error:  # array_record, protobuf and Pillow raise many kinds of errors.
        raise UserError(
            f"{folder} can't be read: {one_line(error)}; delete it and prepare it again"
        ) from None
    if "train" not in parts:
        raise UserError(f"{folder} has no train split")
    return Decoded(tuple(features["label"].names), parts)


def _decode_records(records: Any, folder: Path) -> Split:
    """Decodes serialized tf.train.Example protos, in two thirds of the time that tfds takes."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    images = np.empty((0, 8, 8, 3), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _CHUNK):
        keys = range(start, min(start + _CHUNK, len(records)))
        for index, record in zip(keys, records.__getitems__(keys), strict=True):
            example = parse(record).features.feature
            labels[index] = example["label"].int64_list.value[0]
            encoded = io.BytesIO(example["image"].bytes_list.value[0])
            with Image.open(encoded, formats=("PNG", "JPEG")) as image:
                rgb = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            if index == 0:
                images = np.empty((len(records), *rgb.shape), np.uint8)
            if rgb.shape != images.shape[1:]:
                sizes = f"{list(images.shape[1:3])} and {list(rgb.shape[:2])}"
                raise UserError(f"{folder} has images of several sizes: {sizes}")
            images[index] = rgb
    return Split(images, labels)
