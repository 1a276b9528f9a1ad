"""scikit-learn's bundled handwritten digits."""

import importlib.metadata

import numpy as np
from PIL import Image

from cnn_jax.config import DataConfig
from cnn_jax.data.dataset import Decoded, Source, Split
from cnn_jax.data.photos import Layout


def source(config: DataConfig) -> Source:
    """Returns scikit-learn's 1,797 scans of 8x8 pixels, scaled to the squares of a `Layout`."""
    size = Layout.of(config).side
    return Source(
        name="digits",
        identity=f"digits {size}",
        fingerprint=importlib.metadata.version("scikit-learn"),
        description=f"scikit-learn load_digits, scaled to {size}x{size}x3",
        decode=lambda: _decode(size),
    )


def _decode(size: int) -> Decoded:
    from sklearn.datasets import load_digits  # Takes a second to import.

    scans, labels = load_digits(return_X_y=True)  # Gray values from 0 to 16.
    gray = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    bilinear = Image.Resampling.BILINEAR
    large = [Image.fromarray(scan).resize((size, size), bilinear) for scan in gray]
    images = np.repeat(np.stack([np.asarray(image) for image in large])[..., None], 3, axis=-1)
    names = tuple(str(digit) for digit in range(10))
    return Decoded(names, {"train": Split(images, labels.astype(np.int32))})
