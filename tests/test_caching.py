"""Training on what frozen layers make of each image, computed once, gives the same result."""

from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import edit, lines, quiet, run

from cnn_jax import evaluate, layers, loop, models, train, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset

HEAD = (("head/.*", 1.0), (".*", None))
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def frozen(config: Config, groups, cache: bool) -> Config:
    return edit(config, optim={"groups": groups}, train={"cache_frozen": cache})


@pytest.mark.parametrize("trained", ["head", "(head|fc1)", "(head|fc1|block2/conv1)"])
def test_cached_training_gives_the_same_result(tiny: Config, dataset: ImageDataset, trained: str):
    groups = ((f"{trained}/.*", 1.0), (".*", None))
    plain, plain_losses = run(loop.Trainer(frozen(tiny, groups, False), dataset), 6)
    cached, cached_losses = run(loop.Trainer(frozen(tiny, groups, True), dataset), 6)
    np.testing.assert_allclose(cached_losses, plain_losses, rtol=1e-5)
    expected = trees.named_leaves(plain)
    for name, leaf in trees.named_leaves(cached).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(trees.named_leaves(cached)) == set(expected)


def test_the_frozen_layers_are_not_in_the_compiled_step(
    tiny: Config, dataset: ImageDataset, monkeypatch
):
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    compiled = {}
    for cache in (False, True):
        trainer = loop.Trainer(frozen(tiny, HEAD, cache), dataset)
        trainer.compile(trainer.init())
        compiled[cache] = trainer.compiled.as_text().count(" convolution(")
    assert compiled[False] >= 2
    assert compiled[True] == 0


def test_a_cached_run_is_compiled_once_resumes_and_evaluates_as_any_other(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    compiled = []
    original = loop.Trainer.compile
    monkeypatch.setattr(
        loop.Trainer, "compile", lambda *args: (compiled.append(1), original(*args))[1]
    )
    trainer = loop.Trainer(frozen(tiny, HEAD, True), dataset)
    state, _ = loop.fit(trainer, workdir, quiet(workdir))
    assert compiled == [1]
    again, _ = loop.fit(loop.Trainer(frozen(tiny, HEAD, True), dataset), workdir, quiet(workdir))
    assert trees.sha256(state) == trees.sha256(again)
    assert "validation_accuracy" in lines(workdir)[-1]


class Bypassing(models.Classifier):
    """The head's logits, and beside them a way around the head."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        return self.classify(images, train) + jnp.mean(images, axis=(1, 2))


def test_a_way_around_the_cached_layer_is_not_silent(tiny: Config, dataset: ImageDataset):
    recipe = train.make_recipe(frozen(tiny, HEAD, False), 3, 3)
    recipe = replace(
        recipe,
        model=Bypassing(n_classes=3, dense=(8,)),
        cache=models.LayerCache("head", (8, 8, 3)),
    )
    state = train.init_state(recipe, jax.random.key(0), (8, 8, 3))
    batch = train.Batch(jnp.ones((4, 8)), jnp.zeros(4, jnp.int32), jnp.ones(4))
    _, sums, _ = train.train_step(recipe, state, batch, jax.random.key(0))
    assert np.isnan(sums.loss)


def test_layer_inputs_are_past_the_activation_and_continue_to_the_logits(dataset: ImageDataset):
    model = models.VGG(n_classes=3, dense=(8,), blocks=((4,),), dropout=0.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    images = dataset.test.images
    head = evaluate.layer_inputs(model, variables, images, "head", **UNIT)
    assert head.shape == (10, 8)
    assert head.min() == 0
    params = variables["params"]["head"]
    expected = evaluate.logits(model, variables, images, **UNIT, test_time="none")
    np.testing.assert_allclose(
        head @ params["kernel"] + np.asarray(params["bias"])[None], expected, atol=1e-5
    )
    pool = evaluate.layer_inputs(model, variables, images, "block1/pool", **UNIT)
    assert pool.shape == (10, 8, 8, 4)
    assert pool.min() == 0
