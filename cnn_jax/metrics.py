"""Evaluation of logits against labels, on the host.

Scores of classes are those of scikit-learn (tests compare them). They are computed from confusion
matrices, because an interval needs a thousand of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cnn_jax.errors import UserError

Interval = tuple[float, float]
"""Lower and upper bound of a 95% confidence interval."""

FEW_TRAIN, FEW_TEST = 10, 5
"""A class with fewer images in these parts gets a warning: its figures are little but luck."""

_Z = 1.959964
"""The standard normal distribution has 95% of its mass within this of 0."""
_RESAMPLES = 1000
_BINS = 15
"""Of the calibration error, as in Guo et al. (2017)."""
_NAMED = 5
"""Classes that a warning lists."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a network on a labelled split."""

    loss: float
    """Mean of the training loss, label smoothing included, dropout off."""
    accuracy: float
    """Share of images whose largest logit is that of the label, in [0, 1]."""
    confusion: Int[np.ndarray, "classes classes"]
    """Number of images by true class (row) and predicted class (column)."""
    logits: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"]

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the classes' recalls, in [0, 1]; classes without images are left out."""
        return _balanced_accuracy(*_totals(self.confusion))

    @property
    def macro_f1(self) -> float:
        """Mean of the classes' F1 scores, in [0, 1].

        Classes that are neither in the labels nor in the predictions are left out.
        """
        return _macro_f1(*_totals(self.confusion))


def score(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], loss: Any
) -> Evaluation:
    """Evaluates logits; `loss(logits, labels)` returns one value per example."""
    n_classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    each = np.asarray(loss(jnp.asarray(logits), jnp.asarray(labels)), np.float64)
    accuracy = float(np.mean(predicted == labels))
    return Evaluation(float(each.mean()), accuracy, confusion, logits, labels)


def check_finite(logits: Float[np.ndarray, "n classes"]) -> None:
    """Refuses logits that are not finite, whose largest one would be the first class.

    Raises:
        UserError: says what to do.
    """
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's outputs are not finite; train it with a lower optim.learning_rate, or "
            "with optim.clip_norm"
        )


