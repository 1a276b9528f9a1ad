"""Losses against hand-computed values and closed-form gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax import losses
from cnn_jax.config import TrainConfig

LOGITS = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [30.0, -30.0, 0.0]])
LABELS = jnp.array([0, 2, 1])


def test_cross_entropy_of_equal_logits_is_log_of_the_number_of_classes():
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS)[1], np.log(3), rtol=1e-6)


def test_cross_entropy_stays_finite_for_a_confident_mistake():
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS)[2], 60.0, rtol=1e-6)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    targets = losses.smooth_targets(jnp.array([1]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)


def test_mean_squared_error_of_equal_logits():
    # Probabilities 1/3, 1/3, 1/3 against 0, 0, 1: (1/9 + 1/9 + 4/9) / 3.
    np.testing.assert_allclose(losses.mean_squared_error(LOGITS, LABELS)[1], 2 / 9, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_gradient_is_softmax_minus_target(smoothing: float):
    gradient = jax.grad(lambda x: losses.cross_entropy(x, LABELS, smoothing).sum())(LOGITS)
    expected = jax.nn.softmax(LOGITS) - losses.smooth_targets(LABELS, 3, smoothing)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_match_finite_differences(name: str, smoothing: float):
    loss = losses.from_config(TrainConfig(loss=name, label_smoothing=smoothing))
    check_grads(lambda x: loss(x, LABELS[:2]), (LOGITS[:2],), order=1, modes=["rev"], rtol=1e-3)


def test_from_config_passes_the_smoothing_on():
    smooth = losses.from_config(TrainConfig(label_smoothing=0.3))
    np.testing.assert_array_equal(smooth(LOGITS, LABELS), losses.cross_entropy(LOGITS, LABELS, 0.3))
