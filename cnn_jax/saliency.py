"""What in an image a network's answer rests on: occlusion and Grad-CAM, both pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cnn_jax import augment, evaluate, models

_GRAY = 128


def occlusion(
    model: nn.Module,
    variables: Any,
    image: UInt8[np.ndarray, "height width 3"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[np.ndarray, "rows columns"]:
    """Returns by how much the logit of the predicted class falls where a square is hidden.

    The square is gray and a quarter of the image wide, and moves by half of that. After Zeiler and
    Fergus, "Visualizing and Understanding Convolutional Networks" (2014), section 4.2; the logit,
    as a probability near 1 barely moves.
    """
    height, width = image.shape[:2]
    side = max(min(height, width) // 4, 1)
    tops, lefts = (range(0, n - side + 1, max(side // 2, 1)) for n in (height, width))
    hidden = np.repeat(image[None], 1 + len(tops) * len(lefts), axis=0)
    for i, (top, left) in enumerate(((y, x) for y in tops for x in lefts), start=1):
        hidden[i, top : top + side, left : left + side] = _GRAY
    logits = evaluate.logits(model, variables, hidden, mean=mean, std=std, test_time="none")
    of_class = logits[:, logits[0].argmax()]
    return (of_class[0] - of_class[1:]).reshape(len(tops), len(lefts))


@partial(jax.jit, static_argnames=("model", "layer", "mean", "std"))
def grad_cam(
    model: nn.Module,
    variables: Any,
    images: UInt8[Array, "n height width 3"],
    layer: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "n map_height map_width"]:
    """Returns where the feature maps that `layer` is given speak for each image's predicted class.

    The maps' sum, each weighted by the mean of the class' logit's gradient in it, and 0 where that
    is negative. Selvaraju et al., "Grad-CAM" (2017), equations 1 and 2.
    """
    normal = augment.normalize(images, mean, std)
    maps = models.layer_inputs(model, variables, normal)[layer]

    def largest_logits(maps: Array) -> Array:
        _, height, width, channels = images.shape
        with models.LayerCache(layer, (height, width, channels)).replacing(maps) as placeholders:
            logits: Any = model.apply(variables, placeholders)
        return jnp.sum(jnp.max(logits, axis=-1))

    gradient: Callable[[Array], Array] = jax.grad(largest_logits)
    weights = jnp.mean(gradient(maps), axis=(1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * maps, axis=-1)).astype(jnp.float32)
