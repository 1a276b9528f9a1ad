"""What in an image a network's answer rests on: occlusion and Grad-CAM, both pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax import augment, evaluate, models

_GRAY = 128


def square(height: int, width: int) -> tuple[int, int]:
    """Returns the side of the square that `occlusion` hides, and by how much it moves, in pixels.

    A quarter of the image's shorter side, and half of that. The first square lies in the upper left
    corner; where its moves do not end at the other borders, a strip there is never hidden.
    """
    side = max(min(height, width) // 4, 1)
    return side, max(side // 2, 1)


def occlusion(
    model: nn.Module,
    variables: Any,
    image: UInt8[np.ndarray, "height width 3"],
    target: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[np.ndarray, "rows columns"]:
    """Returns by how much the logit of the class `target` falls where a gray `square` is hidden.

    After Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014), section
    4.2; the logit, as a probability near 1 barely moves.
    """
    height, width = image.shape[:2]
    side, step = square(height, width)
    tops, lefts = (range(0, n - side + 1, step) for n in (height, width))
    hidden = np.repeat(image[None], 1 + len(tops) * len(lefts), axis=0)
    for i, (top, left) in enumerate(((y, x) for y in tops for x in lefts), start=1):
        hidden[i, top : top + side, left : left + side] = _GRAY
    logits = evaluate.logits(model, variables, hidden, mean=mean, std=std, test_time="none")
    of_class = logits[:, target]
    return (of_class[0] - of_class[1:]).reshape(len(tops), len(lefts))


@partial(jax.jit, static_argnames=("model", "layer", "mean", "std"))
def grad_cam(
    model: nn.Module,
    variables: Any,
    images: UInt8[Array, "n height width 3"],
    targets: Int[Array, "n"],
    layer: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "n map_height map_width"]:
    """Returns where the feature maps that `layer` is given speak for each image's target class.

    The maps' sum, each weighted by the mean of the class' logit's gradient in it, and 0 where that
    is negative. Selvaraju et al., "Grad-CAM" (2017), equations 1 and 2.
    """
    normal = augment.normalize(images, mean, std)
    maps = models.layer_inputs(model, variables, normal)[layer]

    def target_logits(maps: Array) -> Array:
        _, height, width, channels = images.shape
        with models.LayerCache(layer, (height, width, channels)).replacing(maps) as placeholders:
            logits: Any = model.apply(variables, placeholders)
        return jnp.sum(logits[jnp.arange(len(images)), targets])

    gradient: Callable[[Array], Array] = jax.grad(target_logits)
    weights = jnp.mean(gradient(maps), axis=(1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * maps, axis=-1)).astype(jnp.float32)
