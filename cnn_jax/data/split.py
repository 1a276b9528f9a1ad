"""Which examples are kept, held out or left out: always a function of `data.split_seed` alone.

The training seed plays no part, and every part keeps the order of its source.
"""

import zlib
from collections.abc import Callable, Sequence
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
    split: Split, class_names: Sequence[str], fraction: float, seed: int, purpose: str
) -> tuple[Split, Split]:
    """Divides `split` in two: what remains, and `fraction` of each class.

    Of each class at least one image is set aside, and never all of them. Different purposes
    ("test", "validation") choose independently.

    Raises:
        UserError: a class has fewer than two images.
    """

    def count(name: str, available: int) -> int:
        if available < 2:
            raise UserError(
                f"class {name} has {available} training image(s): too few for a {purpose} part"
            )
        return min(max(round(fraction * available), 1), available - 1)

    aside = _pick(split, class_names, count, seed, purpose)
    return split.take(~aside), split.take(aside)


def limit(split: Split, class_names: Sequence[str], images_per_class: int, seed: int) -> Split:
    """Keeps `images_per_class` examples of each class; a smaller number keeps a subset of them.

    Raises:
        UserError: a class has fewer images.
    """

    def count(name: str, available: int) -> int:
        if available < images_per_class:
            raise UserError(
                f"data.images_per_class={images_per_class}: class {name} has {available} training "
                "images"
            )
        return images_per_class

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
        # The class name is part of the seed, so a class keeps its examples whichever other classes
        # are selected. NumPy guarantees PCG64's raw bits across versions, but not what its
        # Generator makes of them.
        entropy = [seed, zlib.crc32(f"{purpose}/{name}".encode("utf-8", "surrogateescape"))]
        ranks = np.random.PCG64(entropy).random_raw(len(indices))
        order = np.argsort(ranks, kind="stable")
        mask[indices[order[: count(name, len(indices))]]] = True
    return mask
