"""Whitening filters: their definition, which filters they replace, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from helpers.training import edit, initial, keys, leaves, quiet

from cnn_jax import models, trees
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.fit import start
from cnn_jax.models import whitening
from cnn_jax.runs.folder import RunFolder
from cnn_jax.step import Setup

NORMALIZE = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
# Smooth in one direction, so that the moments have large and small eigenvalues.
NOISE = np.random.default_rng(0).integers(0, 200, (150, 6, 5, 3))
IMAGES = (NOISE + np.roll(NOISE, 1, axis=2)).clip(0, 255).astype(np.uint8)


def test_outputs_are_uncorrelated_and_of_variance_one_but_for_epsilon():
    filters = whitening.whitening_filters(IMAGES, (2, 3), NORMALIZE)
    assert filters.shape == (2, 3, 3, 18)
    x = (IMAGES / 255 - np.array(NORMALIZE[0])) / np.array(NORMALIZE[1])
    parts = [x[:, i : i + 5, j : j + 3] for i in range(2) for j in range(3)]
    patches = np.concatenate(parts, axis=-1).reshape(-1, 18)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    outputs = patches @ filters.reshape(18, 18)
    expected = np.diag(values / (values + 5e-4))
    np.testing.assert_allclose(outputs.T @ outputs / len(patches), expected, atol=1e-10)


def test_the_bits_do_not_depend_on_how_many_images_are_read_at_once(monkeypatch):
    whole = whitening.whitening_filters(IMAGES, (2, 2), NORMALIZE)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    np.testing.assert_array_equal(whitening.whitening_filters(IMAGES, (2, 2), NORMALIZE), whole)


def test_the_first_filters_are_replaced_and_all_else_is_as_the_seed_drew_it(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    """A 3x3 convolution of colour images has 27 numbers a patch, so 54 of 60 filters."""
    plain = edit(tiny, model={"blocks": ((60,), (4,))})
    whitened = edit(plain, init={"whiten": "block1/conv1"})
    before = leaves(initial(plain, dataset).params)
    setup, run = Setup.of(whitened, dataset), RunFolder(workdir, quiet)
    after = leaves(start(whitened, setup, dataset, run, keys(whitened)[0]).params)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["block1/conv1/kernel"]
    kernel = after["block1/conv1/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[..., 54:], before["block1/conv1/kernel"][..., 54:])
    filters = whitening.whitening_filters(dataset.train.images, (3, 3), plain.data.normalize)
    np.testing.assert_array_equal(kernel[..., :27], filters.astype(np.float32))
    np.testing.assert_array_equal(kernel[..., 27:54], -filters.astype(np.float32))


def test_only_the_first_images_count(monkeypatch):
    monkeypatch.setattr(whitening, "IMAGES", 50)
    model = models.build(ModelConfig(name="vgg", blocks=((60,),)), 3)
    params = {"block1": {"conv1": {"kernel": np.zeros((3, 3, 3, 60), np.float32)}}}
    few = whitening.whiten(model, params, "block1/conv1", IMAGES[:50], NORMALIZE)
    many = whitening.whiten(model, params, "block1/conv1", IMAGES, NORMALIZE)
    assert trees.sha256(few) == trees.sha256(many)


VGG = ModelConfig(name="vgg", blocks=((4,), (4,)))
RESNET = ModelConfig(name="resnet_small", blocks=((54, 54), (8,)), dense=())


@pytest.mark.parametrize(
    ("config", "layer", "message"),
    [
        (
            VGG,
            "block2/conv1",
            "init.whiten=block2/conv1 must be the first layer and a convolution; the first layer "
            "is block1/conv1",
        ),
        (
            VGG,
            "block1/conv1",
            "init.whiten=block1/conv1: whitening patches of 3 x 3 x 3 takes 54 filters, and the "
            "layer has 4",
        ),
        (
            RESNET,
            "stem_norm",
            "init.whiten=stem_norm must be the first layer and a convolution; the first layer is "
            "stem",
        ),
    ],
)
def test_a_layer_that_can_not_be_whitened_is_refused(config: ModelConfig, layer: str, message: str):
    model = models.build(config, 3)
    params = {"block1": {"conv1": {"kernel": np.zeros((3, 3, 3, 4), np.float32)}}}
    with pytest.raises(UserError) as caught:
        whitening.whiten(model, params, layer, IMAGES, NORMALIZE)
    assert str(caught.value) == message


def test_the_first_convolution_of_a_branching_network_is_whitened():
    model = models.build(RESNET, 3)
    params = {"stem": {"kernel": np.zeros((3, 3, 3, 54), np.float32)}}
    whitened = whitening.whiten(model, params, "stem", IMAGES, NORMALIZE)
    filters = whitening.whitening_filters(IMAGES, (3, 3), NORMALIZE).astype(np.float32)
    np.testing.assert_array_equal(whitened["stem"]["kernel"][..., :27], filters)
