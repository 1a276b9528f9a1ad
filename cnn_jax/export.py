"""A trained network as one file that runs without this project: it takes jax and flatbuffers."""

from typing import Any

import flax.linen as nn
import jax
import jax.export  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp

from cnn_jax import augment, evaluate, layers

PLATFORMS = ("cpu", "cuda")


def predictor(
    model: nn.Module,
    variables: dict[str, Any],
    image_shape: tuple[int, int, int],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    test_time: str,
) -> bytes:
    """Returns a serialized function from pixels to probabilities, parameters included.

    It takes uint8 [n, height, width, 3] for any n and returns float32 [n, classes]; normalisation
    and the averages that `AugmentConfig.test_time` asks for are inside.
    `jax.export.deserialize(data).call(images)` runs it on a CPU and on CUDA.
    """

    def predict(images: jax.Array) -> jax.Array:
        images = augment.normalize(images, mean, std)
        return jax.nn.softmax(evaluate.mean_logits(model, variables, images, test_time))

    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *image_shape), jnp.uint8)
    with layers.portable():
        exported = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())
