"""The learning-rate finder: its rates, where it stops, and that its steps are training's."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import edit, keys, quiet

from cnn_jax import augment, losses
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.runs.folder import RunFolder
from cnn_jax.step import Setup, epoch_order, init_state
from cnn_jax.tools import find_rate

LOSS_WITHOUT_LABEL_0 = """
import jax.numpy as jnp
from cnn_jax import losses

def loss(logits, labels):
    return losses.cross_entropy(logits, labels) * jnp.where(labels == 0, jnp.nan, 1.0)
"""


def small(config: Config) -> Config:
    return edit(config, model={"blocks": ((4,),), "dense": (), "dropout": 0.0})


@pytest.fixture
def folder(workdir: Path) -> RunFolder:
    return RunFolder(workdir, quiet)


def test_rates_rise_by_a_constant_factor():
    rates = [float(find_rate.rising(step, 7)) for step in range(7)]
    np.testing.assert_allclose(rates, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert find_rate.rising(0, 1) == 1e-5


@pytest.mark.slow
def test_steps_are_those_of_training_at_the_rising_rate(
    tiny: Config, dataset: ImageDataset, folder: RunFolder
):
    """Three batches of 8, the last short, against plain SGD with momentum."""
    config = small(tiny)
    found = find_rate.find(config, dataset, folder, 3)
    np.testing.assert_allclose(found.rates, [1e-5, 1e-2, 10], rtol=1e-6)
    init_key, sweep_key = keys(config)
    setup = Setup.of(config, dataset)
    state = init_state(setup, init_key)
    order = epoch_order(jax.random.split(sweep_key, 3)[0], jnp.zeros((), jnp.int32), 22, 8)
    velocity = jax.tree.map(jnp.zeros_like, state.params)
    found_losses, params = [], state.params
    images, labels = jnp.array(dataset.train.images), jnp.array(dataset.train.labels)

    @jax.jit
    def value_and_gradient(params, index):
        def loss(params):
            normal = augment.normalize(images[index], config.data.normalize)
            logits = setup.model.apply({"params": params}, normal)
            each = losses.cross_entropy(logits, labels[index])
            return jnp.sum(each * (index >= 0)) / jnp.sum(index >= 0)

        return jax.value_and_grad(loss)(params)

    for index, rate in zip(order, found.rates, strict=True):
        value, gradient = value_and_gradient(params, index)
        found_losses.append(float(value))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
    np.testing.assert_allclose(found.losses, found_losses, rtol=1e-5)
    mean, expected = 0.0, []
    for i, value in enumerate(found_losses):
        mean = 0.9 * mean + 0.1 * value
        expected.append(mean / (1 - 0.9 ** (i + 1)))
    np.testing.assert_allclose(found.smoothed, expected, rtol=1e-5)


def test_small_data_sets_are_passed_through_several_times(
    tiny: Config, dataset: ImageDataset, folder: RunFolder
):
    """At rates too low to change anything, each pass of three batches sees every image once."""
    config = edit(small(tiny), optim={"name": "sgd"})
    found = find_rate.find(config, dataset, folder)
    assert len(found.losses) > 30
    first, second = found.losses[:3], found.losses[3:6]
    sizes = np.array([8, 8, 6])
    assert sizes @ first == pytest.approx(sizes @ second, rel=1e-3)
    assert not np.allclose(first, second, rtol=1e-3)  # another order


def test_it_stops_where_the_loss_diverges(tiny: Config, dataset: ImageDataset, folder: RunFolder):
    """Batches of 1, so 22 steps; a network without dropout explodes before the last rate, 10."""
    config = replace(edit(tiny, model={"dropout": 0.0}, train={"batch_size": 1}), seed=2)
    found = find_rate.find(config, dataset, folder, 22)
    assert 5 < len(found.rates) < 22
    assert len(found.losses) == len(found.smoothed) == len(found.rates)
    assert np.isfinite(found.losses).all()
    least = np.minimum.accumulate(found.smoothed)
    assert np.all(found.smoothed[1:-1] <= 4 * least[:-2])


def test_a_loss_that_is_not_finite_ends_the_sweep_and_is_left_out(
    tiny: Config, dataset: ImageDataset, folder: RunFolder, tmp_path: Path
):
    """Batches of 1 in their order: the first image of class 0 has a loss that is not finite."""
    (tmp_path / "own.py").write_text(LOSS_WITHOUT_LABEL_0)
    own = f"{tmp_path / 'own.py'}:loss"
    config = replace(edit(small(tiny), train={"batch_size": 1, "loss": own}), seed=1)
    found = find_rate.find(config, dataset, folder, 22)
    order_key = jax.random.split(keys(config)[1], 3)[0]
    order = epoch_order(order_key, jnp.zeros((), jnp.int32), 22, 1)
    first = int(np.argmax(dataset.train.labels[np.asarray(order)[:, 0]] == 0))
    assert 0 < first < 22
    assert len(found.losses) == len(found.smoothed) == len(found.rates) == first
    assert np.isfinite(found.losses).all()


def test_a_first_loss_that_is_not_finite_is_one_line(
    tiny: Config, dataset: ImageDataset, folder: RunFolder
):
    config = edit(small(tiny), data={"normalize": ((0.0,) * 3, (1e-45,) * 3)})
    message = (
        r"loss \S+ at the first step, whatever the learning rate: check data.normalize and, if it "
        r"is set, init.checkpoint"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        find_rate.find(config, dataset, folder, 3)


def test_a_tenth_of_the_best_rate_is_suggested():
    rates, losses = np.array([1e-3, 1e-2, 1e-1, 1.0]), np.array([2.0, 0.1, 3.0, 9.0])
    smoothed = np.array([2.0, 1.9, 1.5, 4.0])
    assert find_rate.RateSweep(rates, losses, smoothed).suggested == pytest.approx(0.01)


def test_averages_of_the_parameters_are_left_out(
    tiny: Config, dataset: ImageDataset, folder: RunFolder
):
    """Its share of a step past the end of the run would be above 1."""
    plain = find_rate.find(small(tiny), dataset, folder, 3)
    lookahead = edit(small(tiny), train={"lookahead_steps": 1})
    averaged = find_rate.find(lookahead, dataset, folder, 3)
    np.testing.assert_array_equal(averaged.losses, plain.losses)


def test_images_are_mirrored_where_training_would(
    tiny: Config, dataset: ImageDataset, folder: RunFolder
):
    plain = find_rate.find(small(tiny), dataset, folder, 3)
    alternate = edit(small(tiny), augment={"flip": "alternate"})
    mirrored = find_rate.find(alternate, dataset, folder, 3)
    assert not np.isclose(mirrored.losses[0], plain.losses[0], rtol=1e-6)
