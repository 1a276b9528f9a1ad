"""The linear layer `head` at the end of every network."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax import layers
from cnn_jax.config import ModelConfig
from cnn_jax.models.initializers import of_unit_deviation


def add_head(
    x: Float[Array, "batch inputs"], config: ModelConfig, n_classes: int, **settings: Any
) -> Float[Array, "batch classes"]:
    """Adds `head` to the calling module, and returns the float32 logits.

    `settings` are those of `layers.Dense`. With `model.mean_head` the kernel that they draw is
    divided by its standard deviation, and the layer's result by the number of inputs.
    """
    if config.mean_head:
        drawn = settings.get("kernel_init", layers.Dense.kernel_init)
        settings |= {"kernel_init": of_unit_deviation(drawn)}
    head = layers.Dense(n_classes, dtype=jnp.dtype(config.dtype), name="head", **settings)
    logits = head(x).astype(jnp.float32)
    return logits / x.shape[-1] if config.mean_head else logits
