"""A first convolution whose outputs are uncorrelated over patches of the training images.

The filters are airbench94's (Jordan, 2024), after Page, "How to Train Your ResNet" (2019). They
are computed in float64 on the host, and come out with the same bits on any number of cores.
"""

from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import models, trees
from cnn_jax.errors import UserError

_IMAGES = 5000
_CHUNK = 100
_EPSILON = 5e-4
"""Added to eigenvalues, so that directions without variance are not blown up."""


def whiten(
    model: nn.Module,
    params: Any,
    layer: str,
    images: UInt8[np.ndarray, "n height width channels"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    """Returns `params` with the first filters of the first convolution replaced.

    They are the whitening filters of the first 5,000 images, then their negations; filters beyond
    those, and the bias, stay as they are.

    Raises:
        UserError: `layer` is not the first convolution, or has too few filters.
    """
    first = models.summarize(model, images.shape[1:])[0]
    if first.name != layer or first.kind != "Conv":
        raise UserError(f"init.whiten={layer} is not the first layer of this network, {first.name}")
    name = f"{layer}/kernel"
    kernel = np.array(trees.named_leaves(params)[name])
    filters = whitening_filters(images[:_IMAGES], kernel.shape[:2], mean, std)
    both = np.concatenate([filters, -filters], axis=-1)
    if both.shape[-1] > kernel.shape[-1]:
        raise UserError(
            f"init.whiten={layer}: it has {kernel.shape[-1]} filters, and to whiten patches of "
            f"{' x '.join(map(str, kernel.shape[:3]))} takes {both.shape[-1]}"
        )
    kernel[..., : both.shape[-1]] = both
    return trees.replace_named(params, {name: kernel})


def whitening_filters(
    images: UInt8[np.ndarray, "n height width channels"],
    size: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[np.ndarray, "rows columns channels filters"]:
    """Returns v / sqrt(e + 5e-4) for the eigenvectors v of the second moments of all patches.

    Patches are those of `size` in the normalised images; the largest eigenvalue e comes first.
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
        moments += patches.T @ patches  # of whole numbers, so exact in whatever order it adds
    # Pixels p are seen as (p / 255 - mean) / std, which is linear in p and 1.
    scale = 1 / np.tile(std, numbers // channels)
    normalize = np.column_stack([np.diag(scale / 255), -scale * np.tile(mean, numbers // channels)])
    values, vectors = np.linalg.eigh(normalize @ moments @ normalize.T / moments[-1, -1])
    filters = (vectors / np.sqrt(values + _EPSILON))[:, ::-1]
    return filters.reshape(*size, channels, numbers)
