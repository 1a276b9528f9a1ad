"""Decoded images on disk, so that a source is decoded once and not at the start of every run."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cnn_jax.data.dataset import Decoded, Source, Split, check_split
from cnn_jax.errors import one_line

_FORMAT = "2"  # Raise it with every change to decoding: older cache files are then rebuilt.


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

    A file with another fingerprint is rebuilt, and so is a damaged one, with a warning. If the
    file can't be written, the images are returned all the same, with a warning.

    Raises:
        UserError: the source can't be decoded, or its images fail the checks.
    """
    # The fingerprint is inside the file and not in its name, so that the cache of a source that
    # changed replaces the old one.
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', source.name)}-{digest(source.identity)}.npz"
    fingerprint = digest(_FORMAT, source.fingerprint)
    decoded = _read(path, fingerprint) if source.fingerprint else None
    if decoded is None:
        decoded = source.decode()
        for part, split in decoded.parts.items():
            check_split(split, f"{source.description}, {part}", len(decoded.class_names))
        if source.fingerprint:
            _write(path, fingerprint, decoded)
    return decoded


def _read(path: Path, fingerprint: str) -> Decoded | None:
    """Returns what a cache file holds; None if it is absent, outdated or damaged."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            # zipfile verifies the CRC-32 of each array. The names of the parts are an array too.
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
            return Decoded(tuple(names), parts, tuple(skipped))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # Damaged bytes raise almost anything in zipfile and NumPy.
        logging.warning("cache %s is damaged and is rebuilt: %s", path, one_line(error))
        return None


def _write(path: Path, fingerprint: str, decoded: Decoded) -> None:
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
