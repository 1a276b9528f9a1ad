"""Activations written to disk, and scikit-learn's classifiers on them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_main import SMALL, command, mistake

from cnn_jax import augment, features, models, trees
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
MODEL = models.VGG(n_classes=3, dense=(8,), blocks=((4,),), dropout=0.5)
VARIABLES = MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
CLASSIFIERS = ["svm", "random_forest", "mlp", "logistic", "knn"]


@pytest.fixture
def found(dataset: ImageDataset) -> features.Features:
    return features.extract(MODEL, VARIABLES, dataset, "", **UNIT)


def test_any_layer_of_every_part_is_taken(dataset: ImageDataset):
    """By hand: the convolution past its ReLU, the dense layer before dropout, and the logits."""
    images = augment.normalize(dataset.test.images, **UNIT)
    p = VARIABLES["params"]
    conv = jax.lax.conv_general_dilated(
        images,
        p["block1"]["conv1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = np.maximum(conv + p["block1"]["conv1"]["bias"].reshape(1, 1, 1, 4), 0)
    expected = {"block1/conv1": x, "block1/pool": x.reshape(10, 4, 2, 4, 2, 4).max((2, 4))}
    flat = expected["block1/pool"].reshape(10, -1)
    expected["fc1"] = np.maximum(flat @ p["fc1"]["kernel"] + p["fc1"]["bias"][None], 0)
    expected["dropout1"] = expected["fc1"]
    expected["head"] = expected["fc1"] @ p["head"]["kernel"] + p["head"]["bias"][None]
    for layer, values in expected.items():
        taken = features.extract(MODEL, VARIABLES, dataset, layer, **UNIT)
        assert {part: len(a) for part, a in taken.arrays.items()} == dataset.counts
        np.testing.assert_allclose(
            taken.arrays["test"], values.reshape(10, -1), atol=1e-5, err_msg=layer
        )


def test_the_default_is_the_penultimate_layer(dataset: ImageDataset, found: features.Features):
    fc1 = features.extract(MODEL, VARIABLES, dataset, "fc1", **UNIT)
    np.testing.assert_array_equal(found.arrays["train"], fc1.arrays["train"])
    assert found.arrays["train"].shape == (22, 8)
    assert found.layer == "fc1"  # not the dropout after it, which says nothing in evaluation
    shallow = models.VGG(n_classes=3, dense=(), blocks=((4,),))
    variables = shallow.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert features.extract(shallow, variables, dataset, "", **UNIT).layer == "block1/pool"


def test_an_unknown_layer_names_the_nearest(dataset: ImageDataset):
    with pytest.raises(UserError, match=r"=fc2: no such layer \(did you mean fc1\?\)"):
        features.extract(MODEL, VARIABLES, dataset, "fc2", **UNIT)


def test_the_file_holds_labels_classes_and_hash(
    dataset: ImageDataset, found: features.Features, tmp_path: Path
):
    found.save(tmp_path / "new/fc1.npz")
    with np.load(tmp_path / "new/fc1.npz") as arrays:
        for part, split in dataset.parts.items():
            np.testing.assert_array_equal(arrays[f"{part}_features"], found.arrays[part])
            np.testing.assert_array_equal(arrays[f"{part}_labels"], split.labels)
        assert arrays["class_names"].tolist() == ["red", "green", "blue"]
        assert str(arrays["params_sha256"]) == trees.sha256(VARIABLES["params"])
        assert str(arrays["layer"]) == found.layer


def separable(n_test_wrong: int) -> features.Features:
    """Three clusters far apart; so many test labels are wrong."""
    rng = np.random.default_rng(0)
    labels = {part: np.arange(n, dtype=np.int32) % 3 for part, n in (("train", 60), ("test", 30))}
    arrays = {
        part: (10 * np.eye(3)[y] + rng.normal(size=(len(y), 3))).astype(np.float32)
        for part, y in labels.items()
    }
    labels["test"][:n_test_wrong] = (labels["test"][:n_test_wrong] + 1) % 3
    return features.Features("fc1", arrays, labels, ("a", "b", "c"), "0")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_learns_on_train_alone(name: str):
    """Test labels that are wrong cost test accuracy and nothing else."""
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
    """Labels that are noise but for pairs of twins: one neighbour finds the twin, 45 do not."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(50, 4)), 4, axis=0)
    x = (centres + 1e-3 * rng.normal(size=centres.shape)).astype(np.float32)
    y = np.repeat(rng.integers(0, 2, 50), 4).astype(np.int32)
    given = features.Features(
        "fc1", {"train": x, "test": x}, {"train": y, "test": y}, ("a", "b"), ""
    )
    result = features.classify(given, "knn", 0)
    assert result["settings"]["n_neighbors"] == 1
    assert result["cross_validation_accuracy"] > 0.95
    assert result["folds"] == 5


def test_one_image_of_a_class_is_too_few():
    given = separable(0)
    y = given.labels["train"]
    few = {"train": np.flatnonzero((y != 2) | (np.arange(60) == 2))}["train"]
    given.arrays["train"], given.labels["train"] = given.arrays["train"][few], y[few]
    with pytest.raises(UserError, match="two training images of every class"):
        features.classify(given, "knn", 0)


def test_the_mode_reports_beside_the_network_and_uses_a_pretrained_one(tmp_path: Path):
    assert command(*SMALL, "--workdir=run", cwd=tmp_path).returncode == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    arguments = ("--mode=features", "--set=features.classifier=logistic")
    result = command(*arguments, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"the network itself: {summary['test_accuracy']:.2%}" in result.stdout
    found = json.loads((tmp_path / "run/features/fc1-logistic.json").read_text())
    assert f"test accuracy {found['test_accuracy']:.2%}" in result.stdout
    assert found["network_test_accuracy"] == summary["test_accuracy"]
    assert found["params_sha256"] == summary["params_sha256"]
    again = command("--mode=evaluate", "--workdir=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    new = ("--config=finetune_head", "--set=init.checkpoint=run", "--set=data.name=digits")
    new = (*new, "--set=data.classes=3,5", "--workdir=new")
    result = command(*new, *arguments, "--set=features.layer=block1/conv1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "block1/conv1: train" in result.stdout
    assert "no head for these classes" in result.stdout
    assert (tmp_path / "new/features/block1.conv1.npz").exists()
    trained = command(*new, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "4 arrays from run, 2 from the seed" in trained.stdout
    line = mistake("--mode=features", "--workdir=run", "--set=features.layer=fc9", cwd=tmp_path)
    assert "fc9" in line
