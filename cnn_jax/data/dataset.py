"""Labelled images, and the checks that they pass before anything is trained on them."""

import abc
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cnn_jax.errors import UserError, one_line

_BLOCK_BYTES = 2**26
_SAMPLE = 2**14
"""Bytes of a large file that count, at its start, middle and end."""
_FILES = 256
"""Files for each of which a task of its own would take longer than the file."""


Failure = tuple[str, str]
"""A file, and why it can't be read."""


class LazyImages(abc.ABC):
    """Images that are read whenever they are indexed: to their user an array [n, h, w, 3]."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Number, height, width and channels."""

    @abc.abstractmethod
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images of these numbers (integers [k]), uint8 [k, height, width, 3].

        Raises:
            UserError: one of them can't be read.
        """

    @abc.abstractmethod
    def take(self, mask: np.ndarray) -> "LazyImages":
        """Returns the images where `mask` (bool [n]) is true, in their order, without reading."""

    def read_one(self, index: int) -> tuple[np.ndarray, Sequence[Failure]]:
        """Returns the image of a number, and the files that it replaces as they can't be read."""
        return self[index], ()

    @property
    def replaced(self) -> tuple[str, ...]:
        """The files that could not be read so far, in whose place others were returned."""
        return ()

    def note(self, failures: Sequence[Failure]) -> None:
        """Counts what `read_one` replaced; it may have done so in another process."""
        del failures

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Reads the images that a number, a slice, a mask or an array of numbers names."""
        chosen = np.arange(len(self))[key]
        return self.read(np.atleast_1d(chosen)).reshape(*chosen.shape, *self.shape[1:])


Images = np.ndarray | LazyImages


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: `images` uint8 [n, height, width, 3], `labels` int32 [n]."""

    images: Images
    labels: np.ndarray
    files: tuple[str, ...] = ()
    """For images from a folder: the path of each, relative to that folder."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """The size of all pixels in bytes, read or not."""
        return math.prod(self.images.shape)

    def take(self, mask: np.ndarray) -> "Split":
        """Returns the examples where `mask` (bool [n]) is true, in their order."""
        files = tuple(itertools.compress(self.files, mask))
        lazy = isinstance(self.images, LazyImages)
        images = self.images.take(mask) if lazy else self.images[mask]
        return Split(images, self.labels[mask], files)

    def in_memory(self) -> "Split":
        """Returns the same examples with all images read."""
        if isinstance(self.images, LazyImages):
            return replace(self, images=self.images[:])
        return self


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set that is ready for training. `data.load` returns it checked."""

    name: str
    source: str
    """Where the images come from, as reports print it."""
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    skipped: tuple[str, ...]
    """Unreadable files of a folder, as "path: reason"."""
    root: str = ""
    """For images from a folder: the folder that `Split.files` are relative to."""

    @property
    def is_streamed(self) -> bool:
        """Whether the training images are read when they are needed, and not held in memory."""
        return isinstance(self.train.images, LazyImages)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The photos that `data.skip_broken` has replaced so far."""
        images = self.train.images
        return images.replaced if isinstance(images, LazyImages) else ()

    @property
    def nbytes(self) -> int:
        """The size of all pixels in bytes, read or not."""
        return sum(split.nbytes for split in self.parts.values())

    def in_memory(self) -> "ImageDataset":
        """Returns the same data set with all images read."""
        return replace(self, **{name: split.in_memory() for name, split in self.parts.items()})

    @property
    def parts(self) -> dict[str, Split]:
        """The existing parts, by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in parts.items() if split is not None}

    @property
    def counts(self) -> dict[str, int]:
        """Number of images in each part, 0 for a part that does not exist."""
        return {"train": 0, "validation": 0, "test": 0} | {k: len(v) for k, v in self.parts.items()}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of class names, labels and images of all parts, as hex.

        Of photos from a folder, what is hashed is not their pixels but their files (see
        `file_digest`), which takes no decoding: the hash is the same in memory and streamed.

        Raises:
            UserError: a photo can't be read.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name, split in self.parts.items():
            digest.update(f"{name} {split.images.shape}".encode())
            for block in _file_digests(self.root, split) if self.root else _pixels(split):
                digest.update(block)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


def _pixels(split: Split) -> Iterator[memoryview]:
    size = max(_BLOCK_BYTES // math.prod(split.images.shape[1:]), 1)
    for start in range(0, len(split), size):
        yield np.ascontiguousarray(split.images[start : start + size]).data


def _file_digests(root: str, split: Split) -> Iterator[bytes]:
    def of_batch(start: int) -> bytes:
        batch = split.files[start : start + _FILES]
        return b"".join(file_digest(os.path.join(root, name)) for name in batch)

    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from pool.map(of_batch, range(0, len(split), _FILES))


def file_digest(path: str) -> bytes:
    """Returns a hash of a file's size and content: 32 bytes.

    Of a file over 48 KB only the first, middle and last 16 KB count, so that thousands of photos
    take seconds. A photo that was edited and saved again differs there, or in its size.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size}".encode())
            whole = size <= 3 * _SAMPLE
            for start in (0,) if whole else (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                digest.update(os.pread(file.fileno(), size if whole else _SAMPLE, start))
    except OSError as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None
    return digest.digest()


@dataclass(frozen=True, eq=False)
class Decoded:
    """All images of a source, before any choice of classes or examples."""

    class_names: tuple[str, ...]
    parts: dict[str, Split]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """How to decode the images, and what the cache of decoded images needs to know about them."""

    name: str
    identity: str
    """Names the one cache file of these images."""
    fingerprint: str
    """Changes whenever the decoded images may have changed. "": they are never cached."""
    description: str
    decode: Callable[[], Decoded]
    list_photos: Callable[[], Decoded] | None = None
    """For photos: returns the same parts with images that are read when they are needed."""
    root: str = ""
    """For photos: the folder that `Split.files` are relative to."""
    copies: tuple[tuple[str, ...], ...] = ()
    """For photos: groups of files that show the same picture."""


def check(dataset: ImageDataset) -> None:
    """Refuses data on which training would give NaN or accuracies would mean nothing.

    Raises:
        UserError: wrong dtypes or shapes, labels out of range, an empty part, a class without
            training images, sides that differ or are under 8 pixels, fewer than two classes.
    """
    if len(dataset.class_names) < 2:
        raise UserError(f"{dataset.source}: training needs two classes or more")
    for part, split in dataset.parts.items():
        check_split(split, f"{dataset.source}, {part}", len(dataset.class_names))
        if split.images.shape[1:] != dataset.train.images.shape[1:]:
            sizes = f"{split.images.shape[1:3]} and {dataset.train.images.shape[1:3]}"
            raise UserError(f"{dataset.source}: {part} and train differ in size: {sizes}")
    per_class = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    if not per_class.all():
        name = dataset.class_names[int(np.argmin(per_class))]
        raise UserError(f"{dataset.source}: class {name} has no training images")


def check_split(split: Split, where: str, n_classes: int) -> None:
    """Checks one part by itself.

    Raises:
        UserError: wrong dtypes or shapes, labels outside [0, n_classes), no images, or images
            under 8x8 pixels; the message starts with `where`.
    """
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
    if labels.min() < 0 or labels.max() >= n_classes:
        raise UserError(
            f"{where}: labels must be in [0, {n_classes}), not {labels.min()} to {labels.max()}"
        )
