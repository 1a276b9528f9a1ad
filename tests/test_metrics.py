"""Evaluation: counts and scores against literal values."""

import json
import warnings

import numpy as np
import pytest
import sklearn.metrics

from cnn_jax import losses, metrics
from cnn_jax.metrics import ClassScores


def drawn(n: int, n_classes: int, seed: int = 0) -> metrics.Evaluation:
    """Returns the evaluation of random logits that favour the label, of classes of all sizes."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.3, n) - 1, n_classes - 1).astype(np.int32)
    logits = rng.normal(size=(n, n_classes)) + 2 * np.eye(n_classes)[labels]
    return metrics.score(logits.astype(np.float32), labels, losses.cross_entropy)


def seen_by_sklearn(test: metrics.Evaluation) -> tuple[np.ndarray, np.ndarray]:
    return test.labels, test.logits.argmax(axis=1)


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
    assert cat == ClassScores(10, 0.6, 0.75, pytest.approx(2 / 3), 2, 3)
    assert dog == ClassScores(4, 0.5, pytest.approx(2 / 3), pytest.approx(4 / 7), 0, 2)
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


@pytest.mark.parametrize("n_classes", [3, 12])
@pytest.mark.parametrize("n", [7, 400])
def test_figures_are_those_of_scikit_learn(n: int, n_classes: int):
    """Of 7 images and 12 classes, some are predicted without an image, some never predicted."""
    test = drawn(n, n_classes, seed=5)
    names = [str(i) for i in range(n_classes)]
    found = metrics.figures(test, names, temperature=1.0)
    seen = seen_by_sklearn(test)
    assert found["images"] == n
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(*seen))
    with warnings.catch_warnings():  # of classes that are predicted and have no image
        warnings.simplefilter("ignore")
        balanced = sklearn.metrics.balanced_accuracy_score(*seen)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(*seen, average="macro"))
    every = range(n_classes)
    of_each = sklearn.metrics.precision_recall_fscore_support(
        *seen, labels=every, zero_division=np.nan
    )
    for name, values in zip(("precision", "recall", "f1", "images"), of_each, strict=True):
        ours = [np.nan if row[name] is None else row[name] for row in found["classes"]]
        np.testing.assert_allclose(ours, values, err_msg=name)
    top5 = None
    if n_classes > 5:
        top5 = pytest.approx(
            sklearn.metrics.top_k_accuracy_score(test.labels, test.logits, k=5, labels=every)
        )
    assert found["top5_accuracy"] == top5
    json.dumps(found, allow_nan=False)


def test_wilson_s_interval():
    """Literature values: Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    cases |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for counts, expected in cases.items():
        np.testing.assert_allclose(metrics.wilson_interval(*counts), expected, atol=5e-5)
    low, high = metrics.wilson_interval(20, 20)
    assert (low, high) == (pytest.approx(1 - 0.1611, abs=5e-5), 1.0)


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_true_value_19_times_in_20():
    """Of test sets of 200 images with a true recall of 0.7 in each of three classes."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        right = rng.binomial((120, 50, 30), 0.7)
        confusion = np.diag(right)
        confusion[[0, 1, 2], [1, 2, 0]] += np.array((120, 50, 30)) - right
        low, high = metrics.bootstrap_intervals(confusion)["balanced_accuracy"]
        covered += low <= 0.7 <= high
    assert 88 <= covered <= 99  # 95 expected; P(< 88) is 0.2%, of a normal interval too


def test_bootstrap_intervals_contain_the_figure_and_repeat():
    test = drawn(150, 4)
    found = metrics.bootstrap_intervals(test.confusion)
    assert found == metrics.bootstrap_intervals(test.confusion)
    for name, (low, high) in found.items():
        assert low < getattr(test, name) < high
        assert 0.05 < high - low < 0.4
    wide = metrics.bootstrap_intervals(drawn(40, 4).confusion)["macro_f1"]
    assert wide[1] - wide[0] > found["macro_f1"][1] - found["macro_f1"][0]


def test_a_flawless_result_has_an_interval_all_the_same():
    """Resampling it would give 100% to 100%."""
    found = metrics.bootstrap_intervals(np.diag([8, 12]))
    assert found["macro_f1"] == found["balanced_accuracy"] == metrics.wilson_interval(20, 20)


def test_calibration_error_is_the_distance_of_probability_and_share():
    """Two images at 0.9 of which one is right, two at 0.6 that are right: (0.4 + 0.4) / 2."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    found = metrics.calibration_error(probabilities, np.array([0, 1, 0, 1]))
    assert found == pytest.approx(0.4)
    certain = np.array([[1.0, 0.0]])
    assert metrics.calibration_error(certain, np.array([0])) == 0
    assert metrics.calibration_error(certain, np.array([1])) == 1


def test_the_temperature_undoes_a_factor_of_the_logits():
    """Labels that are drawn from softmax(logits): of 3 times the logits, T is 3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4)).astype(np.float32) * 2
    shares = metrics.softmax(logits)
    labels = (rng.random((len(logits), 1)) > shares.cumsum(axis=1)).sum(axis=1)
    for factor in (0.5, 1.0, 3.0):
        found = metrics.fit_temperature(factor * logits, labels)
        assert found == pytest.approx(factor, rel=0.05)
    error = metrics.calibration_error(metrics.softmax(3 * logits), labels)
    assert (
        error > 0.1 > 0.02 > metrics.calibration_error(metrics.softmax(3 * logits, found), labels)
    )


def test_a_few_images_without_mistake_do_not_prove_certainty():
    """Without the shared weight T would be at its bound, and every probability 1."""
    labels = np.arange(20) % 2
    logits = np.float32(np.eye(2)[labels])
    shares = metrics.softmax(logits, metrics.fit_temperature(logits, labels))
    assert 0.95 < shares.max() < 0.99


def test_softmax_at_a_temperature_is_that_of_the_divided_logits():
    logits = np.array([[1.0, 2.0, 4.0]], np.float32)
    np.testing.assert_allclose(metrics.softmax(logits, 2.0), metrics.softmax(logits / 2))
    np.testing.assert_allclose(np.exp(metrics.log_softmax(logits)), metrics.softmax(logits))
    assert metrics.log_softmax(np.array([[0.0, 1000.0]], np.float32))[0, 0] == -1000


def test_classes_that_say_little_get_a_warning():
    names, train = ("cat", "dog", "owl"), np.array([9, 10, 400])
    confusion = np.array([[6, 0, 3], [2, 0, 2], [0, 0, 5]])
    assert metrics.class_warnings(names, train, confusion) == [
        "never predicted on the test images: dog (4)",
        "fewer than 10 training images: cat (9)",
        "fewer than 5 test images: dog (4)",
    ]
    fine = np.diag([5, 5, 5])
    assert metrics.class_warnings(names, np.array([10, 10, 10]), fine) == []
    many = metrics.class_warnings([str(i) for i in range(7)], np.ones(7, int), np.diag([9] * 7))
    assert many == ["fewer than 10 training images: 0 (1), 1 (1), 2 (1), 3 (1), 4 (1) and 2 more"]
