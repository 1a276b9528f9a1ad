"""A network's activations as features, and scikit-learn's classifiers on them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, Int

from cnn_jax import evaluate, models, trees
from cnn_jax.config import nearest
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError

_FOLDS = 5


@dataclass(frozen=True)
class Features:
    """The activations of one layer for every part of a data set, one flat row an image."""

    layer: str
    arrays: dict[str, Float[np.ndarray, "n features"]]
    labels: dict[str, Int[np.ndarray, "n"]]
    class_names: tuple[str, ...]
    params_sha256: str

    def save(self, path: Path) -> None:
        """Writes PART_features and PART_labels of each part, class_names, layer, params_sha256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "class_names": np.array(self.class_names, dtype=str),
            "layer": np.array(self.layer),
            "params_sha256": np.array(self.params_sha256),
        }
        arrays |= {f"{part}_features": array for part, array in self.arrays.items()}
        arrays |= {f"{part}_labels": labels for part, labels in self.labels.items()}
        np.savez(path, **arrays)


def extract(
    model: nn.Module,
    variables: dict[str, Any],
    dataset: ImageDataset,
    layer: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Features:
    """Returns what the layer after `layer` is given, so past its activation function, in float32.

    Of the last layer these are its own outputs. The name "" stands for the layer before the head.

    Raises:
        UserError: the network has no layer of that name.
    """
    rows = models.summarize(model, dataset.image_shape)
    names = [row.name for row in rows]
    below_head = rows[: names.index("head")]
    layer = layer or next(row.name for row in reversed(below_head) if row.kind != "Dropout")
    if layer not in names:
        known = ", ".join(names)
        raise UserError(
            f"features.layer={layer}: no such layer{nearest(layer, names)}; known: {known}"
        )
    following = [*names[1:], ""][names.index(layer)]
    arrays = {}
    for part, split in dataset.parts.items():
        inputs = evaluate.layer_inputs(
            model, variables, split.images, following, mean=mean, std=std
        )
        arrays[part] = inputs.reshape(len(inputs), -1).astype(np.float32)
    return Features(
        layer=layer,
        arrays=arrays,
        labels={part: split.labels for part, split in dataset.parts.items()},
        class_names=dataset.class_names,
        params_sha256=trees.sha256(variables["params"]),
    )


def classify(features: Features, name: str, seed: int) -> dict[str, Any]:
    """Trains a classifier on the train part and returns its settings and accuracies.

    Hyper-parameters are those with the best accuracy in stratified cross-validation on train; the
    classifier is then fitted on all of train, and looks at test once.

    Raises:
        UserError: a class has a single training image.
    """
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to import
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    x, y = features.arrays["train"], features.labels["train"]
    folds = min(_FOLDS, int(np.bincount(y).min()))
    if folds < 2:
        raise UserError("features.classifier needs two training images of every class or more")
    estimator, grid = _candidates(name, seed, len(x) * (folds - 1) // folds)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    search = GridSearchCV(estimator, grid, cv=splits)
    with warnings.catch_warnings():
        # A fit that its limit of iterations cuts short is judged by its accuracy like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(x, y)
        test_accuracy = search.score(features.arrays["test"], features.labels["test"])
    settings = {key.split("__")[-1]: value for key, value in search.best_params_.items()}
    return {
        "classifier": name,
        "layer": features.layer,
        "params_sha256": features.params_sha256,
        "settings": settings,
        "folds": folds,
        "cross_validation_accuracy": float(search.best_score_),
        "test_accuracy": float(np.asarray(test_accuracy)),
    }


def _candidates(name: str, seed: int, n_fitted: int) -> tuple[Any, dict[str, list[Any]]]:
    """Returns a classifier and the values tried; all but the forest see standardized features.

    The support vector machine is linear, as on convolutional features in Razavian et al., "CNN
    Features off-the-shelf" (2014).
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    if name == "random_forest":
        forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed)
        return forest, {"min_samples_leaf": [1, 3], "max_features": ["sqrt", 0.1]}
    strengths = [0.0001, 0.001, 0.01, 0.1, 1.0]
    estimator, grid = {
        "svm": (LinearSVC(random_state=seed), {"C": strengths}),
        "logistic": (LogisticRegression(max_iter=1000), {"C": strengths}),
        "mlp": (
            MLPClassifier(max_iter=300, random_state=seed),
            {"hidden_layer_sizes": [(128,), (512,)], "alpha": [0.0001, 0.1]},
        ),
        "knn": (
            KNeighborsClassifier(),
            {
                "n_neighbors": [k for k in (1, 5, 15, 45) if k <= n_fitted],
                "weights": ["uniform", "distance"],
            },
        ),
    }[name]
    prefix = type(estimator).__name__.lower()
    named = {f"{prefix}__{key}": values for key, values in grid.items()}
    return make_pipeline(StandardScaler(), estimator), named
