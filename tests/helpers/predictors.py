"""Networks with random parameters."""

import jax
import jax.numpy as jnp

from cnn_jax import models
from cnn_jax.config import Config
from cnn_jax.predictor import Predictor


def random_predictor(
    config: Config,
    class_names: tuple[str, ...] = ("red", "green", "blue"),
    image_shape: tuple[int, int, int] = (8, 8, 3),
    seed: int = 0,
) -> Predictor:
    """Returns a network as it is before training, with preprocessing as in its config."""
    model = models.build(config.model, len(class_names))
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image_shape)))
    return Predictor(config, model, variables, class_names, image_shape)
