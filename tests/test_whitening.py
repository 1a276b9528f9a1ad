"""Whitening filters against what they are for, and where they are refused."""

from dataclasses import replace

import numpy as np
import pytest
from test_train import edit, quiet

from cnn_jax import loop, models, trees, whitening
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError

SEEN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
# Smooth in one direction, so that the moments have large and small eigenvalues.
NOISE = np.random.default_rng(0).integers(0, 200, (150, 6, 5, 3))
IMAGES = (NOISE + np.roll(NOISE, 1, axis=2)).clip(0, 255).astype(np.uint8)


def test_outputs_are_uncorrelated_and_of_variance_one_but_for_epsilon():
    filters = whitening.whitening_filters(IMAGES, (2, 3), **SEEN)
    assert filters.shape == (2, 3, 3, 18)
    x = (IMAGES / 255 - SEEN["mean"]) / SEEN["std"]
    parts = [x[:, i : i + 5, j : j + 3] for i in range(2) for j in range(3)]
    patches = np.concatenate(parts, axis=-1).reshape(-1, 18)
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    outputs = patches @ filters.reshape(18, 18)
    expected = np.diag(values / (values + 5e-4))
    np.testing.assert_allclose(outputs.T @ outputs / len(patches), expected, atol=1e-10)


def test_the_bits_do_not_depend_on_how_many_images_are_read_at_once(monkeypatch):
    whole = whitening.whitening_filters(IMAGES, (2, 2), **SEEN)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    np.testing.assert_array_equal(whitening.whitening_filters(IMAGES, (2, 2), **SEEN), whole)


def test_the_first_filters_are_replaced_and_all_else_is_as_the_seed_drew_it(
    tiny: Config, dataset: ImageDataset, workdir
):
    """A 3x3 convolution of colour images has 27 numbers a patch, so 54 of 60 filters."""
    plain = loop.Trainer(edit(tiny, model={"blocks": ((60,), (4,))}), dataset)
    whitened = loop.Trainer(replace(plain.config, init=init("block1/conv1")), dataset)
    before = trees.named_leaves(plain.start(quiet(workdir)).params)
    after = trees.named_leaves(whitened.start(quiet(workdir)).params)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["block1/conv1/kernel"]
    kernel = after["block1/conv1/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[..., 54:], before["block1/conv1/kernel"][..., 54:])
    filters = whitening.whitening_filters(
        dataset.train.images, (3, 3), plain.config.data.mean, plain.config.data.std
    )
    np.testing.assert_array_equal(kernel[..., :27], filters.astype(np.float32))
    np.testing.assert_array_equal(kernel[..., 27:54], -filters.astype(np.float32))


def init(layer: str):
    return replace(Config().init, whiten=layer)


def test_only_the_first_images_count(monkeypatch):
    monkeypatch.setattr(whitening, "_IMAGES", 50)
    model = models.build(ModelConfig(name="vgg", blocks=((60,),)), 3)
    params = {"block1": {"conv1": {"kernel": np.zeros((3, 3, 3, 60), np.float32)}}}
    few = whitening.whiten(model, params, "block1/conv1", IMAGES[:50], **SEEN)
    many = whitening.whiten(model, params, "block1/conv1", IMAGES, **SEEN)
    assert trees.sha256(few) == trees.sha256(many)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block2/conv1", "init.whiten=block2/conv1 is not the first layer of this network, block1"),
        ("block1/conv1", "it has 4 filters, and to whiten patches of 3 x 3 x 3 takes 54"),
    ],
)
def test_what_does_not_fit_is_refused(layer: str, message: str):
    model = models.build(ModelConfig(name="vgg", blocks=((4,), (4,))), 3)
    params = {"block1": {"conv1": {"kernel": np.zeros((3, 3, 3, 4), np.float32)}}}
    with pytest.raises(UserError, match=message):
        whitening.whiten(model, params, layer, IMAGES, **SEEN)
