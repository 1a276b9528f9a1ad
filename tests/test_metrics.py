"""Evaluation: counts and scores against literal values."""

import numpy as np
import pytest

from cnn_jax import losses, metrics
from cnn_jax.metrics import ClassScores


def test_score_counts_correct_and_confused_images():
    logits = np.array([[2, 0, 0], [0, 2, 0], [2, 0, 0], [0, 0, 2]], np.float32)
    result = metrics.score(logits, np.array([0, 1, 1, 2], np.int32), losses.cross_entropy)
    right, wrong = np.log(1 + 2 * np.exp(-2)), np.log(2 + np.exp(2))
    assert result.accuracy == 0.75
    np.testing.assert_allclose(result.loss, (3 * right + wrong) / 4, rtol=1e-6)
    np.testing.assert_array_equal(result.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(result.logits, logits)


def test_softmax_is_safe_for_large_logits():
    found = metrics.softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)


def test_worst_mistakes_come_first():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01], [0.3, 0.7]])
    labels = np.array([1, 1, 1, 1, 0])
    np.testing.assert_array_equal(metrics.worst_mistakes(probabilities, labels, 3), [3, 0, 4])
    assert len(metrics.worst_mistakes(probabilities, labels, 9)) == 4


def test_mistakes_name_file_true_and_predicted_class():
    probabilities = np.array([[0.9, 0.1], [0.25, 0.75]])
    lines = metrics.format_mistakes(
        np.array([1]), probabilities, np.array([0, 0]), ("a.png", "b.png"), ("cat", "dog")
    )
    assert lines == ["b.png: cat, predicted dog (75.0%)"]


def test_class_scores_are_recall_precision_and_the_most_frequent_mistake():
    """Of 10 cats 6 are recognised, and 8 images are predicted as cats."""
    confusion = np.array([[6, 1, 3], [2, 2, 0], [0, 0, 5]])
    cat, dog, owl = metrics.class_scores(confusion)
    assert cat == ClassScores(10, 0.6, 0.75, 2, 3)
    assert dog == ClassScores(4, 0.5, pytest.approx(2 / 3), 0, 2)
    assert owl.recall == 1.0
    assert owl.precision == 0.625
    names = ("cat", "dog", "owl")
    found = [metrics.format_confused(scores, names) for scores in (cat, dog, owl)]
    assert found == ["owl (3)", "cat (2)", "-"]


def test_shares_of_no_images_are_dashes():
    absent, *_ = metrics.class_scores(np.array([[0, 0], [0, 4]]))
    assert absent.images == 0
    assert metrics.format_share(absent.recall, 1) == "-"
    assert metrics.format_share(absent.precision, 1) == "-"
    assert metrics.format_share(0.625, 2) == "62.50%"
