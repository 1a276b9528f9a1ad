"""Loads labelled images: `load(config.data)` decodes, caches, splits and checks them.

`digits`, `tfds`, `custom` and `photo_set` each turn one kind of source into uint8 arrays, `cache`
keeps the arrays on disk, `split` chooses the examples, and `stream` reads during training what does
not fit in memory. `archives` prepares some tfds sets from their official archives.

Photos are listed by `photo_folder`, `labels` or `parquet`; `examine` finds broken ones and copies,
and `photos` decodes them. Nothing here imports JAX before it is used.
"""

from functools import partial
from pathlib import Path

from absl import logging

from cnn_jax.config import DataConfig
from cnn_jax.data import cache, custom, digits, photo_folder, photo_set, photos, split, stream, tfds
from cnn_jax.data.cache import cache_folder
from cnn_jax.data.dataset import Decoded, ImageDataset, Source, Split, check
from cnn_jax.errors import UserError, one_line, printable
from cnn_jax.values import is_user_code

__all__ = [
    "ImageDataset",
    "Split",
    "cache_folder",
    "check",
    "describe",
    "image_side",
    "load",
]


def load(config: DataConfig, cache_dir: str = "", storage: str = "auto") -> ImageDataset:
    """Returns the images that `config` describes, from the cache of decoded images if possible.

    If the source has no test part, `config.test_fraction` of each class is held out as one. If it
    has a validation part of its own, `config.validation` is ignored.

    Args:
        config: the source, and which of its images to use.
        cache_dir: `runtime.cache_dir`, the folder for decoded images; "": the user's cache folder.
        storage: `runtime.storage`, whether images are held in memory or read when they are needed.

    Raises:
        UserError: the images are missing, unreadable or do not fit `config` or into memory.
    """
    try:
        source = _source(config, cache_folder(cache_dir))
        decoded = _decode(source, cache_folder(cache_dir), storage)
    except OSError as error:
        raise UserError(f"data.name={config.name} can't be read: {one_line(error)}") from None
    if decoded.skipped:
        logging.warning("%s: %s", source.description, photos.skipped_line(decoded.skipped))
    known = decoded.class_names
    names = tuple(n if n in known else photo_folder.normal(n) for n in config.classes) or known
    parts = {p: split.select(s, known, names) for p, s in decoded.parts.items()}
    set_aside = partial(
        split.set_aside, class_names=names, seed=config.split_seed, copies=source.copies
    )
    train = parts["train"]
    if "test" not in parts:
        train, parts["test"] = set_aside(train, fraction=config.test_fraction, purpose="test")
    if config.validation and "validation" not in parts:
        train, parts["validation"] = set_aside(
            train, fraction=config.validation, purpose="validation"
        )
    if config.images_per_class:
        train = split.limit(train, names, config.images_per_class, config.split_seed)
    dataset = ImageDataset(
        name=config.name,
        source=source.description,
        class_names=names,
        train=train,
        validation=parts.get("validation"),
        test=parts["test"],
        skipped=decoded.skipped,
        root=source.root,
    )
    check(dataset)
    for sentence in split.describe_copies(dataset.parts, source.copies):
        logging.warning("%s: %s", source.description, printable(sentence))
    return dataset if stream.is_chosen(storage, dataset.nbytes) else dataset.in_memory()


def _decode(source: Source, cache_dir: Path, storage: str) -> Decoded:
    """Returns all images of a source, not read yet if they are in a cache or to be streamed."""
    if source.list_photos is not None:
        listed = source.list_photos()
        if stream.is_chosen(storage, sum(part.nbytes for part in listed.parts.values())):
            return listed
    return cache.decode(source, cache_dir)


def describe(config: DataConfig, cache_dir: str = "") -> tuple[tuple[int, int, int], int]:
    """Returns the shape of an image and the number of classes.

    Well-known tfds sets are not read for this, and photos are not decoded.

    Raises:
        UserError: the images are missing, unreadable or do not fit `config`.
    """
    if config.name in tfds.SHAPES:
        side, n_classes = tfds.SHAPES[config.name]
        return (side, side, 3), len(config.classes) or n_classes
    dataset = load(config, cache_dir, "stream")
    return dataset.image_shape, len(dataset.class_names)


def image_side(config: DataConfig) -> int:
    """Returns the side of the images in pixels, without reading them."""
    return tfds.SHAPES[config.name][0] if config.name in tfds.SHAPES else config.image_size


def _source(config: DataConfig, cache_dir: Path) -> Source:
    if is_user_code(config.name):
        return custom.source(config)
    if config.name == "folder":
        return photo_set.source(config, cache_dir)
    return (digits.source if config.name == "digits" else tfds.source)(config)
