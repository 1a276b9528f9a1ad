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


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "mse"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_match_finite_differences(name: str, smoothing: float):
    loss = losses.from_config(TrainConfig(loss=name, label_smoothing=smoothing))
    check_grads(lambda x: loss(x, LABELS[:2]), (LOGITS[:2],), order=1, modes=["rev"], rtol=1e-3)


@pytest.mark.parametrize("name", list(losses.LOSSES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_certain_probabilities_are_the_same_as_labels(name: str, smoothing: float):
    loss = losses.from_config(TrainConfig(loss=name, label_smoothing=smoothing))
    one_hot = jnp.eye(3)[LABELS]
    np.testing.assert_array_equal(loss(LOGITS, one_hot), loss(LOGITS, LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_mixed_labels_is_the_mixture_of_both(smoothing: float):
    """It is linear in the target, which is what mixup relies on."""
    other = (LABELS + 1) % 3
    mixed = 0.3 * jnp.eye(3)[LABELS] + 0.7 * jnp.eye(3)[other]
    found = losses.cross_entropy(LOGITS, mixed, smoothing)
    of_each = [losses.cross_entropy(LOGITS, labels, smoothing) for labels in (LABELS, other)]
    np.testing.assert_allclose(found, 0.3 * of_each[0] + 0.7 * of_each[1], rtol=1e-5)


def test_mean_squared_error_of_mixed_labels():
    # Probabilities 1/3, 1/3, 1/3 against 0.5, 0.5, 0: (1/36 + 1/36 + 1/9) / 3.
    found = losses.mean_squared_error(LOGITS[1:2], jnp.array([[0.5, 0.5, 0.0]]))
    np.testing.assert_allclose(found, [1 / 18], rtol=1e-6)


def test_focal_is_cross_entropy_weighed_by_the_squared_error():
    """Lin et al. (2017): at p = 0.9 the loss is 100 times smaller than cross-entropy."""
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    found = losses.focal(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(found, [-0.01 * np.log(0.9), -0.25 * np.log(0.5)], rtol=1e-5)
    mixed = losses.focal(logits, jnp.array([[0.75, 0.25]] * 2))
    first = -0.75 * 0.01 * np.log(0.9) - 0.25 * 0.81 * np.log(0.1)
    np.testing.assert_allclose(mixed, [first, -0.25 * np.log(0.5)], rtol=1e-5)


def test_focal_and_its_gradient_are_finite_where_a_probability_is_0_or_1():
    logits = jnp.array([[300.0, -300.0]] * 2)
    values, back = jax.vjp(lambda x: losses.focal(x, jnp.array([0, 1])), logits)
    np.testing.assert_allclose(values, [0, 600], atol=1e-6)
    np.testing.assert_allclose(back(jnp.ones(2))[0], [[0, 0], [1, -1]], atol=1e-6)


def test_from_config_passes_the_smoothing_on():
    smooth = losses.from_config(TrainConfig(label_smoothing=0.3))
    np.testing.assert_array_equal(smooth(LOGITS, LABELS), losses.cross_entropy(LOGITS, LABELS, 0.3))
