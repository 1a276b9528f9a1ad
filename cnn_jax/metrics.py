"""Evaluation of logits against labels, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int


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
    return Evaluation(float(each.mean()), accuracy, confusion, logits)


def softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Returns probabilities in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class ClassScores:
    """How well one class is recognised."""

    images: int
    recall: float
    """Share of the class' images that are predicted as the class; NaN without images."""
    precision: float
    """Share of the class among the images predicted as the class; NaN without predictions."""
    confused_with: int
    """The wrong class predicted most often for the class' images."""
    confused: int
    """The number of images for which it is."""


def class_scores(confusion: Int[np.ndarray, "classes classes"]) -> list[ClassScores]:
    """Returns the scores of each class, from the confusion matrix of `Evaluation`."""
    correct = np.diag(confusion)
    mistakes = confusion - np.diag(correct)
    images, predictions = confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        recall, precision = correct / images, correct / predictions
    columns = (images, recall, precision, mistakes.argmax(axis=1), mistakes.max(axis=1))
    return [ClassScores(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


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
