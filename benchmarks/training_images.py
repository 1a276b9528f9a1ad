"""The images that the benchmarks train on."""

from dataclasses import replace

import numpy as np

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, Split


def repeated(n: int) -> ImageDataset:
    """Returns scikit-learn's digits, scaled to 32x32x3, their training images repeated to n.

    Real images, because on noise two correct frameworks drift apart within a few steps.
    """
    digits = data.load(DataConfig(name="digits"))
    images = np.resize(digits.train.images, (n, *digits.image_shape))
    return replace(digits, train=Split(images, np.resize(digits.train.labels, n)))
