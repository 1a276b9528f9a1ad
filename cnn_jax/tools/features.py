"""--mode=features: what a layer returns as features, and scikit-learn classifiers on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from cnn_jax import classifiers, fit, metrics, trees
from cnn_jax.classifiers import Fitted
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.data.dataset import Images
from cnn_jax.errors import UserError, one_line
from cnn_jax.fit import Progress, Result
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.outcome import ESTIMATOR, load_predictor, write_json
from cnn_jax.step import Setup, init_state
from cnn_jax.tools import Request, train
from cnn_jax.tools.evaluate import load_dataset, load_run, print_evaluation

_TRIED, _TOLERANCE = 8, 0.02
"""Images on which a classifier and the head made of it must agree, and how closely, relative to the
largest logit: bfloat16 keeps three digits."""


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
    starts from (`init.checkpoint`). The classifier is saved as a run of its own: see `save`.

    Raises:
        UserError: there is no trained network, or it has no module `--layer`.
    """
    workdir, config = request.workdir, request.config
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not config.init.checkpoint or (workdir / "checkpoints").is_dir():
        predictor, dataset = load_run(request, console)
        _write(request, predictor, dataset, console, trained=True)
        return
    folder = RunFolder(workdir, lambda path: RunLog(path, console))
    with folder.claim(config):
        dataset = load_dataset(config, console)
        predictor = _initial_predictor(config, folder, dataset)
        _write(request, predictor, dataset, console, trained=False)


def _write(
    request: Request, predictor: Predictor, dataset: ImageDataset, console: Console, trained: bool
) -> None:
    """Writes what `run` writes; `trained` says whether the network's head knows the classes."""
    workdir, config = request.workdir, request.config
    found = extract(predictor, dataset, request.layer)
    path = workdir / "features" / f"{found.layer.replace('/', '.')}.npz"
    found.save(path)
    shapes = ", ".join(f"{n} {list(array.shape)}" for n, array in found.arrays.items())
    console.print(f"{found.layer}: {shapes} in {path}")
    if not request.classifier:
        return
    fitted = _fit(found, request.classifier, config.seed, console.print)
    result = _describe(found, fitted)
    accuracy = fit.evaluate(predictor, dataset.test).accuracy if trained else None
    settings = ", ".join(f"{k}={v}" for k, v in result["settings"].items())
    network = "the network has no head for these classes yet"
    if accuracy is not None:
        network = f"the network itself: {accuracy:.2%}"
    folder = path.with_name(f"{path.stem}-{request.classifier}")
    result |= {"network_test_accuracy": accuracy, "data_sha256": dataset.sha256}
    save(folder, predictor, dataset, fitted, result, console)
    console.print(
        f"{fitted.name} on {found.layer}: test accuracy {result['test_accuracy']:.2%} "
        f"(cross-validation on train {fitted.accuracy:.2%}, {settings}); {network}"
    )
    console.print(f"to classify photos: --mode=predict --workdir={folder} PHOTO...")


def _initial_predictor(config: Config, folder: RunFolder, dataset: ImageDataset) -> Predictor:
    """Returns the network as training would start from it."""
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
        arrays[part] = _rows(predictor, split.images, layer)
    return Features(
        layer=layer,
        arrays=arrays,
        labels={part: split.labels for part, split in dataset.parts.items()},
        class_names=dataset.class_names,
        params_sha256=trees.sha256(predictor.variables["params"]),
    )


def _rows(predictor: Predictor, images: Images, layer: str) -> Float[np.ndarray, "n features"]:
    """Returns what a module returns for images, flattened to one row each, in float32."""
    values = predictor.activations(images, [layer])[layer]
    return values.reshape(len(values), -1).astype(np.float32)


def _before_head(predictor: Predictor) -> str:
    """Returns the layer before the one named "head", or before the last one if none is."""
    rows = inspection.summarize(predictor.model, predictor.seen_shape)
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
    return _describe(features, _fit(features, name, seed))


def _fit(
    features: Features, name: str, seed: int, say: Callable[[str], None] = lambda line: None
) -> Fitted:
    return classifiers.fit(name, features.arrays["train"], features.labels["train"], seed, say)


def _describe(features: Features, fitted: Fitted) -> dict[str, Any]:
    predicted = fitted(features.arrays["test"]).argmax(axis=1)
    return {
        "classifier": fitted.name,
        "layer": features.layer,
        "params_sha256": features.params_sha256,
        "settings": fitted.settings,
        "folds": fitted.folds,
        "cross_validation_accuracy": fitted.accuracy,
        "test_accuracy": float(np.mean(predicted == features.labels["test"])),
    }


