"""The user's own photos as a source of images, wherever their labels come from."""

import os
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from absl import logging

from cnn_jax.config import DataConfig
from cnn_jax.data import labels, parquet, photo_folder, photos, progress
from cnn_jax.data.cache import digest
from cnn_jax.data.dataset import Decoded, Source, Split
from cnn_jax.data.examine import examine
from cnn_jax.data.photo_folder import Listing
from cnn_jax.data.stream import PhotoImages
from cnn_jax.errors import UserError, printable


def source(config: DataConfig, cache_dir: Path, least_classes: int = 2) -> Source:
    """Returns the photos that `config.dir` names, each as a square of its `photos.Layout`.

    It is a folder with one subfolder for each class, a folder of parquet files, or a file of
    labels. Photos that can't be read are left out; in a first start all of them are read for this.

    Raises:
        UserError: there is no such folder or file, it has fewer classes than that, or a class of
            its training part has no photo that can be read.
        OSError: a folder or file can't be examined.
    """
    listing = _listing(config, cache_dir, least_classes)
    for note in (*listing.notes, *_differing_in_case(listing)):
        logging.warning("%s", printable(note))
    files, layout = listing.files, photos.Layout.of(config)
    stats = ((file, os.stat(os.path.join(listing.root, file))) for file in files)
    states = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    identity = f"{Path(config.dir).expanduser().resolve()} {sorted(config.classes)}"
    cache = cache_dir / f"examined-{digest(identity)}.json"
    found = examine(listing.root, files, states, cache)
    listing = _without(listing, found.unreadable)
    return Source(
        name="folder",
        identity=f"{identity} {layout}",
        fingerprint=digest(states, listing.parts, listing.skipped),
        description=listing.description,
        decode=lambda: _decode(listing, layout),
        list_photos=lambda: _list(listing, layout, config.skip_broken),
        root=str(listing.root),
        copies=found.copies,
    )


def _listing(config: DataConfig, cache_dir: Path, least_classes: int) -> Listing:
    if not config.dir:
        raise UserError("data.name=folder needs --data.dir=PHOTOS, one subfolder per class")
    path = Path(config.dir).expanduser()
    if path.is_file() and path.suffix.lower() in labels.SUFFIXES:
        return labels.list_file(path, config.classes)
    if not path.is_dir():
        raise UserError(
            f"data.dir={config.dir} is neither a folder nor a file of labels (.csv, .jsonl)"
        )
    if parquet.find(path):
        return parquet.list_parquet(path, cache_dir, config.classes)
    return photo_folder.list_folder(path, config.classes, least_classes)


def _differing_in_case(listing: Listing) -> list[str]:
    """Returns a sentence for each two classes that may be meant to be one."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(name.casefold(), name), name) for name in listing.class_names]
    said = "differ only in upper and lower case"
    return [f"{listing.description}: classes {a} and {b} {said}" for a, b in pairs if a != b]


def _without(listing: Listing, unreadable: dict[str, str]) -> Listing:
    """Returns the listing without photos that can't be read.

    Raises:
        UserError: a class of the training part would have none left.
    """
    if not unreadable:
        return listing
    parts = {
        part: {name: tuple(f for f in files if f not in unreadable) for name, files in each.items()}
        for part, each in listing.parts.items()
    }
    for part, classes in parts.items():
        for name, files in classes.items():
            if before := () if files else listing.parts[part][name]:
                first = f"{before[0]}: {unreadable[before[0]]}"
                message = f"{listing.root}: class {name} of {part} has no readable image: {first}"
                if part == "train":
                    raise UserError(printable(message))
                logging.warning("%s", printable(message))
    skipped = [*listing.skipped, *(f"{file}: {reason}" for file, reason in unreadable.items())]
    return replace(listing, parts=parts, skipped=tuple(sorted(skipped)))


def _part(listing: Listing, part: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the paths of a part's photos, and their labels, int32 [n]."""
    classes = listing.parts[part].values()
    counts = [len(files) for files in classes]
    return tuple(chain(*classes)), np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _list(listing: Listing, layout: photos.Layout, skip_broken: bool) -> Decoded:
    """Returns what `_decode` returns, with photos that are decoded when they are needed."""
    parts, broken = {}, {}
    load = partial(photos.load_image, layout=layout)
    for part in listing.parts:
        files, numbers = _part(listing, part)
        images = PhotoImages(
            str(listing.root), files, numbers, layout.side, load, skip_broken, broken
        )
        parts[part] = Split(images, numbers, files)
    return Decoded(listing.class_names, parts, listing.skipped)


def _decode(listing: Listing, layout: photos.Layout) -> Decoded:
    parts = {}
    with progress.bar("reading photos", len(listing.files)) as done:
        for part in listing.parts:
            files, numbers = _part(listing, part)
            paths = [listing.root / file for file in files]
            images, reasons = photos.read_images(paths, layout, done)
            for path, reason in zip(paths, reasons, strict=True):
                if reason:  # They could all be read a moment ago.
                    raise UserError(f"{os.fspath(path)} can't be read as an image: {reason}")
            parts[part] = Split(images, numbers, files)
    return Decoded(listing.class_names, parts, listing.skipped)
