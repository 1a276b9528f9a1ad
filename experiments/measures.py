"""What experiments measure on a trained network, beside its test accuracy."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from cnn_jax.data import ImageDataset
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor

Images = UInt8[np.ndarray, "n height width 3"]

SHIFTS = (0, 1, 2, 3, 4, 6, 8)
DEGREES = (0, 10, 20, 30, 45, 60, 90, 180)
N_IMAGES = 2000
"""The number of test images, the first ones, that are evaluated for every shift and angle."""
_N_ACTIVATIONS = 500

# Derivatives of the activation functions as a fraction of their maximum, from the outputs.
_SLOPES = {
    "relu": lambda y: np.sign(y),
    "tanh": lambda y: 1 - y**2,
    "sigmoid": lambda y: 4 * y * (1 - y),
}
_FLAT = 0.01


def is_flat(
    outputs: Float[np.ndarray, "n *place units"], activation: str
) -> Bool[np.ndarray, "n *place units"]:
    """Returns where the slope of the activation function is under 1% of its maximum.

    Hardly any gradient passes there.
    """
    return _SLOPES[activation](outputs) < _FLAT


def dead_and_flat(
    outputs: Float[np.ndarray, "n *place units"], activation: str
) -> tuple[float, float]:
    """Returns the share of units that are flat for every image and place, and of flat outputs."""
    flat = is_flat(outputs, activation)
    return float(flat.reshape(-1, flat.shape[-1]).all(axis=0).mean()), float(flat.mean())


def units(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    """Returns `dead_and_flat` of every convolution and dense layer but the head.

    The layers must contain their activation function, as those of simple_cnn and vgg do. The
    outputs are those for the first training images.
    """
    layers = inspection.summarize(predictor.model, predictor.seen_shape)
    names = [row.name for row in layers if row.kind in ("Conv", "Dense") and row.name != "head"]
    outputs = predictor.activations(dataset.train.images[:_N_ACTIVATIONS], names)
    shares = {}
    for name in names:
        dead, flat = dead_and_flat(outputs[name], predictor.config.model.activation)
        shares |= {f"{name} dead": dead, f"{name} flat": flat}
    return shares


def shift(images: Images, down: int, right: int) -> Images:
    """Returns the images moved by whole pixels; the border that appears is filled by reflection."""
    height, width = images.shape[1:3]
    top, left = max(down, 0), max(right, 0)
    pads = ((0, 0), (top, max(-down, 0)), (left, max(-right, 0)), (0, 0))
    padded = np.pad(images, pads, mode="reflect")
    rows, columns = max(-down, 0), max(-right, 0)
    return padded[:, rows : rows + height, columns : columns + width]


def shifted(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracy for every shift: the mean of the four directions."""
    accuracies = {}
    for pixels in SHIFTS:
        ways = {(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)}
        found = [
            _accuracy(predictor, dataset, shift(dataset.test.images[:N_IMAGES], *way))
            for way in ways
        ]
        accuracies[f"shift {pixels}"] = float(np.mean(found))
    return accuracies


def rotate(images: Images, degrees: float) -> Images:
    """Returns the images rotated counter-clockwise, bilinearly, with reflection at the borders."""
    if degrees % 360 == 0:
        return images
    turned = ndimage.rotate(
        images.astype(np.float32), degrees, axes=(1, 2), reshape=False, order=1, mode="mirror"
    )
    return np.round(turned).astype(np.uint8)


def rotated(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracy for every angle: the mean of both directions."""
    images = dataset.test.images[:N_IMAGES]
    return {
        f"{degrees} degrees": float(
            np.mean([_accuracy(predictor, dataset, rotate(images, d)) for d in {degrees, -degrees}])
        )
        for degrees in DEGREES
    }


def _accuracy(predictor: Predictor, dataset: ImageDataset, images: Images) -> float:
    labels = dataset.test.labels[: len(images)]
    return float(np.mean(predictor.logits(images).argmax(axis=1) == labels))
