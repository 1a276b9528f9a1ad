"""Evaluation: no image lost to padding, and counts against literal values."""

import jax
import numpy as np
import pytest

from cnn_jax import augment, evaluate, losses, models
from cnn_jax.config import ModelConfig

MODEL = models.build(ModelConfig(name="vgg", blocks=((4,),), dense=(8,)), 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
ONE_VIEW = {**UNIT, "test_time": "none"}


@pytest.mark.parametrize("batch_size", [1, 4, 11, 250])
def test_logits_of_padded_batches_are_those_of_each_image(monkeypatch, batch_size: int):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", batch_size)
    variables = MODEL.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    expected = MODEL.apply(variables, augment.normalize(IMAGES, **UNIT))
    found = evaluate.logits(MODEL, variables, IMAGES, **ONE_VIEW)
    assert found.shape == (11, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_logits_use_mean_and_std():
    variables = MODEL.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    settings = {**ONE_VIEW, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    moved = evaluate.logits(MODEL, variables, IMAGES, **settings)
    assert not np.allclose(moved, evaluate.logits(MODEL, variables, IMAGES, **ONE_VIEW), atol=1e-3)


def test_score_counts_what_is_right_and_what_is_taken_for_what():
    logits = np.array([[2, 0, 0], [0, 2, 0], [2, 0, 0], [0, 0, 2]], np.float32)
    result = evaluate.score(logits, np.array([0, 1, 1, 2], np.int32), losses.cross_entropy)
    right, wrong = np.log(1 + 2 * np.exp(-2)), np.log(2 + np.exp(2))
    assert result.accuracy == 0.75
    np.testing.assert_allclose(result.loss, (3 * right + wrong) / 4, rtol=1e-6)
    np.testing.assert_array_equal(result.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(result.logits, logits)


def test_softmax_is_safe_for_large_logits():
    found = evaluate.softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)


def test_most_wrong_are_those_whose_label_was_least_likely():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01], [0.3, 0.7]])
    labels = np.array([1, 1, 1, 1, 0])
    np.testing.assert_array_equal(evaluate.most_wrong(probabilities, labels, 3), [3, 0, 4])
    assert len(evaluate.most_wrong(probabilities, labels, 9)) == 4


def test_logits_at_test_time_are_the_weighted_mean_over_views():
    variables = MODEL.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))

    def look(images: np.ndarray) -> np.ndarray:
        return evaluate.logits(MODEL, variables, images, **ONE_VIEW)

    def both(images: np.ndarray) -> np.ndarray:
        return (look(images) + look(images[:, :, ::-1])) / 2

    padded = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = (both(padded[:, :8, :8]) + both(padded[:, 2:, 2:])) / 2
    for test_time, expected in (
        ("mirror", both(IMAGES)),
        ("mirror_translate", (both(IMAGES) + moved) / 2),
    ):
        found = evaluate.logits(MODEL, variables, IMAGES, **UNIT, test_time=test_time)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert not np.allclose(found, look(IMAGES), atol=1e-4)
