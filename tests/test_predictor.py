"""Prediction: no image lost to padding, preprocessing applied, and outputs of named modules."""

import numpy as np
import pytest
from helpers.data import noise
from helpers.predictors import random_predictor
from helpers.training import edit

from cnn_jax import augment, predictor
from cnn_jax.config import Config, ModelConfig
from cnn_jax.errors import UserError

VGG = Config(model=ModelConfig(name="vgg", blocks=((4,),), dense=(8,)))
RESNET = Config(model=ModelConfig(name="resnet_small", blocks=((4, 4), (6,)), dense=()))
IMAGES = noise(11, 8, 8, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 250])
def test_padding_a_batch_changes_no_logit(monkeypatch: pytest.MonkeyPatch, batch_size: int):
    monkeypatch.setattr(predictor, "BATCH_SIZE", batch_size)
    trained = random_predictor(VGG)
    normal = augment.normalize(IMAGES, VGG.data.normalize)
    found = trained.logits(IMAGES)
    assert found.shape == (11, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, trained.model.apply(trained.variables, normal), atol=1e-6)


@pytest.mark.parametrize(("side", "most"), [(8, 250), (32, 250), (224, 32), (512, 6), (1500, 1)])
def test_the_images_at_once_fit_a_device(monkeypatch: pytest.MonkeyPatch, side: int, most: int):
    """Whatever their number: as many pixels as 32 images of 224x224 have, or one image."""
    seen = []

    def logits(model, variables, images, **_) -> np.ndarray:
        seen.append(images.shape)
        return np.zeros((len(images), 3), np.float32)

    monkeypatch.setattr(predictor, "_logits", logits)
    images = np.broadcast_to(np.zeros((side, side, 3), np.uint8), (2 * most + 1, side, side, 3))
    assert random_predictor(VGG).logits(images).shape == (2 * most + 1, 3)
    assert seen == [(most, side, side, 3)] * 3


def test_logits_depend_on_the_normalisation():
    trained = random_predictor(VGG)
    normalize = ((0.5, 0.25, 0.125), (0.2, 0.3, 0.4))
    moved = random_predictor(edit(VGG, data={"normalize": normalize}))
    normal = (IMAGES / 255 - np.array(normalize[0])) / np.array(normalize[1])
    expected = moved.model.apply(moved.variables, normal.astype(np.float32))
    np.testing.assert_allclose(moved.logits(IMAGES), expected, atol=1e-5)
    assert not np.allclose(moved.logits(IMAGES), trained.logits(IMAGES), atol=1e-3)


def test_probabilities_are_the_softmax_of_the_logits():
    trained = random_predictor(VGG)
    logits = np.exp(trained.logits(IMAGES).astype(np.float64))
    expected = logits / logits.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(trained.probabilities(IMAGES), expected, rtol=1e-9)


def test_logits_at_test_time_are_the_weighted_mean_over_views():
    trained = random_predictor(VGG)

    def plain(images: np.ndarray) -> np.ndarray:
        return trained.logits(images, "none")

    def both(images: np.ndarray) -> np.ndarray:
        return (plain(images) + plain(images[:, :, ::-1])) / 2

    padded = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = (both(padded[:, :8, :8]) + both(padded[:, 2:, 2:])) / 2
    for test_time, expected in (
        ("mirror", both(IMAGES)),
        ("mirror_translate", (both(IMAGES) + moved) / 2),
    ):
        found = trained.logits(IMAGES, test_time)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert not np.allclose(found, plain(IMAGES), atol=1e-4)
        of_config = random_predictor(edit(VGG, augment={"test_time": test_time}))
        np.testing.assert_array_equal(of_config.logits(IMAGES), found)


def test_activations_are_what_modules_return_in_a_network_that_branches(
    monkeypatch: pytest.MonkeyPatch,
):
    """A block returns the sum of both branches, past its activation; the next layer reads that."""
    monkeypatch.setattr(predictor, "BATCH_SIZE", 4)
    trained = random_predictor(RESNET)
    block, pool = "stage2/block1", "pool"
    names = [f"{block}/norm2", f"{block}/shortcut_norm", block, "stage2", pool, "head"]
    found = trained.activations(IMAGES, names)
    assert list(found) == names
    branches = found[f"{block}/norm2"] + found[f"{block}/shortcut_norm"]
    np.testing.assert_allclose(found[block], np.maximum(branches, 0), atol=1e-6)
    np.testing.assert_array_equal(found["stage2"], found[block])
    np.testing.assert_allclose(found[pool], found[block].mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["head"], trained.logits(IMAGES), atol=1e-6)
    assert len(found[block]) == 11


def test_a_layer_returns_what_follows_its_activation():
    found = random_predictor(VGG).activations(IMAGES, ["block1/conv1", "fc1"])
    assert found["block1/conv1"].shape == (11, 8, 8, 4)
    assert found["fc1"].shape == (11, 8)
    assert all(values.min() == 0 for values in found.values())


def test_an_unknown_module_is_one_line_with_the_nearest():
    with pytest.raises(UserError, match=r"block1/conv2.*did you mean block1/conv1\?"):
        random_predictor(VGG).activations(IMAGES, ["block1/conv2"])


def test_the_kernels_are_those_of_the_config():
    """They round differently, so the same images give logits that are close and not equal."""
    config = edit(VGG, model={"blocks": ((16, 16),)})
    found = {
        kernels: random_predictor(edit(config, runtime={"kernels": kernels})).logits(IMAGES)
        for kernels in ("cpu", "xla")
    }
    np.testing.assert_allclose(found["cpu"], found["xla"], atol=1e-5)
    assert not np.array_equal(found["cpu"], found["xla"])
