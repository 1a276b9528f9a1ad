"""Looks at each photo once, at a fraction of its size: which are broken, and which are copies.

What is found depends on the files alone, not on how photos become squares or whether they are held
in memory. It is kept in the cache folder.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cnn_jax import files as atomic
from cnn_jax.data import photos, progress
from cnn_jax.data.cache import digest
from cnn_jax.data.dataset import file_digest
from cnn_jax.errors import one_line

_FORMAT = 1
"""To be raised with every change to what is found: older cache files are then rebuilt."""
_THUMBNAIL = photos.Layout(32, "stretch")
_FLAT = 8.0
"""Standard deviation of a gray thumbnail under which it shows too little to be compared."""
_COLOURS, _DETAIL = 0.97, 0.88
"""Correlations of thumbnails from which two photos are near copies: of all their colours at a
quarter of the size, and of what remains of gray when the mean of each 5x5 pixels is subtracted.

Of 120 photos of clothing, all reach them when saved again at quality 20 or 50, as PNG, at a third
to five times their size, or with 1% of each border cut off; 2% are too much. Among 3,781 of these
photos one pair does, which is the same picture; the next one has a detail of 0.83. Among the 60,000
images of CIFAR-10, 62 pairs do; of 189 with a detail over 0.8, 40 were looked at, and each showed
one picture twice.
"""
_AXES = 6
"""Directions in which near copies are searched: more take longer, fewer leave more to compare."""
_MOST_PAIRS = 5_000_000


@dataclass(frozen=True)
class Examination:
    """What was found in a set of photos, by their paths."""

    unreadable: dict[str, str]
    """The reason why each of these can't be read."""
    copies: tuple[tuple[str, ...], ...]
    """Groups of two or more that show the same picture; the one with the shortest name is first."""


def examine(root: Path, files: Sequence[str], states: Any, cache: Path) -> Examination:
    """Returns what is found in photos, from the cache of an earlier call if nothing has changed.

    Copies are photos with equal files, and photos with almost equal thumbnails, as those of a
    picture are that was saved again in another size, quality or format. The first call decodes
    every photo at about 64 pixels: of photos with 256 pixels, a core examines 2,000 in a second.

    Args:
        root: the folder that `files` are relative to.
        files: paths of photos.
        states: JSON that changes whenever a file does.
        cache: the file in which the result is kept.
    """
    fingerprint = digest(_FORMAT, states)
    try:
        cached = json.loads(cache.read_text())
        if cached["fingerprint"] == fingerprint:
            return Examination(cached["unreadable"], tuple(map(tuple, cached["copies"])))
    except (OSError, ValueError, LookupError, TypeError):
        pass  # It is absent or damaged.
    found = _examine(root, files)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(cache, json.dumps({"fingerprint": fingerprint, **vars(found)}))
    except OSError as error:
        logging.warning("what was found in photos is not kept: %s", one_line(error))
    return found


def near_copies(thumbnails: np.ndarray) -> np.ndarray:
    """Returns the pairs of thumbnails that show the same picture, integers [pairs, 2].

    Args:
        thumbnails: uint8 [n, 32, 32, 3], none of them flat.
    """
    from scipy.ndimage import uniform_filter  # Takes half a second to import.
    from scipy.spatial import KDTree

    blocks = np.array_split(thumbnails, len(thumbnails) // 1000 + 1)
    means = [b.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4), dtype=np.float32) for b in blocks]
    colours = _unit(np.concatenate(means))
    # Projections never lie farther apart than the vectors themselves, so those of near copies lie
    # in this radius of each other; along the axes in which photos differ most, few others do.
    axes = np.linalg.eigh(np.cov(colours.T))[1][:, -_AXES:]
    tree = KDTree(colours @ axes)
    radius = np.sqrt(2 * (1 - _COLOURS))
    while tree.count_neighbors(tree, radius) > 2 * _MOST_PAIRS + len(colours):
        radius /= 2  # All photos look alike. Exact copies are found at any radius.
    pairs = tree.query_pairs(radius, output_type="ndarray")
    pairs = pairs[_correlations(colours, pairs) > _COLOURS]
    if not len(pairs):
        return pairs
    numbers, places = np.unique(pairs, return_inverse=True)
    gray = thumbnails[numbers].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    detail = _unit(gray - uniform_filter(gray, 5, axes=(1, 2)))
    return pairs[_correlations(detail, places.reshape(pairs.shape)) > _DETAIL]


def _examine(root: Path, files: Sequence[str]) -> Examination:
    """Reads the photos; those that are one file under several names, hard links, once."""
    paths = [os.path.join(root, file) for file in files]
    first: dict[tuple[int, int], int] = {}
    stats = (os.stat(path) for path in paths)
    same = np.array([first.setdefault((s.st_dev, s.st_ino), i) for i, s in enumerate(stats)], int)
    unique = np.unique(same)
    with progress.bar("examining photos", len(unique)) as done:
        thumbnails, reasons = photos.read_images([Path(paths[i]) for i in unique], _THUMBNAIL, done)
    why = dict(zip(unique.tolist(), reasons, strict=True))
    unreadable = {file: why[i] for file, i in zip(files, same.tolist(), strict=True) if why[i]}
    readable = np.array([not reason for reason in reasons], bool)
    flat = readable & (thumbnails.mean(-1, dtype=np.float32).std((1, 2)) < _FLAT)
    compared = np.flatnonzero(readable & ~flat)
    pairs = [np.stack([same, np.arange(len(files))], axis=1)]
    if len(compared) > 1:
        pairs.append(unique[compared[near_copies(thumbnails[compared])]])
    pairs.append(_equal_files(paths, unique[flat]))
    kept = np.concatenate(pairs)
    groups = _connected(kept[[not why[i] for i in same[kept[:, 0]].tolist()]], len(files))
    names = (
        sorted((files[i] for i in group), key=lambda name: (len(name), name)) for group in groups
    )
    return Examination(unreadable, tuple(sorted(map(tuple, names))))


def _equal_files(paths: Sequence[str], numbers: np.ndarray) -> np.ndarray:
    """Returns pairs [n, 2] of those of the files that have the same content, the first one each."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(file_digest(paths[int(i)]), int(i)), int(i)) for i in numbers]
    return np.array(pairs, int).reshape(-1, 2)


def _connected(pairs: np.ndarray, n: int) -> list[list[int]]:
    """Returns the groups of two or more of n things that pairs connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (n, n))
    labels = connected_components(edges, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return [group.tolist() for group in np.split(order, starts) if len(group) > 1]


def _unit(arrays: np.ndarray) -> np.ndarray:
    """Returns arrays [n, ...] as float32 [n, k] with mean 0 and length 1."""
    flat = arrays.reshape(len(arrays), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _correlations(units: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns the scalar product of each pair [n, 2] of rows, float32 [n]."""
    parts = np.array_split(pairs, len(pairs) // 100_000 + 1)
    return np.concatenate([np.einsum("ij,ij->i", units[p[:, 0]], units[p[:, 1]]) for p in parts])
