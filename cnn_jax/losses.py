"""Losses of a batch of logits, one value per example, so that padding can be masked afterwards."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnn_jax import user_code
from cnn_jax.config import TrainConfig
from cnn_jax.errors import UserError


def smooth_targets(
    labels: Int[Array, "batch"], n_classes: int, label_smoothing: float
) -> Float[Array, "batch classes"]:
    """Returns target probabilities: one-hot, mixed with the uniform distribution.

    `label_smoothing` in [0, 1) is the weight of the uniform part (Szegedy et al., 2016).
    """
    one_hot = jax.nn.one_hot(labels, n_classes)
    return one_hot * (1 - label_smoothing) + label_smoothing / n_classes


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    label_smoothing: float = 0.0,
) -> Float[Array, "batch"]:
    """Returns softmax cross-entropy in nats, one value per example."""
    targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def mean_squared_error(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    label_smoothing: float = 0.0,
) -> Float[Array, "batch"]:
    """Returns the squared error of the softmax probabilities, mean over classes, in [0, 1]."""
    targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
    return jnp.mean(jnp.square(jax.nn.softmax(logits) - targets), axis=-1)


LOSSES = {"cross_entropy": cross_entropy, "mse": mean_squared_error}


def from_config(config: TrainConfig) -> Callable[[Array, Array], Array]:
    """Returns `train.loss` as a function of logits [batch, classes] and labels [batch].

    A loss of the user's own ("my_file.py:focal") is such a function already: it returns one value
    an example, so that padding can be masked.

    Raises:
        UserError: label smoothing is set, which a loss of the user's own would not see.
    """
    if config.loss in LOSSES:
        return partial(LOSSES[config.loss], label_smoothing=config.label_smoothing)
    if config.label_smoothing:
        raise UserError(f"train.label_smoothing is not passed on to train.loss={config.loss}")
    return user_code.load(config.loss)
