"""A folder of the user's own photos: one subfolder per class, in one part or in several."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from cnn_jax.config import DataConfig
from cnn_jax.data import photos
from cnn_jax.data.cache import digest, file_states
from cnn_jax.data.dataset import Decoded, Source, Split
from cnn_jax.data.stream import PhotoImages
from cnn_jax.errors import UserError


def source(config: DataConfig) -> Source:
    """Returns the photos below `config.dir`, each cut to a square of `image_size`.

    The folder holds one subfolder for each class; or a `train` folder of these, and optionally
    `validation` (or `val`) and `test`.

    Raises:
        UserError: there is no such folder, it has fewer than two classes, or its parts differ in
            their classes.
        OSError: a folder or file can't be examined.
    """
    if not config.dir:
        raise UserError("data.name=folder needs --data.dir=PHOTOS, one subfolder per class")
    root = Path(config.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir={config.dir} is not a folder")
    skipped: list[str] = []
    layout = photos.Layout.of(config)
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
    return Source(
        name="folder",
        identity=f"{root.resolve()} {layout}",
        fingerprint=digest(file_states(paths, root), skipped),
        description=f"folder {root}",
        decode=lambda: _decode(root, listing, skipped, layout),
        list_photos=lambda: _list(root, listing, skipped, layout, config.skip_broken),
        root=str(root),
    )


def _part_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each part: `root` itself unless it has a `train` folder of classes."""
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
    """Returns the image files of each class below `folder`; adds what it skips to `skipped`."""
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


def _list(
    root: Path,
    listing: Mapping[str, Mapping[str, list[Path]]],
    skipped: list[str],
    layout: photos.Layout,
    skip_broken: bool,
) -> Decoded:
    """Returns what `_decode` returns, with photos that are decoded when they are needed."""
    parts, broken = {}, {}
    names = tuple(listing["train"])
    load = partial(photos.load_image, layout=layout)
    for part, classes in listing.items():
        files = tuple(str(path.relative_to(root)) for name in names for path in classes[name])
        counts = [len(classes[name]) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        images = PhotoImages(str(root), files, labels, layout.side, load, skip_broken, broken)
        parts[part] = Split(images, labels, files)
    return Decoded(names, parts, tuple(sorted(skipped)))


def _decode(
    root: Path,
    listing: Mapping[str, Mapping[str, list[Path]]],
    skipped: list[str],
    layout: photos.Layout,
) -> Decoded:
    parts, unread = {}, list(skipped)
    names = tuple(listing["train"])
    for part, classes in listing.items():
        paths = [path for name in names for path in classes[name]]
        counts = [len(classes[name]) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        images, reasons = photos.read_images(paths, layout)
        readable = np.array([not reason for reason in reasons], bool)
        unread += [
            f"{path.relative_to(root)}: {reason}"
            for path, reason in zip(paths, reasons, strict=True)
            if reason
        ]
        files = tuple(str(path.relative_to(root)) for path in paths)
        whole = Split(images, labels, files)
        # Indexing copies the images, which can be gigabytes.
        parts[part] = whole if readable.all() else whole.take(readable)
        per_class = np.bincount(parts[part].labels, minlength=len(names))
        if not per_class.all():
            name = names[int(np.argmin(per_class))]
            raise UserError(f"{root}: class {name} of {part} has no readable image")
    return Decoded(names, parts, tuple(sorted(unread)))
