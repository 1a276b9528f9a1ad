"""Muon against an SVD, optax's own and steps computed by hand."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.newton_schulz import orthogonal, polynomial
from helpers.training import edit, fit, fit_until, initial, leaves, no_dropout, quiet, run

from cnn_jax import muon, optim, trees
from cnn_jax.config import Config, OptimConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.runs.folder import RunFolder
from cnn_jax.tools import find_rate

MUON = OptimConfig(name="muon", learning_rate=0.1, muon=(".*kernel", 0.6, 3))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(30, 30), (72, 16), (16, 72)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_only_singular_values_change_and_they_become_one(shape: tuple[int, int], steps: int):
    matrix = normal(*shape)
    found = np.asarray(muon.orthogonalize(jnp.asarray(1e-4 * matrix), steps))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    seen = left.T @ found @ right.T
    np.testing.assert_allclose(seen, np.diag(polynomial(values, steps)), atol=0.03)
    if steps == 5:
        start = values / np.linalg.norm(values)
        within = np.linalg.svd(found, compute_uv=False)[start > 0.003]
        assert within.size > 10
        assert 0.65 < within.min() < within.max() < 1.24


def test_it_is_that_of_optax():
    """optax's momentum differs, so it is left out."""
    axes = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    theirs = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, ns_steps=5, weight_dimension_numbers=[axes]
    )
    kernel = [jnp.asarray(normal(3, 3, 5, 24))]
    expected, _ = theirs.update(kernel, theirs.init(kernel))
    np.testing.assert_allclose(muon.direction(kernel[0], 5), expected[0], atol=0.02)


def test_a_gradient_of_zero_is_a_step_of_zero_and_a_kernel_of_zeros_stays():
    zeros = jnp.zeros((3, 3, 4, 8))
    np.testing.assert_array_equal(muon.direction(zeros, 3), zeros)
    np.testing.assert_array_equal(muon.renormalize(zeros), zeros)