def save(
    path: Path,
    predictor: Predictor,
    dataset: ImageDataset,
    fitted: Fitted,
    result: dict[str, Any],
    console: Console,
) -> None:
    """Saves a classifier together with its network, as a run that was not trained.

    A linear classifier on the layer before the head becomes the head, so that every mode can use
    the run, and its temperature is that of the predictions in cross-validation. Any other one is
    written to classifier.joblib, which only --mode=predict uses. classifier.json is `result`.

    Raises:
        UserError: the folder belongs to another config or process, or can't be written.
    """
    old = predictor.config
    plain = replace(old.train, epochs=0, patience=0, ema_decay=0.0, lookahead_steps=0)
    config = replace(old, train=plain)
    setup = Setup.of(config, dataset)
    folder = RunFolder(path, lambda path: RunLog(path, console))
    path.mkdir(parents=True, exist_ok=True)
    with folder.claim(config):
        network = _with_head(replace(predictor, config=config), fitted, result["layer"], dataset)
        state = replace(init_state(setup, jax.random.key(0)), **(network or predictor).variables)
        with folder.training(), folder.log.running(0, 0, setup.steps_per_epoch):
            folder.save("latest", 0, state, fit.make_record(dataset, Progress()))
        write_json(path / "classifier.json", result)
        (path / ESTIMATOR).unlink(missing_ok=True)
        if network is None:
            import joblib

            joblib.dump(fitted.estimator, path / ESTIMATOR)
            console.print(f"only --mode=predict can use {fitted.name} on {result['layer']}")
            return
        temperature = metrics.fit_temperature(fitted.outputs, dataset.train.labels)
        network = replace(network, temperature=temperature)
        ended = Result(setup, state, Progress(), network)
        finished = train.finish(config, dataset, folder, ended, calibrated=True)
    print_evaluation(console, network, finished.test, dataset.test.files)
    console.print(f"report: {path / 'report.html'}")


def _with_head(
    predictor: Predictor, fitted: Fitted, layer: str, dataset: ImageDataset
) -> Predictor | None:
    """Returns the network with a linear classifier as its head, or None if that can't be.

    The classifier must read the layer that the head reads, and the head be a dense layer with a
    bias whose outputs are the logits, which is tried on a few images.
    """
    head = predictor.variables["params"].get("head", {})
    linear = classifiers.is_linear(fitted.estimator) and layer == _before_head(predictor)
    if not linear or set(head) != {"kernel", "bias"}:
        return None
    kernel, bias = classifiers.linear_head(fitted.estimator)
    if head["kernel"].shape != kernel.shape:
        return None
    params = {**predictor.variables["params"], "head": {"kernel": kernel, "bias": bias}}
    network = replace(predictor, variables={**predictor.variables, "params": params})
    images = dataset.test.images[:_TRIED]
    wanted = fitted(_rows(predictor, images, layer))
    difference = np.abs(network.logits(images, "none") - wanted).max()
    return network if difference <= _TOLERANCE * np.abs(wanted).max() else None


def load_classifier(workdir: Path, config: Config) -> "ClassifierPredictor":
    """Returns a network with the classifier that `save` wrote beside it, for prediction.

    Raises:
        UserError: a file is missing or damaged.
    """
    import joblib

    network = load_predictor(workdir, config, with_classifier=True)
    try:
        layer = json.loads((workdir / "classifier.json").read_text())["layer"]
        estimator = joblib.load(workdir / ESTIMATOR)
    except Exception as error:  # Damaged pickles raise almost anything.
        raise UserError(f"the classifier in {workdir} can't be read: {one_line(error)}") from None
    return ClassifierPredictor(**vars(network), layer=layer, estimator=estimator)


@dataclass(frozen=True, eq=False)
class ClassifierPredictor(Predictor):
    """A network up to a layer, and a classifier of scikit-learn on what that returns."""

    layer: str = ""
    estimator: Any = None

    def probabilities(
        self, images: Images, test_time: str | None = None
    ) -> Float[np.ndarray, "n classes"]:
        """Returns the classifier's probabilities; of a linear one, the softmax of its logits."""
        del test_time  # The classifier was trained on the images themselves.
        outputs = classifiers.outputs(self.estimator, _rows(self, images, self.layer))
        return metrics.softmax(outputs) if classifiers.is_linear(self.estimator) else outputs
