"""What layers return, written to disk, and scikit-learn's classifiers on it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.cli import SMALL, finish, refuse
from helpers.predictors import random_predictor
from PIL import Image
from sklearn.datasets import load_digits

from cnn_jax import augment, classifiers, metrics, trees
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.tools import features

VGG = Config(model=ModelConfig(name="vgg", blocks=((4,),), dense=(8,), dropout=0.5))
RESNET = Config(model=ModelConfig(name="resnet_small", blocks=((4,), (6,)), dense=()))
# One is enough to see that ours is the right use of scikit-learn.
CLASSIFIERS = ["logistic"] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ("svm", "random_forest", "mlp", "knn")
]


@pytest.fixture
def found(dataset: ImageDataset) -> features.Features:
    return features.extract(random_predictor(VGG), dataset, "")


def test_any_layer_can_be_extracted_for_every_part(dataset: ImageDataset):
    """By hand: the convolution past its ReLU, the dense layer without dropout, and the logits."""
    predictor = random_predictor(VGG)
    images = augment.normalize(dataset.test.images, VGG.data.normalize)
    p = predictor.variables["params"]
    conv = jax.lax.conv_general_dilated(
        images,
        p["block1"]["conv1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = np.maximum(conv + p["block1"]["conv1"]["bias"].reshape(1, 1, 1, 4), 0)
    pooled = x.reshape(10, 4, 2, 4, 2, 4).max((2, 4))
    expected = {"block1/conv1": x, "block1/pool": pooled, "block1": pooled}
    flat = pooled.reshape(10, -1)
    expected["fc1"] = np.maximum(flat @ p["fc1"]["kernel"] + p["fc1"]["bias"][None], 0)
    expected["head"] = expected["fc1"] @ p["head"]["kernel"] + p["head"]["bias"][None]
    for layer, values in expected.items():
        taken = features.extract(predictor, dataset, layer)
        assert {part: len(a) for part, a in taken.arrays.items()} == dataset.counts
        np.testing.assert_allclose(
            taken.arrays["test"], values.reshape(10, -1), atol=1e-5, err_msg=layer
        )


@pytest.mark.slow
def test_a_residual_block_gives_the_sum_of_its_branches(dataset: ImageDataset):
    """The layer that is called after `norm2` reads the block's input, not what norm2 returns."""
    predictor, block = random_predictor(RESNET), "stage2/block1"
    norm2, shortcut, joined = (
        features.extract(predictor, dataset, f"{block}{name}").arrays["test"]
        for name in ("/norm2", "/shortcut_norm", "")
    )
    np.testing.assert_allclose(joined, np.maximum(norm2 + shortcut, 0), atol=1e-5)
    assert norm2.min() < 0
    last = features.extract(predictor, dataset, "")
    assert last.layer == "pool"
    means = joined.reshape(10, 16, 6).mean(axis=1)
    np.testing.assert_allclose(last.arrays["test"], means, atol=1e-5)


def test_the_default_is_the_penultimate_layer(dataset: ImageDataset, found: features.Features):
    fc1 = features.extract(random_predictor(VGG), dataset, "fc1")
    np.testing.assert_array_equal(found.arrays["train"], fc1.arrays["train"])
    assert found.arrays["train"].shape == (22, 8)
    assert found.layer == "fc1"
    shallow = Config(model=ModelConfig(name="vgg", blocks=((4,),), dense=()))
    assert features.extract(random_predictor(shallow), dataset, "").layer == "block1/pool"


def test_features_are_float32_whatever_the_network_computes_in(dataset: ImageDataset):
    model = ModelConfig(name="vgg", blocks=((4,),), dense=(8,), dtype="bfloat16")
    found = features.extract(random_predictor(Config(model=model)), dataset, "fc1")
    assert found.arrays["train"].dtype == np.float32


def test_an_unknown_layer_names_the_nearest(dataset: ImageDataset):
    with pytest.raises(UserError, match=r"no layer fc2 \(did you mean fc1\?\)"):
        features.extract(random_predictor(VGG), dataset, "fc2")


def test_the_file_holds_labels_classes_and_hash(
    dataset: ImageDataset, found: features.Features, tmp_path: Path
):
    found.save(tmp_path / "new/fc1.npz")
    with np.load(tmp_path / "new/fc1.npz") as arrays:
        for part, split in dataset.parts.items():
            np.testing.assert_array_equal(arrays[f"{part}_features"], found.arrays[part])
            np.testing.assert_array_equal(arrays[f"{part}_labels"], split.labels)
        assert arrays["class_names"].tolist() == ["red", "green", "blue"]
        assert str(arrays["params_sha256"]) == trees.sha256(
            random_predictor(VGG).variables["params"]
        )
        assert str(arrays["layer"]) == found.layer


