"""A first convolution whose outputs are uncorrelated over patches of the training images.

The method is that of airbench94 (Jordan, 2024), after Page, "How to Train Your ResNet" (2019). The
filters are computed in float64 on the host, with the same bits on any number of cores.
"""

from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import trees
from cnn_jax.errors import UserError
from cnn_jax.models import inspection

IMAGES = 5000
_CHUNK = 100
_EPSILON = 5e-4
"""Added to eigenvalues, so that directions of little variance are not amplified without bound."""

Normalize = tuple[tuple[float, ...], tuple[float, ...]]
"""`data.normalize`: the mean and the standard deviation of each channel, for pixels in [0, 1]."""


def whiten(
    model: nn.Module,
    params: Any,
    layer: str,
    images: UInt8[np.ndarray, "n height width channels"],
    normalize: Normalize,
) -> Any:
    """Returns `params` with whitening filters in the first convolution, whose name is `layer`.

    The first of its filters become the whitening filters of the first 5,000 images, the next ones
    their negations. Filters beyond those, and the bias, stay as they are.

    Raises:
        UserError: `layer` is not the first layer and a convolution, or it has too few filters.
    """
    first = inspection.summarize(model, images.shape[1:])[0]
    name = f"{layer}/kernel"
    leaves = trees.named_leaves(params)
    if first.name != layer or name not in leaves or leaves[name].ndim != 4:
        raise UserError(
            f"init.whiten={layer} must be the first layer and a convolution; the first layer is "
            f"{first.name}"
        )
    kernel = np.array(leaves[name])
    filters = whitening_filters(images[:IMAGES], kernel.shape[:2], normalize)
    both = np.concatenate([filters, -filters], axis=-1)
    if both.shape[-1] > kernel.shape[-1]:
        raise UserError(
            f"init.whiten={layer}: whitening patches of {' x '.join(map(str, kernel.shape[:3]))} "
            f"takes {both.shape[-1]} filters, and the layer has {kernel.shape[-1]}"
        )
    kernel[..., : both.shape[-1]] = both
    return trees.replace_named(params, {name: kernel})


def whitening_filters(
    images: UInt8[np.ndarray, "n height width channels"],
    size: tuple[int, ...],
    normalize: Normalize,
) -> Float[np.ndarray, "rows columns channels filters"]:
    """Returns v / sqrt(e + 5e-4) for the eigenvectors v of the second moments of all patches.

    Patches have `size` (rows, columns) and come from the normalised images. The filters are in the
    order of falling eigenvalues e.
    """
    channels = images.shape[-1]
    numbers = size[0] * size[1] * channels
    moments = np.zeros((numbers + 1, numbers + 1))
    for start in range(0, len(images), _CHUNK):
        windows = np.lib.stride_tricks.sliding_window_view(
            images[start : start + _CHUNK], size, axis=(1, 2)
        )
        patches = np.moveaxis(windows, 3, -1).reshape(-1, numbers).astype(np.float64)
        patches = np.pad(patches, ((0, 0), (0, 1)), constant_values=1)
        moments += patches.T @ patches  # Sums of whole numbers: exact in any order.
    # The normalised pixel (p / 255 - mean) / std is linear in p and 1.
    mean, std = (np.tile(values, numbers // channels) for values in normalize)
    linear = np.column_stack([np.diag(1 / (255 * std)), -mean / std])
    values, vectors = np.linalg.eigh(linear @ moments @ linear.T / moments[-1, -1])
    filters = (vectors / np.sqrt(values + _EPSILON))[:, ::-1]
    return filters.reshape(*size, channels, numbers)