def test_steps_by_hand():
    """Kernels [3, 3, 2, 4] and [2, 8], whose outputs outnumber its inputs, and a bias.

    v = m v + g and the direction of g + m v; decay is decoupled for kernels, and added to the
    gradient of the bias.
    """
    shapes = {"conv": {"kernel": (3, 3, 2, 4)}, "fc": {"kernel": (2, 8), "bias": (8,)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.asarray(normal(*s)), shapes, is_leaf=is_shape)
    config = replace(
        MUON,
        momentum=0.85,
        weight_decay=((".*bias", 0.2), (".*", 0.3)),
        groups=(("fc/.*", 2.0), (".*", 1.0)),
    )
    tx = optim.make_optimizer(config, optim.make_phases(config, lambda: ""))
    state = tx.init(params)
    expected = {name: np.float64(leaf) for name, leaf in leaves(params).items()}
    velocity = dict.fromkeys(expected, 0.0)
    for seed in (1, 2, 3):
        grads = jax.tree.map(
            lambda s, n=seed: jnp.asarray(normal(*s, seed=n)), shapes, is_leaf=is_shape
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, optax.tree.scale(0.1, updates))
        for name, g in leaves(grads).items():
            p, rate = expected[name], 0.2 if name.startswith("fc") else 0.1
            if name.endswith("bias"):
                g = g + 0.2 * p
                velocity[name] = 0.85 * velocity[name] + g
                expected[name] = p - rate * (g + 0.85 * velocity[name])
                continue
            velocity[name] = 0.6 * velocity[name] + g
            matrix = (g + 0.6 * velocity[name]).reshape(-1, g.shape[-1])
            factor = 2.0 if name == "fc/kernel" else 1.0  # sqrt(8 / 2)
            step = factor * orthogonal(matrix, 3).reshape(g.shape)
            expected[name] = p - rate * (step + 0.3 * p)
    for name, leaf in leaves(params).items():
        np.testing.assert_allclose(leaf, expected[name], atol=0.01, err_msg=name)
    np.testing.assert_allclose(leaves(params)["fc/bias"], expected["fc/bias"], rtol=1e-5)


def test_the_scale_of_the_gradient_has_no_effect(tiny: Config, dataset: ImageDataset):
    params = {"kernel": jnp.asarray(normal(6, 4))}
    tx = optim.make_optimizer(MUON)
    small, _ = tx.update(optax.tree.scale(1e-3, params), tx.init(params), params)
    large, _ = tx.update(optax.tree.scale(1e3, params), tx.init(params), params)
    np.testing.assert_allclose(small["kernel"], large["kernel"], rtol=0.02, atol=0.01)


@pytest.mark.slow
def test_kernels_are_renormalised_before_the_step(tiny: Config, dataset: ImageDataset):
    """The gradient is that of the kernels as they were."""
    config = no_dropout(edit(tiny, optim={"name": "sgd"}))
    renormalised = edit(config, optim={"renormalize": "block1/conv1/kernel|fc1/kernel"})
    before = leaves(initial(config, dataset).params)
    plain, found = (leaves(run(c, dataset, 1)[0].params) for c in (config, renormalised))
    for name, leaf in found.items():
        scaled = before[name]
        if name in ("block1/conv1/kernel", "fc1/kernel"):
            scaled = scaled * np.sqrt(scaled.shape[-1]) / np.linalg.norm(scaled)
        np.testing.assert_allclose(leaf - plain[name], scaled - before[name], atol=1e-6)


def test_patterns_must_match_kernels(tiny: Config, dataset: ImageDataset, workdir: Path):
    for settings, message in (
        (
            {"name": "muon", "muon": (".*", 0.9, 5)},
            r"optim.muon: \.\* matches block1/conv1/bias, whi",
        ),
        ({"name": "muon", "muon": ("cov.*", 0.9, 5)}, r"optim.muon: cov\.\* matches no parameter"),
        ({"renormalize": "fc1/.*"}, r"optim.renormalize: fc1/\.\* matches fc1/bias, which is not"),
        ({"renormalize": "fc2/kernel"}, "optim.renormalize: fc2/kernel matches no parameter"),
    ):
        with pytest.raises(UserError, match=message):
            fit(edit(tiny, optim=settings), dataset, workdir)


WITH_FC1 = (("(head|fc1)/.*", 1.0), (".*", None))


def test_frozen_parameters_keep_their_bits_and_have_no_state(tiny: Config, dataset: ImageDataset):
    settings = {"name": "muon", "clip_norm": 0.5, "weight_decay": 0.1, "groups": WITH_FC1}
    config = edit(tiny, optim=settings | {"renormalize": ".*kernel"}, train={"ema_decay": 0.97})
    start = initial(config, dataset)
    before, (state, seen) = leaves(start.params), run(config, dataset, 6)
    arrays = [leaf.size for leaf in jax.tree.leaves(start.opt_state) if leaf.ndim]
    trained = [leaf.size for name, leaf in before.items() if name.startswith(("fc1", "head"))]
    assert sorted(arrays) == sorted(trained)
    assert np.isfinite(seen).all()
    for name, leaf in leaves(state.params).items():
        frozen = not name.startswith(("fc1", "head"))
        assert np.array_equal(leaf, before[name]) == frozen, name


@pytest.mark.slow
def test_accumulation_gives_the_step_of_the_whole_batch(tiny: Config, dataset: ImageDataset):
    config = no_dropout(edit(tiny, optim={"name": "muon", "learning_rate": 0.02}))
    whole, _ = run(config, dataset, 1)
    parts, _ = run(edit(config, train={"accumulate": 4}), dataset, 1)
    for name, leaf in leaves(whole.params).items():
        np.testing.assert_allclose(leaves(parts.params)[name], leaf, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_bits(
    tiny: Config, dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Across the end of one parameter's schedule, with an average."""
    groups = (("fc1/bias", ((0, 3.0), (1, 0.0))), (".*", 1.0))
    settings = {
        "name": "muon",
        "groups": groups,
        "schedule": "linear",
        "renormalize": "block.*kernel",
    }
    config = edit(tiny, optim=settings, train={"ema_decay": 0.9})
    whole = fit(config, dataset, tmp_path / "whole")
    fit_until(2, config, dataset, tmp_path / "parts", monkeypatch)
    fit_until(5, config, dataset, tmp_path / "parts", monkeypatch)
    parts = fit(config, dataset, tmp_path / "parts")
    assert trees.sha256(parts.state) == trees.sha256(whole.state)


def test_find_rate_finds_one(tiny: Config, dataset: ImageDataset, workdir: Path):
    config = edit(tiny, optim={"name": "muon", "renormalize": "block.*kernel"})
    found = find_rate.find(config, dataset, RunFolder(workdir, quiet), 30)
    assert 1e-4 < found.suggested < 1


@pytest.mark.slow
def test_muon_learns(tiny: Config, dataset: ImageDataset):
    config = no_dropout(edit(tiny, optim={"name": "muon", "learning_rate": 0.05}))
    _, seen = run(config, dataset, 20)
    assert seen[-3:].mean() < 0.3 * seen[:3].mean()