def separable(n_test_wrong: int) -> features.Features:
    """Returns three clusters far apart, with `n_test_wrong` wrong test labels."""
    rng = np.random.default_rng(0)
    labels = {part: np.arange(n, dtype=np.int32) % 3 for part, n in (("train", 60), ("test", 30))}
    arrays = {
        part: (10 * np.eye(3)[y] + rng.normal(size=(len(y), 3))).astype(np.float32)
        for part, y in labels.items()
    }
    labels["test"][:n_test_wrong] = (labels["test"][:n_test_wrong] + 1) % 3
    return features.Features("fc1", arrays, labels, ("a", "b", "c"), "0")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_fitted_on_train_alone(name: str):
    """Wrong test labels lower the test accuracy and change nothing else."""
    right, wrong = (
        features.classify(separable(0), name, 0),
        features.classify(separable(6), name, 0),
    )
    assert right["test_accuracy"] == 1.0
    assert wrong["test_accuracy"] == 0.8
    for result in (right, wrong):
        assert result["cross_validation_accuracy"] == 1.0
        assert result["settings"] == right["settings"]
        json.dumps(result)


def test_settings_are_chosen_by_cross_validation():
    """Labels are random, but equal within clusters of 4: 1 neighbour finds them, 45 do not."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(50, 4)), 4, axis=0)
    x = (centres + 1e-3 * rng.normal(size=centres.shape)).astype(np.float32)
    y = np.repeat(rng.integers(0, 2, 50), 4).astype(np.int32)
    arrays, labels = {"train": x, "test": x}, {"train": y, "test": y}
    twins = features.Features("fc1", arrays, labels, ("a", "b"), "")
    result = features.classify(twins, "knn", 0)
    assert result["settings"]["n_neighbors"] == 1
    assert result["cross_validation_accuracy"] > 0.95
    assert result["folds"] == 5


@pytest.mark.parametrize("name", classifiers.LINEAR)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_linear_classifier_is_a_dense_layer(name: str, n_classes: int):
    """On features of different means and scales, of which one is constant."""
    rng = np.random.default_rng(0)
    y = np.arange(60, dtype=np.int32) % n_classes
    x = np.eye(n_classes)[y] @ rng.normal(size=(n_classes, 5)) + rng.normal(size=(60, 5))
    x = np.float32(x * [1, 10, 100, 0.01, 0] + [0, 5, -70, 1, 3])
    fitted = classifiers.fit(name, x, y, seed=0)
    kernel, bias = classifiers.linear_head(fitted.estimator)
    logits = x @ kernel + bias
    np.testing.assert_array_equal(fitted(x), logits)
    decided = fitted.estimator.decision_function(x)
    shown = logits if n_classes > 2 else logits[:, 1] - logits[:, 0]
    np.testing.assert_allclose(shown, decided, rtol=1e-3, atol=1e-4)
    if name == "logistic":
        probabilities = fitted.estimator.predict_proba(x)
        np.testing.assert_allclose(metrics.softmax(logits), probabilities, atol=1e-4)
    # What was said of each example without it, so that it tells how sure one may be.
    assert np.mean(fitted.outputs.argmax(axis=1) == y) == pytest.approx(fitted.accuracy)
    assert np.all(np.any(fitted.outputs != logits, axis=1))


class Given:
    """A classifier whose accuracy is that of its settings."""

    def __init__(self, settings: dict) -> None:
        self.accuracy = settings["C"]

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Given":
        return self

    def __getitem__(self, index: int) -> None: ...

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        wrong = np.arange(len(x)) >= self.accuracy * len(x)
        return np.eye(2)[wrong.astype(int)]


@pytest.mark.parametrize("name", ["svm", "knn"])
def test_strengths_are_tried_until_two_are_worse(name: str, monkeypatch: pytest.MonkeyPatch):
    grid = [{"C": c} for c in (0.5, 0.8, 0.7, 0.8, 0.9, 0.6, 0.8, 1.0)]
    monkeypatch.setattr(classifiers, "_candidates", lambda *_: (Given, grid))
    said: list[str] = []
    y = np.repeat([0, 1], [50, 10]).astype(np.int32)
    monkeypatch.setattr(Given, "predict_proba", lambda self, x: given(self.accuracy, x))

    def given(accuracy: float, x: np.ndarray) -> np.ndarray:
        right = np.arange(len(x)) < accuracy * len(x)
        return np.eye(2)[np.where(right, x[:, 0], 1 - x[:, 0]).astype(int)]

    fitted = classifiers.fit(name, np.float32(y)[:, None], y, 0, said.append)
    assert fitted.settings == {"C": 0.9 if name == "svm" else 1.0}
    assert len(said) == (7 if name == "svm" else 8)
    assert said[0].startswith(f"{name}, C=0.5: cross-validation 50.00% (")


@pytest.fixture(scope="module")
def photographed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on digits, and the scan of a zero."""
    folder = tmp_path_factory.mktemp("photographed")
    finish(*SMALL, "--workdir=run", cwd=folder)
    scan = np.uint8(load_digits().images[0] * (255 / 16))
    Image.fromarray(scan).resize((40, 40)).save(folder / "0.png")
    return folder


