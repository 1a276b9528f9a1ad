"""Losses of a batch of logits, one value per example, so that padding can be masked afterwards.

Labels are class numbers, int [batch], or probabilities, float [batch, classes], which mixup and
cutmix make of them. Label smoothing applies to both.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnn_jax import user_code
from cnn_jax.config import TrainConfig
from cnn_jax.errors import UserError

Labels = Int[Array, "batch"] | Float[Array, "batch classes"]

_FOCUS = 2
"""gamma of the focal loss: the value that Lin et al. (2017), section 5.1, found best."""


def smooth_targets(
    labels: Labels, n_classes: int, label_smoothing: float
) -> Float[Array, "batch classes"]:
    """Returns target probabilities: those of the labels, mixed with the uniform distribution.

    `label_smoothing` in [0, 1) is the weight of the uniform part (Szegedy et al., 2016).
    """
    targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, n_classes)
    return targets * (1 - label_smoothing) + label_smoothing / n_classes


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Returns softmax cross-entropy in nats, one value per example."""
    targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def focal(
    logits: Float[Array, "batch classes"], labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Returns cross-entropy whose terms are weighed by (1 - p)^2, p being the class' probability.

    An example that is predicted well counts less (Lin et al., "Focal Loss for Dense Object
    Detection", 2017, equation 4). Of target probabilities, each class' term has its own weight.
    """
    targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(targets * (1 - jnp.exp(log_p)) ** _FOCUS * log_p, axis=-1)


def mean_squared_error(
    logits: Float[Array, "batch classes"], labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Returns the squared error of the softmax probabilities, mean over classes, in [0, 1]."""
    targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
    return jnp.mean(jnp.square(jax.nn.softmax(logits) - targets), axis=-1)


LOSSES = {"cross_entropy": cross_entropy, "focal": focal, "mse": mean_squared_error}


def from_config(config: TrainConfig) -> Callable[[Array, Array], Array]:
    """Returns `train.loss` as a function of logits [batch, classes] and labels as above.

    A loss of the user's own ("my_file.py:hinge") is such a function already: it returns one value
    an example, so that padding can be masked.

    Raises:
        UserError: label smoothing is set, which a loss of the user's own would not see.
    """
    if config.loss in LOSSES:
        return partial(LOSSES[config.loss], label_smoothing=config.label_smoothing)
    if config.label_smoothing:
        raise UserError(f"train.label_smoothing is not passed on to train.loss={config.loss}")
    return user_code.load(config.loss)
