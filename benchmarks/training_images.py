"""The images that the benchmarks train on."""

from dataclasses import replace

import numpy as np
from sklearn.datasets import load_sample_images

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, Split


def photos(n: int, side: int = 224) -> ImageDataset:
    """Returns n squares that are cut from scikit-learn's two sample photos, labelled at random."""
    both = load_sample_images().images
    rng = np.random.default_rng(0)
    images = np.empty((n, side, side, 3), np.uint8)
    for i in range(n):
        photo = both[i % 2]
        top, left = (rng.integers(size - side + 1) for size in photo.shape[:2])
        images[i] = photo[top : top + side, left : left + side]
    labels = rng.integers(0, 10, n, dtype=np.int32)
    return replace(data.load(DataConfig(name="digits")), train=Split(images, labels))


def repeated(n: int) -> ImageDataset:
    """Returns scikit-learn's digits, scaled to 32x32x3, their training images repeated to n.

    Real images, because on noise two correct frameworks drift apart within a few steps.
    """
    digits = data.load(DataConfig(name="digits"))
    assert isinstance(digits.train.images, np.ndarray)
    images = np.resize(digits.train.images, (n, *digits.image_shape))
    return replace(digits, train=Split(images, np.resize(digits.train.labels, n)))
