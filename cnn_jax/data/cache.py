"""Decoded images on disk, so that a source is decoded once and not at the start of every run."""

import hashlib
import json
import math
import mmap
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cnn_jax import memory
from cnn_jax.data.dataset import Decoded, LazyImages, Source, Split, check_split
from cnn_jax.errors import one_line

_FORMAT = "2"  # Raise it with every change to decoding: older cache files are then rebuilt.

_BLOCK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class RowsOfArray(LazyImages):
    """Images that are rows of an array, which may lie in a file; only those needed are copied."""

    array: np.ndarray
    rows: np.ndarray
    """The numbers of the images in the array."""
    release: Callable[[], object] = lambda: None
    """Frees the memory that reading a part of the array has filled."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number, height, width and channels."""
        return (len(self.rows), *self.array.shape[1:])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns copies of the images of these numbers."""
        rows, shape = self.rows[indices], self.array.shape[1:]
        images = memory.empty_images(len(rows), *shape)
        size = max(_BLOCK_BYTES // math.prod(shape), 1)
        for start in range(0, len(rows), size):
            images[start : start + size] = self.array[rows[start : start + size]]
            self.release()
        return images

    def take(self, mask: np.ndarray) -> "RowsOfArray":
        """Returns the images where `mask` is true, without copying them."""
        return replace(self, rows=self.rows[mask])


def cache_folder(cache_dir: str) -> Path:
    """Returns the folder for everything that can be recomputed; it need not exist.

    Args:
        cache_dir: `runtime.cache_dir`; "" stands for `cnn_jax` in the user's cache folder.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cnn_jax")
    return Path(cache_dir or default).expanduser()


def digest(*values: Any) -> str:
    """Returns a hash of JSON values: 32 hex digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def file_states(paths: Iterable[Path], root: Path) -> list[tuple[str, int, int]]:
    """Returns relative path, size in bytes and time of change in ns of each file.

    Raises:
        OSError: a file can't be examined.
    """
    stats = ((str(path.relative_to(root)), path.stat()) for path in paths)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def decode(source: Source, folder: Path) -> Decoded:
    """Returns the images of `source` from its file in `folder`, which is written if need be.

    They are not read from there yet, but the file was found undamaged. One with another fingerprint
    is rebuilt, and so is a damaged one, with a warning. If the file can't be written, the images
    are returned all the same, with a warning.

    Raises:
        UserError: the source can't be decoded, or its images fail the checks.
    """
    # The fingerprint is inside the file and not in its name, so that the cache of a source that
    # changed replaces the old one.
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', source.name)}-{digest(source.identity)}.npz"
    fingerprint = digest(_FORMAT, source.fingerprint)
    decoded = _read(path, fingerprint) if source.fingerprint else None
    if decoded is not None:
        return decoded
    decoded = source.decode()
    for part, split in decoded.parts.items():
        check_split(split, f"{source.description}, {part}", len(decoded.class_names))
    if source.fingerprint and _write(path, fingerprint, decoded):
        # What was written is mapped in place of what was decoded, which is then freed.
        return _read(path, fingerprint) or decoded
    parts = {part: _of_array(split) for part, split in decoded.parts.items()}
    return replace(decoded, parts=parts)


def _of_array(split: Split) -> Split:
    """Returns a split whose images are copied only when it is known which ones are needed."""
    array = split.images
    assert isinstance(array, np.ndarray)
    return replace(split, images=RowsOfArray(array, np.arange(len(array))))


def _read(path: Path, fingerprint: str) -> Decoded | None:
    """Returns what a cache file holds; None if it is absent, outdated or damaged."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if str(arrays["fingerprint"]) != fingerprint:
                return None
            # zipfile verifies the CRC-32 of what is read. The names of the parts are an array too.
            parts = {
                part: Split(
                    _map_images(path, f"{part}_images.npy"),
                    arrays[f"{part}_labels"],
                    tuple(arrays[f"{part}_files"].tolist()),
                )
                for part in arrays["parts"].tolist()
            }
            names, skipped = arrays["class_names"].tolist(), arrays["skipped"].tolist()
            return Decoded(tuple(names), parts, tuple(skipped))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # Damaged bytes raise almost anything in zipfile and NumPy.
        logging.warning("cache %s is damaged and is rebuilt: %s", path, one_line(error))
        return None


def _map_images(path: Path, name: str) -> RowsOfArray:
    """Returns the images in a member of a cache file, which np.savez does not compress.

    Raises:
        zipfile.BadZipFile: its bytes do not have the CRC-32 that is stored with them.
    """
    with path.open("rb") as file:
        with zipfile.ZipFile(file) as archive, archive.open(name) as member:
            while member.read(_BLOCK_BYTES):
                pass
            header = archive.getinfo(name).header_offset
        # Two bytes each at 26: the lengths of the name and of the extra field, which come before
        # the member itself (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7).
        file.seek(header + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        # It stays as it is, whatever another process puts in the file's place.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.frombuffer(mapped, dtype, math.prod(shape), file.tell()).reshape(shape)
    release = partial(mapped.madvise, mmap.MADV_DONTNEED)
    return RowsOfArray(array, np.arange(len(array)), release)


def _write(path: Path, fingerprint: str, decoded: Decoded) -> bool:
    """Writes a cache file; returns whether it could, or warns."""
    arrays: dict[str, Any] = {
        "fingerprint": np.array(fingerprint),
        "parts": np.array(list(decoded.parts)),
        "class_names": np.array(decoded.class_names, dtype=str),
        "skipped": np.array(decoded.skipped, dtype=str),
    }
    for part, split in decoded.parts.items():
        files = np.array(split.files, dtype=str)
        arrays |= {
            f"{part}_images": np.ascontiguousarray(split.images),
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
        return True
    except OSError as error:
        logging.warning("decoded images are not cached in %s: %s", path.parent, one_line(error))
        return False
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
