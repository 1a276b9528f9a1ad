"""Which examples are kept, held out or left out: always a function of `data.split_seed` alone.

The training seed plays no part, and every part keeps the order of its source. Photos are chosen by
their names: a photo that is added moves others to another side only where counts demand it.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cnn_jax.data.dataset import Split
from cnn_jax.errors import UserError, nearest


def select(split: Split, known: Sequence[str], names: Sequence[str]) -> Split:
    """Keeps the classes `names` of those `known`, relabelled 0, 1, ... in that order.

    Raises:
        UserError: a name is not among `known`.
    """
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


def set_aside(
    split: Split,
    class_names: Sequence[str],
    fraction: float,
    seed: int,
    purpose: str,
    copies: Sequence[Sequence[str]] = (),
) -> tuple[Split, Split]:
    """Divides `split` in two: what remains, and `fraction` of each class.

    Of each class at least one image is set aside, and never all of them. Different purposes
    ("test", "validation") choose independently. Of photos, which are known by their files, each is
    set aside with the probability `fraction`, so that their number may differ from it by half.

    Args:
        split: the images.
        class_names: the names of their classes.
        fraction: the share to be set aside.
        seed: `data.split_seed`.
        purpose: what it is for.
        copies: groups of files that show the same picture. Those of one class stay together, unless
            a class has little else.

    Raises:
        UserError: a class has fewer than two images.
    """
    aside = np.zeros(len(split), bool)
    leader = {file: group[0] for group in copies for file in group}
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(split.labels == label)
        if len(indices) < 2:
            raise UserError(
                f"class {name} has {len(indices)} training image(s): too few for a {purpose} part"
            )
        if split.files:
            files = [split.files[i] for i in indices.tolist()]
            aside[indices[_by_name(files, name, fraction, seed, purpose, leader)]] = True
        else:
            ranks = _ranks(split, indices, name, seed, purpose)
            count = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
            aside[indices[np.argsort(ranks, kind="stable")[:count]]] = True
    return split.take(~aside), split.take(aside)


def limit(split: Split, class_names: Sequence[str], images_per_class: int, seed: int) -> Split:
    """Keeps `images_per_class` examples of each class; a smaller number keeps a subset of them.

    Raises:
        UserError: a class has fewer images.
    """
    mask = np.zeros(len(split), bool)
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(split.labels == label)
        if len(indices) < images_per_class:
            raise UserError(
                f"data.images_per_class={images_per_class}: class {name} has {len(indices)} "
                "training images"
            )
        ranks = _ranks(split, indices, name, seed, "train")
        mask[indices[np.argsort(ranks, kind="stable")[:images_per_class]]] = True
    return split.take(mask)


def describe_copies(parts: Mapping[str, Split], copies: Sequence[Sequence[str]]) -> list[str]:
    """Returns a sentence on copies in different parts, and one on copies in different classes.

    Args:
        parts: the parts of a data set.
        copies: groups of files that show the same picture.
    """
    places = {
        file: (part, label)
        for part, split in parts.items()
        if split.files
        for file, label in zip(split.files, split.labels.tolist(), strict=True)
    }
    kinds = (
        "photo(s) with a copy in another part, whose figures it flatters",
        "photo(s) with a copy in another class",
    )
    sentences = []
    for kind, what in enumerate(kinds):
        pairs = []
        for group in copies:
            known = [file for file in group if file in places]
            others = [file for file in known if places[file][kind] != places[known[0]][kind]]
            pairs += [(known[0], file) for file in others]
        if pairs:
            named = "; ".join(f"{a} = {b}" for a, b in pairs[:3])
            sentences.append(f"{len(pairs)} {what}: {named}" + ("; ..." if pairs[3:] else ""))
    return sentences


def _by_name(
    files: Sequence[str],
    class_name: str,
    fraction: float,
    seed: int,
    purpose: str,
    leader: Mapping[str, str],
) -> np.ndarray:
    """Returns a mask (bool [n]) of the photos of a class that are set aside.

    A hash of each name, a number in [0, 1), decides whether it is under `fraction`, whatever other
    photos there are. Copies share the hash of the first of them. Only where fewer than half or more
    than one and a half times the expected number would be set aside do ranks decide.
    """
    expected = fraction * len(files)
    least = math.ceil(expected / 2)
    most = min(max(math.floor(expected * 1.5), least), len(files) - 1)
    groups: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        groups.setdefault(leader.get(file, file), []).append(i)
    mask = np.zeros(len(files), bool)
    for value, name in sorted((_hash(seed, purpose, class_name, n), n) for n in groups):
        wanted = value < fraction or mask.sum() < least
        if wanted and mask.sum() + len(groups[name]) <= most:
            mask[groups[name]] = True
    if not mask.any():  # All photos are copies of each other.
        return _by_name(files, class_name, fraction, seed, purpose, {})
    return mask


def _ranks(
    split: Split, indices: np.ndarray, class_name: str, seed: int, purpose: str
) -> np.ndarray:
    """Returns a random number for each of a class's images, by name or by position."""
    if split.files:
        files = (split.files[i] for i in indices.tolist())
        return np.array([_hash(seed, purpose, class_name, file) for file in files])
    # The class name is part of the seed, so a class keeps its examples whichever other classes
    # are selected. NumPy guarantees PCG64's raw bits across versions, but not what its
    # Generator makes of them.
    entropy = [seed, zlib.crc32(f"{purpose}/{class_name}".encode("utf-8", "surrogateescape"))]
    return np.random.PCG64(entropy).random_raw(len(indices))


def _hash(seed: int, purpose: str, class_name: str, file: str) -> float:
    """Returns a number in [0, 1)."""
    text = json.dumps([seed, purpose, class_name, file])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
