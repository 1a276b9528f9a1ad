"""Small data sets, and folders of photos."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_jax.data import ImageDataset, Split


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns random pixels, uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_split(n: int, seed: int, size: int = 8) -> Split:
    """Returns noisy images in three colours, which are the classes."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3).astype(np.int32)
    images = rng.integers(0, 100, (n, size, size, 3)).astype(np.uint8)
    images[np.arange(n), :, :, labels] += 120
    return Split(images, labels)


def colours(n_train: int, n_validation: int, n_test: int, size: int = 8) -> ImageDataset:
    """Returns noisy images in three colours."""
    return ImageDataset(
        name="colours",
        source="made in a test",
        class_names=("red", "green", "blue"),
        train=make_split(n_train, seed=1, size=size),
        validation=make_split(n_validation, seed=2, size=size),
        test=make_split(n_test, seed=3, size=size),
        skipped=(),
    )


def write_photos(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (12, 12)) -> None:
    """Writes a folder for each class with so many PNG files of width x height random pixels."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise(size[1], size[0], 3, seed=seed_of(name) + i)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")


def seed_of(name: str) -> int:
    """Returns the seed of the first photo that `write_photos` writes for a class."""
    return int.from_bytes(name.encode(), "big") % 10_000 * 1000  # No photo is in two classes.
