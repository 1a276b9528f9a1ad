"""Classifiers of scikit-learn on features, with settings that cross-validation chooses.

A linear one is a dense layer in other words: `linear_head` returns its kernel and bias.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cnn_jax.errors import UserError
from cnn_jax.kernels import cores

LINEAR = ("svm", "logistic")
"""The classifiers that are a dense layer."""

_FOLDS = 5
"""Parts of the training set in cross-validation."""
_FALLS = 2
"""The search over rising strengths ends when so many have been worse than the best."""


@dataclass(frozen=True)
class Fitted:
    """A classifier that was fitted on all training features."""

    name: str
    settings: dict[str, Any]
    """The chosen hyperparameters."""
    folds: int
    accuracy: float
    """Mean over the folds of cross-validation, in [0, 1]."""
    outputs: Float[np.ndarray, "n classes"]
    """For each training example, what classifiers that were fitted without it return: logits of
    linear ones, else probabilities."""
    estimator: Any
    """A fitted estimator of scikit-learn."""

    def __call__(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        """Returns logits of linear classifiers, else probabilities."""
        return outputs(self.estimator, x)


def fit(
    name: str,
    x: Float[np.ndarray, "n features"],
    y: Int[np.ndarray, "n"],
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Fits a classifier of `tools.CLASSIFIERS`, with the best settings in cross-validation.

    Each class must be among the labels. The folds of a setting are computed side by side on all
    cores, and `say` gets a line for each setting.

    Raises:
        UserError: a class has a single example.
    """
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to import
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    folds = min(_FOLDS, int(np.bincount(y).min()))
    if folds < 2:
        raise UserError("--classifier needs at least two training images of every class")
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
    make, grid = _candidates(name, seed, len(x) * (folds - 1) // folds)
    # One thread of BLAS for each fold: more would wait for one another.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A fit that stops at its limit of iterations competes by its accuracy like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        settings, accuracy, outputs = _search(name, make, grid, x, y, splits, say)
        estimator = make(settings).fit(x, y)
    return Fitted(name, settings, folds, accuracy, outputs, estimator)


def _search(
    name: str,
    make: Callable[[dict[str, Any]], Any],
    grid: Iterable[dict[str, Any]],
    x: np.ndarray,
    y: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], float, np.ndarray]:
    """Returns the best settings, their accuracy, and the outputs on the folds left out."""
    best: tuple[dict[str, Any], float, np.ndarray] | None = None
    worse = 0
    with ThreadPoolExecutor(cores.usable_cpus()) as pool:
        for settings in grid:
            start = time.monotonic()

            def outputs_without(fold: tuple, settings: dict[str, Any] = settings) -> np.ndarray:
                kept, left_out = fold
                return outputs(make(settings).fit(x[kept], y[kept]), x[left_out])

            each = list(pool.map(outputs_without, splits))
            right = [np.mean(o.argmax(1) == y[i]) for o, (_, i) in zip(each, splits, strict=True)]
            accuracy = float(np.mean(right))
            say(
                f"{name}, {_text(settings)}: cross-validation {accuracy:.2%} "
                f"({time.monotonic() - start:.1f} s)"
            )
            if best is None or accuracy > best[1]:
                left_out = np.empty((len(y), each[0].shape[1]), each[0].dtype)
                left_out[np.concatenate([i for _, i in splits])] = np.concatenate(each)
                best, worse = (settings, accuracy, left_out), 0
            else:
                worse += accuracy < best[1]
            if name in LINEAR and worse == _FALLS:
                break
    assert best is not None
    return best


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _candidates(
    name: str, seed: int, n_fitted: int
) -> tuple[Callable[[dict[str, Any]], Any], list[dict[str, Any]]]:
    """Returns a function from settings to a classifier, and the settings to try in this order.

    Strengths rise: a weakly regularised fit takes many times as long. All classifiers but the
    forest get standardised features. The support vector machine is linear, as on convolutional
    features in Razavian et al., "CNN Features off-the-shelf" (2014); its dual problem is solved,
    because with a thousand features and more the primal one takes many times as long.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    kinds: dict[str, tuple[Any, dict[str, Any], dict[str, list[Any]]]] = {
        "svm": (
            LinearSVC,
            {"dual": True, "max_iter": 100, "random_state": seed},
            {"C": [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]},
        ),
        "logistic": (
            LogisticRegression,
            {"max_iter": 1000},
            {"C": [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0]},
        ),
        "random_forest": (
            RandomForestClassifier,
            {"n_estimators": 300, "n_jobs": -1, "random_state": seed},
            {"min_samples_leaf": [1, 3]},
        ),
        "mlp": (
            MLPClassifier,
            {"max_iter": 300, "random_state": seed},
            {"hidden_layer_sizes": [(128,), (512,)], "alpha": [0.0001, 0.1]},
        ),
        "knn": (
            KNeighborsClassifier,
            {},
            {
                "n_neighbors": [k for k in (1, 5, 15, 45) if k <= n_fitted],
                "weights": ["uniform", "distance"],
            },
        ),
    }
    kind, fixed, choices = kinds[name]

    def make(settings: dict[str, Any]) -> Any:
        steps = [] if name == "random_forest" else [StandardScaler()]
        return make_pipeline(*steps, kind(**fixed, **settings))

    combinations = itertools.product(*choices.values())
    return make, [dict(zip(choices, values, strict=True)) for values in combinations]


def outputs(estimator: Any, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
    """Returns what a fitted estimator returns: logits if it is linear, else probabilities."""
    if is_linear(estimator):
        kernel, bias = linear_head(estimator)
        return x @ kernel + bias
    return estimator.predict_proba(x)


def is_linear(estimator: Any) -> bool:
    """Returns whether a fitted estimator is one of `LINEAR`."""
    return hasattr(estimator[-1], "coef_")


def linear_head(
    estimator: Any,
) -> tuple[Float[np.ndarray, "features classes"], Float[np.ndarray, "classes"]]:
    """Returns kernel and bias of the dense layer that a linear classifier is, in float32.

    Standardising the features is part of it. Of two classes scikit-learn keeps one column, the
    second class' logit less the first's.
    """
    scaler, model = estimator
    columns = model.coef_.T.astype(np.float64)
    bias = model.intercept_.astype(np.float64)
    if columns.shape[1] == 1:
        columns, bias = columns * [-0.5, 0.5], bias * [-0.5, 0.5]
    kernel = columns / scaler.scale_[:, None]
    return kernel.astype(np.float32), (bias - scaler.mean_ @ kernel).astype(np.float32)
