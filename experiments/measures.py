"""What experiments measure on a trained network: pure functions of images, outputs and logits."""

from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from cnn_jax import evaluate, models
from cnn_jax.data import ImageDataset
from cnn_jax.runs import TrainedModel

Images = UInt8[np.ndarray, "n height width 3"]

SHIFTS = (0, 1, 2, 3, 4, 6, 8)
DEGREES = (0, 10, 20, 30, 45, 60, 90, 180)
N_IMAGES = 2000
"""Test images that are changed and evaluated anew for every shift and angle: the first ones."""
_N_ACTIVATIONS = 500

# Derivatives of the activation functions by their outputs, as a fraction of the largest.
_SLOPES = {
    "relu": lambda y: np.sign(y),
    "tanh": lambda y: 1 - y**2,
    "sigmoid": lambda y: 4 * y * (1 - y),
}
_FLAT = 0.01


def is_flat(
    outputs: Float[np.ndarray, "n *place units"], activation: str
) -> Bool[np.ndarray, "n *place units"]:
    """Says where the activation function's slope is under 1% of its largest: no gradient passes."""
    return _SLOPES[activation](outputs) < _FLAT


def dead_and_flat(
    outputs: Float[np.ndarray, "n *place units"], activation: str
) -> tuple[float, float]:
    """Returns the share of units that are flat for every image and place, and of flat outputs."""
    flat = is_flat(outputs, activation)
    return float(flat.reshape(-1, flat.shape[-1]).all(axis=0).mean()), float(flat.mean())


def units(trained: TrainedModel, dataset: ImageDataset) -> dict[str, float]:
    """Returns `dead_and_flat` for every layer but the head, on training images."""
    seen = trained.config.data
    rows = models.summarize(trained.model, trained.image_shape)
    images = dataset.train.images[:_N_ACTIVATIONS]
    given = evaluate.every_layer_input(
        trained.model, trained.variables, images, mean=seen.mean, std=seen.std
    )
    shares = {}
    for row, following in pairwise(rows):
        if not row.params:
            continue
        outputs = np.asarray(given[following.name])
        found = dead_and_flat(outputs, trained.config.model.activation)
        shares |= {f"{row.name} dead": found[0], f"{row.name} flat": found[1]}
    return shares


def shift(images: Images, down: int, right: int) -> Images:
    """Returns the images moved by whole pixels, reflected where nothing is known of them."""
    height, width = images.shape[1:3]
    top, left = max(down, 0), max(right, 0)
    pads = ((0, 0), (top, max(-down, 0)), (left, max(-right, 0)), (0, 0))
    padded = np.pad(images, pads, mode="reflect")
    rows, columns = max(-down, 0), max(-right, 0)
    return padded[:, rows : rows + height, columns : columns + width]


def shifted(trained: TrainedModel, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracy for every shift, mean of the four directions."""
    accuracies = {}
    for pixels in SHIFTS:
        ways = {(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)}
        found = [
            _accuracy(trained, dataset, shift(dataset.test.images[:N_IMAGES], *way)) for way in ways
        ]
        accuracies[f"shift {pixels}"] = float(np.mean(found))
    return accuracies


def rotate(images: Images, degrees: float) -> Images:
    """Returns the images turned counter-clockwise, interpolated linearly, reflected outside."""
    if degrees % 360 == 0:
        return images
    turned = ndimage.rotate(
        images.astype(np.float32), degrees, axes=(1, 2), reshape=False, order=1, mode="mirror"
    )
    return np.round(turned).astype(np.uint8)


def rotated(trained: TrainedModel, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracy for every angle, mean of both directions."""
    images = dataset.test.images[:N_IMAGES]
    return {
        f"{degrees} degrees": float(
            np.mean([_accuracy(trained, dataset, rotate(images, d)) for d in {degrees, -degrees}])
        )
        for degrees in DEGREES
    }


def _accuracy(trained: TrainedModel, dataset: ImageDataset, images: Images) -> float:
    labels = dataset.test.labels[: len(images)]
    return float(np.mean(trained.logits(images).argmax(axis=1) == labels))
