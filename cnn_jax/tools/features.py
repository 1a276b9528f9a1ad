"""--mode=features: what a layer returns as features, and scikit-learn classifiers on them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from cnn_jax import fit, trees
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.outcome import write_json
from cnn_jax.step import Setup
from cnn_jax.tools import Request
from cnn_jax.tools.evaluate import load_dataset, load_run

_FOLDS = 5
"""Parts of the training set in cross-validation."""


@dataclass(frozen=True)
class Features:
    """What one module returns for every part of a data set, flattened to one row per image."""

    layer: str
    arrays: dict[str, Float[np.ndarray, "_ features"]]
    """float32 by part of the data, such as "train"."""
    labels: dict[str, Int[np.ndarray, "_"]]
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


def run(request: Request) -> None:
    """Writes the features of every image, and trains `--classifier` on them if it is set.

    They are those of the workdir's network or, if it has none yet, of the one that the config
    starts from (`init.checkpoint`).

    Raises:
        UserError: there is no trained network, or it has no module `--layer`.
    """
    workdir, config = request.workdir, request.config
    console = Console(highlight=False, markup=False, soft_wrap=True)
    accuracy = None
    if config.init.checkpoint and not (workdir / "checkpoints").is_dir():
        dataset = load_dataset(config, console)
        predictor = _initial_predictor(request, dataset, console)
    else:
        predictor, dataset = load_run(request, console)
        accuracy = fit.evaluate(predictor, dataset.test).accuracy
    found = extract(predictor, dataset, request.layer)
    stem = workdir / "features" / found.layer.replace("/", ".")
    found.save(stem.with_name(stem.name + ".npz"))
    shapes = ", ".join(f"{n} {list(array.shape)}" for n, array in found.arrays.items())
    console.print(f"{found.layer}: {shapes} in {stem}.npz")
    if not request.classifier:
        return
    result = classify(found, request.classifier, config.seed)
    result |= {"network_test_accuracy": accuracy, "data_sha256": dataset.sha256}
    write_json(stem.with_name(f"{stem.name}-{request.classifier}.json"), result)
    settings = ", ".join(f"{k}={v}" for k, v in result["settings"].items())
    network = "the network has no head for these classes yet"
    if accuracy is not None:
        network = f"the network itself: {accuracy:.2%}"
    console.print(
        f"{result['classifier']} on {found.layer}: test accuracy {result['test_accuracy']:.2%} "
        f"(cross-validation on train {result['cross_validation_accuracy']:.2%}, {settings}); "
        f"{network}"
    )


def _initial_predictor(request: Request, dataset: ImageDataset, console: Console) -> Predictor:
    """Returns the network as training would start from it."""
    config = request.config
    folder = RunFolder(request.workdir, lambda path: RunLog(path, console))
    with folder.claim(config):
        setup = Setup.of(config, dataset)
        key, _ = jax.random.split(jax.random.key(config.seed))
        state = fit.start(config, setup, dataset, folder, key)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Predictor(config, setup.model, variables, dataset.class_names, dataset.image_shape)


def extract(predictor: Predictor, dataset: ImageDataset, layer: str) -> Features:
    """Returns what the module `layer` returns, for all images.

    It may be a layer, such as "block1/conv1", or a module that holds layers, such as "block1". The
    name "" stands for the last layer before the head.

    Raises:
        UserError: the network has no module of that name.
    """
    layer = layer or _before_head(predictor)
    arrays = {}
    for part, split in dataset.parts.items():
        values = predictor.activations(split.images, [layer])[layer]
        arrays[part] = values.reshape(len(values), -1).astype(np.float32)
    return Features(
        layer=layer,
        arrays=arrays,
        labels={part: split.labels for part, split in dataset.parts.items()},
        class_names=dataset.class_names,
        params_sha256=trees.sha256(predictor.variables["params"]),
    )


def _before_head(predictor: Predictor) -> str:
    """Returns the layer before the one named "head", or before the last one if none is."""
    rows = inspection.summarize(predictor.model, predictor.image_shape)
    names = [row.name for row in rows]
    head = names.index("head") if "head" in names else len(names) - 1
    below = [row.name for row in rows[:head] if row.kind != "Dropout"]
    if not below:
        raise UserError("the network has no layer before its last one; name one with --layer")
    return below[-1]


def classify(features: Features, name: str, seed: int) -> dict[str, Any]:
    """Trains a classifier on the train part and returns its settings and accuracies.

    Hyperparameters are chosen by stratified cross-validation on train; the classifier is then
    fitted on all of train and evaluated once on test.

    Raises:
        UserError: a class has a single training image.
    """
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to import
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    x, y = features.arrays["train"], features.labels["train"]
    folds = min(_FOLDS, int(np.bincount(y).min()))
    if folds < 2:
        raise UserError("--classifier needs at least two training images of every class")
    estimator, grid = _candidates(name, seed, len(x) * (folds - 1) // folds)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    search = GridSearchCV(estimator, grid, cv=splits)
    with warnings.catch_warnings():
        # A fit that stops at its limit of iterations competes by its accuracy like any other.
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
    """Returns a classifier and the settings to try; all but the forest get standardized features.

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
