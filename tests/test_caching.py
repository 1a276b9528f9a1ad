"""Training on the cached outputs of frozen layers gives the same result as on the images."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.results import lines
from helpers.training import HEAD, edit, fit, keys, run

from cnn_jax import fit as fitting
from cnn_jax import kernels, trees
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.fit import compile_segment
from cnn_jax.step import Batch, Setup, init_state, train_segment, train_step

RESNET = ModelConfig(name="resnet_small", blocks=((4,), (6, 6)), dense=())


def frozen(config: Config, groups, cache: bool) -> Config:
    return edit(config, optim={"groups": groups}, train={"cache_frozen": cache})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "trained"),
    [
        ("vgg", "head"),
        ("vgg", "(head|fc1)"),
        ("vgg", "(head|fc1|block2/conv1)"),
        ("resnet_small", "(head|stage2)"),
        ("resnet_small", "(head|stage2/block2|stage2/block1/conv2)"),
    ],
)
def test_cached_training_gives_the_same_result(
    tiny: Config, dataset: ImageDataset, network: str, trained: str
):
    """With (head|...|stage2/block1/conv2) trained, the block's shortcut still reads stage1."""
    config = tiny if network == "vgg" else replace(tiny, model=RESNET)
    groups = ((f"{trained}/.*", 1.0), (".*", None))
    plain, plain_losses = run(frozen(config, groups, False), dataset, 6)
    cached, cached_losses = run(frozen(config, groups, True), dataset, 6)
    np.testing.assert_allclose(cached_losses, plain_losses, rtol=1e-5)
    expected = trees.named_leaves(plain)
    for name, leaf in trees.named_leaves(cached).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(trees.named_leaves(cached)) == set(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "trained", "convolutions"),
    [("vgg", "head", 0), ("resnet_small", "head", 0), ("resnet_small", "(head|stage2/block2)", 5)],
)
def test_the_frozen_layers_are_not_in_the_compiled_step(
    tiny: Config,
    dataset: ImageDataset,
    network: str,
    trained: str,
    convolutions: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """A block has two convolutions, two for gradients of their kernels, one for that of conv2."""
    config = tiny if network == "vgg" else replace(tiny, model=RESNET)
    groups = ((f"{trained}/.*", 1.0), (".*", None))
    programs = []

    def lower(*args):
        lowered = train_segment.lower(*args)
        programs.append(lowered.compile().as_text())
        return lowered

    monkeypatch.setattr(fitting, "train_segment", SimpleNamespace(lower=lower))
    with kernels.use("xla"):
        for cache in (False, True):
            settings = frozen(config, groups, cache)
            setup, (init_key, key) = Setup.of(settings, dataset), keys(settings)
            compile_segment(settings, setup, dataset, init_state(setup, init_key), key)
    plain, cached = (program.count(" convolution(") for program in programs)
    assert plain >= cached + 2
    assert cached == convolutions


def test_a_cached_run_is_compiled_once_resumes_and_evaluates_as_any_other(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = []
    monkeypatch.setattr(
        fitting, "compile_segment", lambda *args: (compiled.append(1), compile_segment(*args))[1]
    )
    state = fit(frozen(tiny, HEAD, True), dataset, workdir).state
    assert compiled == [1]
    again = fit(frozen(tiny, HEAD, True), dataset, workdir).state
    assert trees.sha256(state) == trees.sha256(again)
    assert "validation_accuracy" in lines(workdir)[-1]


BYPASSING = """
import flax.linen as nn

class Bypassing(nn.Module):
    config: object
    n_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8, name="fc1")(images.reshape((len(images), -1)))
        return nn.Dense(self.n_classes, name="head")(x) + images.mean((1, 2))
"""


@pytest.mark.slow
def test_a_way_around_the_cached_layer_is_refused_and_not_silent(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    """The logits of the head, and beside them a path from the images around it."""
    (tmp_path / "own.py").write_text(BYPASSING)
    own = ModelConfig(name=f"{tmp_path}/own.py:Bypassing")
    config = frozen(replace(tiny, model=own), HEAD, True)
    setup, (init_key, key) = Setup.of(config, dataset), keys(config)
    state = init_state(setup, init_key)
    with pytest.raises(UserError, match="no frozen layer whose output is all that the"):
        compile_segment(config, setup, dataset, state, key)
    batch = Batch(jnp.ones((4, 8)), jnp.zeros(4, jnp.int32), jnp.ones(4))
    _, sums, _ = train_step(replace(setup, cached="fc1"), state, batch, jax.random.key(0))
    assert np.isnan(sums.loss)
