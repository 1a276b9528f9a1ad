"""Labelled images in memory, and the checks that they pass before anything is trained on them."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cnn_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: `images` uint8 [n, height, width, 3], `labels` int32 [n]."""

    images: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...] = ()
    """For images from a folder: the path of each, relative to that folder."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, mask: np.ndarray) -> "Split":
        """Returns the examples where `mask` (bool [n]) is true, in their order."""
        files = tuple(itertools.compress(self.files, mask))
        return Split(self.images[mask], self.labels[mask], files)


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
        """SHA-256 of class names, images and labels of all parts, as hex."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name, split in self.parts.items():
            digest.update(f"{name} {split.images.shape}".encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


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
