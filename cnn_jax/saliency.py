"""Which parts of an image a prediction depends on: occlusion and Grad-CAM."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cnn_jax import augment, kernels
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
    with kernels.use(predictor.config.runtime.kernels):
        maps = _grad_cam(
            predictor.model,
            predictor.variables,
            images,
            targets,
            layer=layer,
            data=predictor.config.data,
        )
    return np.asarray(maps)


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