@pytest.mark.slow
def test_a_linear_classifier_is_saved_as_a_run(photographed: Path):
    arguments = ("--mode=features", "--classifier=logistic", "--workdir=run")
    printed = finish(*arguments, cwd=photographed).stdout
    saved = "--workdir=run/features/fc1-logistic"
    assert f"--mode=predict {saved} PHOTO..." in printed
    folder = photographed / "run/features/fc1-logistic"
    found, summary = (
        json.loads((folder / name).read_text()) for name in ("classifier.json", "summary.json")
    )
    assert summary["test_accuracy"] == found["test_accuracy"]
    assert summary["temperature"] != 1.0
    evaluated = finish("--mode=evaluate", saved, cwd=photographed).stdout
    assert f"step 0: test accuracy {found['test_accuracy']:.2%}" in evaluated
    assert f"temperature {summary['temperature']:.2f}" in evaluated
    finish("--mode=predict", saved, "0.png", cwd=photographed)
    assert (folder / "report.html").exists()
    assert "is finished" in finish(saved, f"--config={folder}/config.json", cwd=photographed).stdout
    assert "--mode=features" in refuse("--mode=verify", saved, cwd=photographed)
    finish(*arguments, cwd=photographed)  # A second time.


@pytest.mark.slow
def test_other_classifiers_serve_predict_alone(photographed: Path):
    """And so does a linear one of a layer that the head does not read."""
    for name, layer in (("knn", "fc1"), ("logistic", "block1")):
        flags = (f"--classifier={name}", f"--layer={layer}", "--workdir=run")
        printed = finish("--mode=features", *flags, cwd=photographed).stdout
        assert f"only --mode=predict can use {name} on {layer}" in printed
        saved = f"--workdir=run/features/{layer}-{name}"
        predicted = finish("--mode=predict", saved, "0.png", cwd=photographed).stdout
        assert predicted.startswith("0.png: 0 (")
        for mode in ("evaluate", "export"):
            line = refuse(f"--mode={mode}", saved, cwd=photographed)
            assert line.endswith(
                "classifier (classifier.joblib), which only --mode=predict can use"
            )
    (photographed / "run/features/fc1-knn/classifier.joblib").write_bytes(b"damaged")
    line = refuse("--mode=predict", "--workdir=run/features/fc1-knn", "0.png", cwd=photographed)
    assert line.startswith("the classifier in run/features/fc1-knn can't be read: ")


def test_one_image_of_a_class_is_too_few():
    few = separable(0)
    y = few.labels["train"]
    kept = np.flatnonzero((y != 2) | (np.arange(60) == 2))
    few.arrays["train"], few.labels["train"] = few.arrays["train"][kept], y[kept]
    with pytest.raises(UserError, match="two training images of every class"):
        features.classify(few, "knn", 0)


@pytest.mark.slow
def test_a_classifier_is_compared_with_the_network(tmp_path: Path):
    finish(*SMALL, "--workdir=run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    arguments = ("--mode=features", "--classifier=logistic")
    printed = finish(*arguments, "--workdir=run", cwd=tmp_path).stdout
    assert f"the network itself: {summary['test_accuracy']:.2%}" in printed
    found = json.loads((tmp_path / "run/features/fc1-logistic/classifier.json").read_text())
    assert f"test accuracy {found['test_accuracy']:.2%}" in printed
    assert found["network_test_accuracy"] == summary["test_accuracy"]
    assert found["params_sha256"] == summary["params_sha256"]
    finish("--mode=evaluate", "--workdir=run", cwd=tmp_path)  # The features are no other config.
    assert "fc9" in refuse("--mode=features", "--workdir=run", "--layer=fc9", cwd=tmp_path)


@pytest.mark.slow
def test_a_pretrained_network_gives_features_before_it_is_trained(tmp_path: Path):
    finish(*SMALL, "--workdir=run", cwd=tmp_path)
    new = ("--config=finetune_head", "--init.checkpoint=run", "--data.name=digits")
    new = (*new, "--data.classes=3,5", "--workdir=new")
    arguments = ("--mode=features", "--classifier=logistic", "--layer=block1/conv1")
    printed = finish(*new, *arguments, cwd=tmp_path).stdout
    assert "block1/conv1: train" in printed
    assert "no head for these classes" in printed
    with np.load(tmp_path / "new/features/block1.conv1.npz") as arrays:
        assert arrays["class_names"].tolist() == ["3", "5"]
    printed = finish(*new, cwd=tmp_path).stdout
    assert "loaded 4 parameter arrays from run; 2 are initialised at random" in printed
