"""Images from scikit-learn's digits, photos or tfds: decoded once, cached, split and checked.

What is held out or kept depends on `data.split_seed` and class names alone, never on the training
seed, and each part keeps the order of its source. Nothing here needs JAX or TensorFlow; only
preparing a tfds set for the first time needs TensorFlow.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import tempfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from cnn_jax import photos
from cnn_jax.config import DataConfig, nearest
from cnn_jax.errors import UserError, one_line, printable

KNOWN = ("digits", "folder", "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn_cropped")

# Side in pixels and number of classes of the tfds sets among them.
_SHAPES = {
    "cifar10": (32, 10),
    "cifar100": (32, 100),
    "mnist": (28, 10),
    "fashion_mnist": (28, 10),
    "svhn_cropped": (32, 10),
}

_CACHE_FORMAT = "2"  # Raise it with every change to decoding, and old caches are built anew.
_CHUNK = 1000  # Records read at once: enough to hide the call, few enough to stay in memory.


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: `images` uint8 [n, height, width, 3], `labels` int32 [n]."""

    images: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...] = ()
    """Of a folder's images, where in the folder each comes from."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, mask: np.ndarray) -> "Split":
        """Returns the examples where `mask` (bool [n]) holds, in order."""
        files = tuple(itertools.compress(self.files, mask))
        return Split(self.images[mask], self.labels[mask], files)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set that is ready to train on. `load` returns it checked."""

    name: str
    source: str
    """Where the images come from, in words to stand beside a result."""
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    skipped: tuple[str, ...]
    """Unreadable files of a folder, as "path: reason"."""

    @property
    def parts(self) -> dict[str, Split]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in parts.items() if split is not None}

    @property
    def counts(self) -> dict[str, int]:
        """Number of images in each part, 0 where there is no such part."""
        return {"train": 0, "validation": 0, "test": 0} | {k: len(v) for k, v in self.parts.items()}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of class names, images and labels of all parts, as hex."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name, split in self.parts.items():
            digest.update(f"{name} {split.images.shape}".encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class _Decoded:
    """All of a source, before any choice of classes or examples."""

    class_names: tuple[str, ...]
    parts: dict[str, Split]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """What to decode, how to tell that it changed, and where its cache lies."""

    name: str
    identity: str
    fingerprint: str
    description: str
    decode: Callable[[], _Decoded]


def load(config: DataConfig) -> ImageDataset:
    """Reads, decodes (or takes from the cache), splits and checks the images of `config`.

    A source without a test part has `test_fraction` of each class held out. A folder's own
    validation part takes the place of the fraction in `validation`.

    Raises:
        UserError: the images are missing, unreadable or do not fit `config`.
    """
    sources = {"digits": _digits, "folder": _folder}
    try:
        source = sources.get(config.name, _tfds)(config)
        decoded = _through_cache(source, cache_dir(config))
    except (OSError, MemoryError) as error:
        raise UserError(f"data.name={config.name} can't be read: {one_line(error)}") from None
    if decoded.skipped:
        message = "%s: %d files skipped, the first: %s"
        logging.warning(
            message, source.description, len(decoded.skipped), printable(decoded.skipped[0])
        )
    names = config.classes or decoded.class_names
    parts = {p: _select(s, decoded.class_names, names) for p, s in decoded.parts.items()}
    split = partial(_set_aside, class_names=names, seed=config.split_seed)
    train = parts["train"]
    if "test" not in parts:
        train, parts["test"] = split(train, fraction=config.test_fraction, purpose="test")
    if config.validation and "validation" not in parts:
        train, parts["validation"] = split(train, fraction=config.validation, purpose="validation")
    if config.images_per_class:
        train = _limit(train, names, config.images_per_class, config.split_seed)
    dataset = ImageDataset(
        name=config.name,
        source=source.description,
        class_names=names,
        train=train,
        validation=parts.get("validation"),
        test=parts["test"],
        skipped=decoded.skipped,
    )
    check(dataset)
    return dataset


def describe(config: DataConfig) -> tuple[tuple[int, int, int], int]:
    """Returns the shape of an image and the number of classes; well-known sets are not read."""
    if config.name in _SHAPES:
        side, n_classes = _SHAPES[config.name]
        return (side, side, 3), len(config.classes) or n_classes
    dataset = load(config)
    return dataset.image_shape, len(dataset.class_names)


def image_side(config: DataConfig) -> int:
    """Returns the side in pixels of the images that a config names, without reading them."""
    return _SHAPES[config.name][0] if config.name in _SHAPES else config.image_size


def check(dataset: ImageDataset) -> None:
    """Refuses what would train to NaN or be measured wrongly.

    Raises:
        UserError: wrong dtypes or shapes, labels out of range, an empty part, a class without
            training images, sides that differ or are under 8 pixels, fewer than two classes.
    """
    if len(dataset.class_names) < 2:
        raise UserError(f"{dataset.source}: training needs two classes or more")
    for part, split in dataset.parts.items():
        _check_split(split, f"{dataset.source}, {part}", len(dataset.class_names))
        if split.images.shape[1:] != dataset.train.images.shape[1:]:
            sizes = f"{split.images.shape[1:3]} and {dataset.train.images.shape[1:3]}"
            raise UserError(f"{dataset.source}: {part} and train differ in size: {sizes}")
    per_class = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    if not per_class.all():
        name = dataset.class_names[int(np.argmin(per_class))]
        raise UserError(f"{dataset.source}: class {name} has no training images")


def _check_split(split: Split, where: str, classes: int) -> None:
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{where}: images must be uint8 [n, height, width, 3], not {found}")
    if labels.dtype != np.int32 or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{where}: labels must be int32 [n], not {found}")
    if len(images) != len(labels):
        raise UserError(f"{where}: {len(images)} images but {len(labels)} labels")
    if not len(images):
        raise UserError(f"{where}: there are no images")
    if min(images.shape[1:3]) < 8:
        raise UserError(f"{where}: images must be at least 8x8, not {list(images.shape[1:3])}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{where}: labels must be in [0, {classes}), not {labels.min()} to {labels.max()}"
        )


def _select(split: Split, known: Sequence[str], names: Sequence[str]) -> Split:
    """Keeps the classes `names` of those `known`, relabelled 0, 1, ... in that order."""
    if list(names) == list(known):
        return split
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise UserError(f"data.classes: there is no class {name}{hint}")
    new_labels = np.full(len(known), -1, np.int32)
    new_labels[[known.index(name) for name in names]] = np.arange(len(names))
    labels = new_labels[split.labels]
    return replace(split, labels=labels).take(labels >= 0)


def _set_aside(
    split: Split, class_names: Sequence[str], fraction: float, seed: int, purpose: str
) -> tuple[Split, Split]:
    """Splits off `fraction` of each class, at least one image and never all."""

    def count(name: str, available: int) -> int:
        if available < 2:
            raise UserError(
                f"class {name} has {available} training image(s): too few for a {purpose} part"
            )
        return min(max(round(fraction * available), 1), available - 1)

    aside = _pick(split, class_names, count, seed, purpose)
    return split.take(~aside), split.take(aside)


def _limit(split: Split, class_names: Sequence[str], limit: int, seed: int) -> Split:
    def count(name: str, available: int) -> int:
        if available < limit:
            raise UserError(
                f"data.images_per_class={limit}: class {name} has {available} training images"
            )
        return limit

    return split.take(_pick(split, class_names, count, seed, "train"))


def _pick(
    split: Split,
    class_names: Sequence[str],
    count: Callable[[str, int], int],
    seed: int,
    purpose: str,
) -> np.ndarray:
    """Returns a mask (bool [n]) of `count(class name, available)` random examples of each class."""
    mask = np.zeros(len(split), bool)
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(split.labels == label)
        # Seeded by name, so a class keeps its examples whichever classes stand beside it; raw
        # bits, as NumPy promises those, and not its Generator's, to stay the same for ever.
        entropy = [seed, zlib.crc32(f"{purpose}/{name}".encode("utf-8", "surrogateescape"))]
        ranks = np.random.PCG64(entropy).random_raw(len(indices))
        order = np.argsort(ranks, kind="stable")
        mask[indices[order[: count(name, len(indices))]]] = True
    return mask


def cache_dir(config: DataConfig) -> Path:
    """Returns the folder that keeps what can be computed again; it need not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cnn_jax")
    return Path(config.cache_dir or default).expanduser()


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _file_states(paths: Iterable[Path], root: Path) -> list[tuple[str, int, int]]:
    stats = ((str(path.relative_to(root)), path.stat()) for path in paths)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _through_cache(source: _Source, folder: Path) -> _Decoded:
    # One file a source, with the fingerprint inside it: a changed source replaces its old cache.
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', source.name)}-{_digest(source.identity)}.npz"
    fingerprint = _digest(_CACHE_FORMAT, source.fingerprint)
    decoded = _read_cache(path, fingerprint)
    if decoded is None:
        decoded = source.decode()
        for part, split in decoded.parts.items():
            _check_split(split, f"{source.description}, {part}", len(decoded.class_names))
        _write_cache(path, fingerprint, decoded)
    return decoded


def _read_cache(path: Path, fingerprint: str) -> _Decoded | None:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            # zipfile compares a CRC-32 of each array, and nothing but an array names the others.
            if str(arrays["fingerprint"]) != fingerprint:
                return None
            parts = {
                part: Split(
                    arrays[f"{part}_images"],
                    arrays[f"{part}_labels"],
                    tuple(arrays[f"{part}_files"].tolist()),
                )
                for part in arrays["parts"].tolist()
            }
            names, skipped = arrays["class_names"].tolist(), arrays["skipped"].tolist()
            return _Decoded(tuple(names), parts, tuple(skipped))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # Damaged bytes raise almost anything in zipfile and NumPy.
        logging.warning("cache %s is damaged and is built anew: %s", path, one_line(error))
        return None


def _write_cache(path: Path, fingerprint: str, decoded: _Decoded) -> None:
    arrays: dict[str, Any] = {
        "fingerprint": np.array(fingerprint),
        "parts": np.array(list(decoded.parts)),
        "class_names": np.array(decoded.class_names, dtype=str),
        "skipped": np.array(decoded.skipped, dtype=str),
    }
    for part, split in decoded.parts.items():
        files = np.array(split.files, dtype=str)
        arrays |= {
            f"{part}_images": split.images,
            f"{part}_labels": split.labels,
            f"{part}_files": files,
        }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        logging.warning("decoded images are not cached in %s: %s", path.parent, one_line(error))
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _digits(config: DataConfig) -> _Source:
    size = config.image_size
    return _Source(
        name="digits",
        identity=f"digits {size}",
        fingerprint=importlib.metadata.version("scikit-learn"),
        description=f"scikit-learn load_digits, scaled to {size}x{size}x3",
        decode=lambda: _decode_digits(size),
    )


def _decode_digits(size: int) -> _Decoded:
    from sklearn.datasets import load_digits  # Takes a second to import.

    scans, labels = load_digits(return_X_y=True)  # 1,797 scans of 8x8 values from 0 to 16.
    gray = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    bilinear = Image.Resampling.BILINEAR
    large = [Image.fromarray(scan).resize((size, size), bilinear) for scan in gray]
    images = np.repeat(np.stack([np.asarray(image) for image in large])[..., None], 3, axis=-1)
    names = tuple(str(digit) for digit in range(10))
    return _Decoded(names, {"train": Split(images, labels.astype(np.int32))})


def _folder(config: DataConfig) -> _Source:
    if not config.dir:
        raise UserError("data.name=folder needs --set=data.dir=PHOTOS, one subfolder a class")
    root = Path(config.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir={config.dir} is not a folder")
    skipped: list[str] = []
    listing = {
        part: _class_files(folder, root, skipped) for part, folder in _part_folders(root).items()
    }
    names = tuple(listing["train"])
    if len(names) < 2:
        raise UserError(f"{root} needs two subfolders of images or more, one a class")
    for part, files in listing.items():
        if odd := sorted(set(files) ^ set(names)):
            raise UserError(f"{root}: train and {part} differ in classes: {', '.join(odd)}")
    paths = [path for files in listing.values() for paths in files.values() for path in paths]
    return _Source(
        name="folder",
        identity=f"{root.resolve()} {config.image_size}",
        fingerprint=_digest(_file_states(paths, root), skipped),
        description=f"folder {root}",
        decode=lambda: _decode_folder(root, listing, skipped, config.image_size),
    )


def _part_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each part; `root` itself where no `train` folder holds classes."""
    train = root / "train"
    if not train.is_dir() or not any(path.is_dir() for path in train.iterdir()):
        return {"train": root}
    folders = {"train": train}
    for part, name in (("validation", "validation"), ("validation", "val"), ("test", "test")):
        if (root / name).is_dir():
            if part in folders:
                raise UserError(f"{root} has both validation/ and val/; keep one")
            folders[part] = root / name
    return folders


def _class_files(folder: Path, root: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """Returns the image files of each class below `folder`; what is not read joins `skipped`."""
    classes = {}
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        if path.is_symlink():
            skipped.append(f"{path.relative_to(root)}: a link to a folder is not followed")
            continue
        classes[path.name], unread = photos.image_files(path, root)
        skipped.extend(unread)
    return classes


def _decode_folder(
    root: Path, listing: Mapping[str, Mapping[str, list[Path]]], skipped: list[str], size: int
) -> _Decoded:
    parts, unread = {}, list(skipped)
    names = tuple(listing["train"])
    for part, classes in listing.items():
        paths = [path for name in names for path in classes[name]]
        counts = [len(classes[name]) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        images, reasons = photos.read_images(paths, size)
        read = np.array([not reason for reason in reasons], bool)
        unread += [
            f"{path.relative_to(root)}: {reason}"
            for path, reason in zip(paths, reasons, strict=True)
            if reason
        ]
        files = tuple(str(path.relative_to(root)) for path in paths)
        whole = Split(images, labels, files)
        parts[part] = whole if read.all() else whole.take(read)
        readable = np.bincount(parts[part].labels, minlength=len(names))
        if not readable.all():
            name = names[int(np.argmin(readable))]
            raise UserError(f"{root}: class {name} of {part} has no readable image")
    return _Decoded(names, parts, tuple(sorted(unread)))


def _tfds(config: DataConfig) -> _Source:
    data_dir = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(data_dir).expanduser()
    folder = _prepared(root, config.name) or _prepare(root, config.name)
    return _Source(
        name=config.name,
        identity=str(folder.resolve()),
        fingerprint=_digest(_file_states(sorted(folder.iterdir()), folder)),
        description=f"tfds {config.name} {folder.name} in {root}",
        decode=lambda: _decode_tfds(folder),
    )


def _prepared(root: Path, name: str) -> Path | None:
    """Returns the folder of the latest version of a set that tfds has prepared, if any."""
    versions = {
        tuple(int(number) for number in info.parent.name.split(".")): info.parent
        for info in (root / name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    }
    return versions[max(versions)] if versions else None


def _prepare(root: Path, name: str) -> Path:
    """Downloads a set and prepares it as array_record, where TensorFlow and a network are there."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except (ValueError, ImportError):  # DatasetNotFoundError is a ValueError, of 300 lines.
        known = ", ".join(KNOWN)
        guess = nearest(name.lower(), KNOWN)
        raise UserError(f"unknown data set {name}{guess}; known: {known}") from None
    if missing := [m for m in ("tensorflow", "importlib_resources") if not _installed(m)]:
        reason = f"{missing[0]}, which prepares it, can't be imported"
    elif not _reachable(next(iter(builder.url_infos or {}), None)):
        reason = "there is no network"
    else:
        try:
            builder.download_and_prepare()
            reason = "tfds prepared nothing"
        except Exception as error:
            reason = f"preparing it failed: {one_line(error)}"
    folder = _prepared(root, name)
    if folder is None:
        raise UserError(
            f"{name} is not in {root}, and {reason}. Point TFDS_DATA_DIR or --set=data.dir at a "
            "data_dir that tfds prepared as array_record; or go online once, and it is prepared; "
            "or use other images: --set=data.name=digits (bundled), or --set=data.name=folder "
            "with --set=data.dir=PHOTOS"
        )
    return folder


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _reachable(url: str | None, seconds: float = 5.0) -> bool:
    """Says whether a server answers, as tfds' own download tries for minutes before it gives up."""
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

    # A thread that is left behind, as the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return bool(answers)


def _decode_tfds(folder: Path) -> _Decoded:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder)
        features = builder.info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise UserError(f"{folder} is not a set of images with one label each")
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        splits = [name for name in ("train", "test") if name in builder.info.splits]
        parts = {
            name: _decode_records(
                builder.as_data_source(split=name, deserialize_method=raw), folder
            )
            for name in splits
        }
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(
            f"{folder} was not prepared as array_record, which alone is read without "
            "TensorFlow; choose another data.dir"
        ) from None
    except Exception as error:  # array_record, protobuf and Pillow raise what they like.
        raise UserError(
            f"{folder} can't be read: {one_line(error)}; delete it and prepare it again"
        ) from None
    if "train" not in parts:
        raise UserError(f"{folder} has no train split")
    return _Decoded(tuple(features["label"].names), parts)


def _decode_records(records: Any, folder: Path) -> Split:
    """Decodes tfds' records (tf.train.Example), in two thirds of the time tfds takes for it."""
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
