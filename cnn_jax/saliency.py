"""Which parts of an image a prediction depends on: occlusion and Grad-CAM."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cnn_jax import augment, kernels, trees
from cnn_jax.config import DataConfig
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor

_GRAY = 128


def square(height: int, width: int) -> tuple[int, int]:
    """Returns side and step, in pixels, of the square that `occlusion` hides.

    The side is a quarter of the image's shorter side, and the step half of that. The first square
    is in the upper left corner; a strip at the right or lower border that is narrower than a step
    may never be hidden.
    """
    side = max(min(height, width) // 4, 1)
    return side, max(side // 2, 1)


def occlusion(
    predictor: Predictor, image: UInt8[np.ndarray, "height width 3"], target: int
) -> Float[np.ndarray, "rows columns"]:
    """Returns by how much the logit of class `target` drops when a gray `square` hides each place.

    After Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014), section
    4.2; of the logit, since a probability near 1 barely changes.
    """
    height, width = image.shape[:2]
    side, step = square(height, width)
    tops, lefts = (range(0, n - side + 1, step) for n in (height, width))
    hidden = np.repeat(image[None], 1 + len(tops) * len(lefts), axis=0)
    for i, (top, left) in enumerate(((y, x) for y in tops for x in lefts), start=1):
        hidden[i, top : top + side, left : left + side] = _GRAY
    of_class = predictor.logits(hidden, test_time="none")[:, target]
    return (of_class[0] - of_class[1:]).reshape(len(tops), len(lefts))


def grad_cam(
    predictor: Predictor,
    images: UInt8[np.ndarray, "n height width 3"],
    targets: Int[np.ndarray, "n"],
    layer: str,
) -> Float[np.ndarray, "n map_height map_width"]:
    """Returns where the feature maps that module `layer` returns support each image's target class.

    The maps are summed with weights, and negative sums are set to 0. A map's weight is the mean of
    the gradient of the class' logit with respect to the map. Selvaraju et al., "Grad-CAM" (2017),
    equations 1 and 2.

    Raises:
        UserError: the network has no module of that name, or it returns no feature maps.
    """
    config = predictor.config
    with kernels.use(config.runtime.kernels, config.model.precision):
        maps = _grad_cam(
            predictor.model,
            predictor.variables,
            images,
            targets,
            layer=layer,
            data=config.data,
        )
    return np.asarray(maps)


def last_maps(predictor: Predictor) -> str:
    """Returns the module whose feature maps Grad-CAM weighs: the last ones of a network.

    It is the largest module around the last convolution that returns maps of the same size. In a
    residual network that is a stage, whose output includes the shortcuts.

    Raises:
        UserError: the network has no convolution.
    """
    params = trees.named_leaves(predictor.variables["params"])
    rows = inspection.summarize(predictor.model, predictor.seen_shape)
    kernels = {row.name: params.get(f"{row.name}/kernel") for row in rows}
    convs = [name for name, kernel in kernels.items() if kernel is not None and kernel.ndim == 4]
    if not convs:
        raise UserError("the network has no convolution, which Grad-CAM needs")
    conv = convs[-1]
    around = [conv.rsplit("/", depth)[0] for depth in range(conv.count("/") + 1)]
    maps = predictor.activations(np.zeros((1, *predictor.image_shape), np.uint8), around)
    size = maps[conv].shape[1:3]
    return [name for name in around if maps[name].ndim == 4 and maps[name].shape[1:3] == size][-1]


def seen_part(
    predictor: Predictor, image: UInt8[np.ndarray, "stored_height stored_width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the centre of a stored image, which is what the network sees of it."""
    height, width, _ = predictor.config.data.seen(image.shape)
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


@partial(jax.jit, static_argnames=("model", "layer", "data"))
def _grad_cam(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    targets: jax.Array,
    *,
    layer: str,
    data: DataConfig,
) -> jax.Array:
    normal = augment.evaluation_view(images, data)
    maps = inspection.outputs(model, variables, normal, (layer,))[layer]
    if maps.ndim != 4:
        raise UserError(f"layer {layer} returns no feature maps, which Grad-CAM needs")

    def target_logits(maps: jax.Array) -> jax.Array:
        with inspection.replaced({layer: maps}):
            logits: Any = model.apply(variables, normal)
        return jnp.sum(logits[jnp.arange(len(images)), targets])

    weights = jnp.mean(jax.grad(target_logits)(maps), axis=(1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * maps, axis=-1)).astype(jnp.float32)