def _totals(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the images of each class that are predicted as it, its images, its predictions."""
    return np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)


def _balanced_accuracy(correct: np.ndarray, images: np.ndarray, _: np.ndarray) -> float:
    present = images > 0
    return float(np.mean(correct[present] / images[present]))


def _macro_f1(correct: np.ndarray, images: np.ndarray, predictions: np.ndarray) -> float:
    # 2 / (1 / precision + 1 / recall), written so that it is 0 where both are.
    total = images + predictions
    return float(np.mean(2 * correct[total > 0] / total[total > 0]))


def figures(test: Evaluation, class_names: Sequence[str], temperature: float) -> dict[str, Any]:
    """Returns the figures of an evaluation as JSON: shares in [0, 1], intervals as two numbers.

    `calibration_error` is that of the probabilities at `temperature`. With five classes or fewer,
    `top5_accuracy` is None.
    """
    n, k = test.logits.shape
    intervals = bootstrap_intervals(test.confusion)
    scores = zip(class_names, class_scores(test.confusion), strict=True)
    return {
        "images": n,
        "accuracy": test.accuracy,
        "accuracy_interval": wilson_interval(round(test.accuracy * n), n),
        "balanced_accuracy": test.balanced_accuracy,
        "balanced_accuracy_interval": intervals["balanced_accuracy"],
        "macro_f1": test.macro_f1,
        "macro_f1_interval": intervals["macro_f1"],
        "top5_accuracy": top_k_accuracy(test.logits, test.labels, 5) if k > 5 else None,
        "calibration_error": calibration_error(softmax(test.logits, temperature), test.labels),
        "classes": [
            {
                "class": name,
                "images": of_class.images,
                "precision": _or_none(of_class.precision),
                "recall": _or_none(of_class.recall),
                "f1": _or_none(of_class.f1),
            }
            for name, of_class in scores
        ],
    }


def _or_none(share: float) -> float | None:
    return None if np.isnan(share) else share


def wilson_interval(correct: int, n: int) -> Interval:
    """Returns the interval of a share of `n` > 0 independent images (Wilson, 1927)."""
    share, spread = correct / n, _Z**2 / n
    centre = share + spread / 2
    half = (share * (1 - share) * spread + spread**2 / 4) ** 0.5
    return max((centre - half) / (1 + spread), 0.0), min((centre + half) / (1 + spread), 1.0)


def bootstrap_intervals(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, Interval]:
    """Returns the intervals of balanced accuracy and macro-F1, always the same for equal counts.

    They are percentiles over test sets that are drawn from this one with replacement (Efron, 1979).
    Where every image is right, all of these agree; Wilson's interval is then the honest one.
    """
    kinds = {"balanced_accuracy": _balanced_accuracy, "macro_f1": _macro_f1}
    n = int(confusion.sum())
    if np.trace(confusion) == n:
        return dict.fromkeys(kinds, wilson_interval(n, n))
    cells = np.argwhere(confusion)
    labels, predicted = np.repeat(cells, confusion[tuple(cells.T)], axis=0).T
    random, values = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        chosen = random.integers(n, size=n)
        label, guess = labels[chosen], predicted[chosen]
        columns = (label[label == guess], label, guess)
        totals = [np.bincount(column, minlength=len(confusion)) for column in columns]
        values.append([kind(*totals) for kind in kinds.values()])
    low, high = np.percentile(values, [2.5, 97.5], axis=0).tolist()
    return dict(zip(kinds, zip(low, high, strict=True), strict=True))


def top_k_accuracy(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], k: int
) -> float:
    """Returns the share of images whose label is among the `k` largest logits."""
    largest = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float(np.mean(np.any(largest == labels[:, None], axis=1)))


def calibration_error(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]
) -> float:
    """Returns the expected calibration error, in [0, 1], over 15 bins of equal width.

    It is the mean distance between the probability of the predicted class and the share of right
    predictions, by bins of that probability: Guo et al., "On Calibration of Modern Neural
    Networks" (2017), equation 3.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(labels))


def fit_temperature(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> float:
    """Returns the T in [0.05, 20] for which softmax(logits / T) has the lowest cross-entropy.

    Guo et al. (2017), section 4.2. The labels share 1 / (n + 2) of their weight with all classes,
    in the manner of Platt (1999): few images that are all predicted correctly prove no certainty.
    """
    from scipy.optimize import minimize_scalar  # takes a tenth of a second to import

    n, k = logits.shape
    shared = 1 / (n + 2)
    targets = np.eye(k)[labels] * (1 - shared) + shared / k

    def loss(log_temperature: float) -> float:
        return -float(np.sum(targets * log_softmax(logits, np.exp(log_temperature)))) / n

    found = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def log_softmax(
    logits: Float[np.ndarray, "n classes"], temperature: float = 1.0
) -> Float[np.ndarray, "n classes"]:
    """Returns logarithms of probabilities in float64."""
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(
    logits: Float[np.ndarray, "n classes"], temperature: float = 1.0
) -> Float[np.ndarray, "n classes"]:
    """Returns probabilities in float64: those of logits / temperature."""
    shifted = np.exp((logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperature)
    return shifted / shifted.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class ClassScores:
    """How well one class is recognised."""

    images: int
    recall: float
    """Share of the class' images that are predicted as the class; NaN without images."""
    precision: float
    """Share of the class among the images predicted as the class; NaN without predictions."""
    f1: float
    """Harmonic mean of both, 0 if no image is right; NaN without images and predictions."""
    confused_with: int
    """The wrong class predicted most often for the class' images."""
    confused: int
    """The number of images for which it is."""


def class_scores(confusion: Int[np.ndarray, "classes classes"]) -> list[ClassScores]:
    """Returns the scores of each class, from the confusion matrix of `Evaluation`."""
    correct, images, predictions = _totals(confusion)
    mistakes = confusion - np.diag(correct)
    with np.errstate(invalid="ignore"):
        shares = (correct / images, correct / predictions, 2 * correct / (images + predictions))
    columns = (images, *shares, mistakes.argmax(axis=1), mistakes.max(axis=1))
    return [ClassScores(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def class_warnings(
    class_names: Sequence[str],
    train_counts: Int[np.ndarray, "classes"],
    confusion: Int[np.ndarray, "classes classes"],
) -> list[str]:
    """Returns a line on classes that are never predicted, and on those of few images, if any."""
    _, images, predictions = _totals(confusion)
    kinds = {
        "never predicted on the test images": ((predictions == 0) & (images > 0), images),
        f"fewer than {FEW_TRAIN} training images": (train_counts < FEW_TRAIN, train_counts),
        f"fewer than {FEW_TEST} test images": (images < FEW_TEST, images),
    }
    lines = []
    for kind, (chosen, counts) in kinds.items():
        found = [f"{class_names[i]} ({counts[i]})" for i in np.flatnonzero(chosen).tolist()]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        if found:
            lines.append(f"{kind}: {', '.join(found[:_NAMED])}{more}")
    return lines


def format_interval(interval: Sequence[float]) -> str:
    """Returns "81.2% to 88.0%"."""
    low, high = interval
    return f"{low:.1%} to {high:.1%}"


def format_figures(found: dict[str, Any]) -> list[str]:
    """Returns two lines for a terminal, of what `figures` returned and the key `temperature`."""
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "balanced_accuracy": "balanced accuracy",
    }
    first = ", ".join(
        f"{text} {found[name]:.1%} ({format_interval(found[f'{name}_interval'])})"
        for name, text in names.items()
    )
    top5 = found["top5_accuracy"]
    others = [] if top5 is None else [f"top-5 accuracy {top5:.1%}"]
    others.append(f"calibration error {found['calibration_error']:.1%}")
    others.append(f"temperature {found['temperature']:.2f}")
    return [f"95% intervals: {first}", ", ".join(others)]


def format_share(share: float, digits: int) -> str:
    """Returns a share as a percentage, "-" for NaN."""
    return "-" if np.isnan(share) else f"{share:.{digits}%}"


def format_confused(scores: ClassScores, class_names: Sequence[str]) -> str:
    """Returns the class that is predicted most often instead, with its count, or "-"."""
    return f"{class_names[scores.confused_with]} ({scores.confused})" if scores.confused else "-"


def worst_mistakes(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], limit: int
) -> Int[np.ndarray, "wrong"]:
    """Returns indices of misclassified examples, lowest probability of the true class first."""
    of_label = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(of_label[wrong], kind="stable")][:limit]


def format_mistakes(
    wrong: Int[np.ndarray, "wrong"],
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, "n"],
    files: Sequence[str],
    class_names: Sequence[str],
) -> list[str]:
    """Returns one line per misclassified example: its file, true class and predicted class."""
    lines = []
    for i in wrong.tolist():
        predicted = int(probabilities[i].argmax())
        share = f"{probabilities[i, predicted]:.1%}"
        true = class_names[int(labels[i])]
        lines.append(f"{files[i]}: {true}, predicted {class_names[predicted]} ({share})")
    return lines
