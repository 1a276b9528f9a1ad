"""The learning-rate finder: its rates, where it stops, and that its steps are training's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import edit

from cnn_jax import rate_finder, train
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError


def small(config: Config) -> Config:
    return edit(config, model={"blocks": ((4,),), "dense": (), "dropout": 0.0})


def find(config: Config, dataset: ImageDataset, n_steps: int) -> rate_finder.Found:
    recipe = rate_finder.make_recipe(config, 3, n_steps)
    state = train.init_state(recipe, jax.random.key(0), dataset.image_shape)
    images, labels = dataset.train.images, dataset.train.labels
    return rate_finder.find(recipe, state, images, labels, jax.random.key(1), n_steps)


def test_rates_rise_by_a_constant_factor():
    rates = [float(rate_finder.rising(step, 7)) for step in range(7)]
    np.testing.assert_allclose(rates, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert rate_finder.rising(0, 1) == 1e-5


def test_steps_are_those_of_training_at_the_rising_rate(tiny: Config, dataset: ImageDataset):
    """Three batches of 8, the last short: the losses that train_step gives one by one."""
    config = small(tiny)
    found = find(config, dataset, 3)
    np.testing.assert_allclose(found.rates, [1e-5, 1e-2, 10], rtol=1e-6)
    recipe = train.make_recipe(config, 3, 3)
    state = train.init_state(recipe, jax.random.key(0), dataset.image_shape)
    order_key, _ = jax.random.split(jax.random.key(1))
    order = train.epoch_order(order_key, jnp.zeros((), jnp.int32), 22, 8)
    velocity = jax.tree.map(jnp.zeros_like, state.params)
    losses, params = [], state.params
    images, labels = jnp.array(dataset.train.images), jnp.array(dataset.train.labels)

    @jax.jit
    def value_and_gradient(params, index):
        def loss(params):
            logits = recipe.model.apply({"params": params}, recipe.normalize(images[index]))
            return jnp.sum(recipe.loss(logits, labels[index]) * (index >= 0)) / jnp.sum(index >= 0)

        return jax.value_and_grad(loss)(params)

    for index, rate in zip(order, found.rates, strict=True):
        value, gradient = value_and_gradient(params, index)
        losses.append(float(value))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    mean, expected = 0.0, []
    for i, value in enumerate(losses):
        mean = 0.9 * mean + 0.1 * value
        expected.append(mean / (1 - 0.9 ** (i + 1)))
    np.testing.assert_allclose(found.smoothed, expected, rtol=1e-5)


def test_few_images_are_passed_through_several_times(tiny: Config, dataset: ImageDataset):
    """At rates that change nothing, each pass of three batches sees every image once."""
    config = edit(small(tiny), optim={"name": "sgd"})
    found = find(config, dataset, rate_finder.STEPS)
    assert len(found.losses) > 30
    first, second = found.losses[:3], found.losses[3:6]
    sizes = np.array([8, 8, 6])
    assert sizes @ first == pytest.approx(sizes @ second, rel=1e-3)
    assert not np.allclose(first, second, rtol=1e-3)  # in another order


def test_it_stops_where_the_loss_diverges(tiny: Config, dataset: ImageDataset):
    """Batches of 1, so 22 steps; a network without dropout explodes before the last rate, 10."""
    config = edit(tiny, model={"dropout": 0.0}, train={"batch_size": 1})
    found = find(config, dataset, 22)
    assert 5 < len(found.rates) < 22
    assert len(found.losses) == len(found.smoothed) == len(found.rates)
    assert np.isfinite(found.losses).all()
    least = np.minimum.accumulate(found.smoothed)
    assert np.all(found.smoothed[1:-1] <= 4 * least[:-2])


def test_a_loss_that_is_not_finite_ends_it_and_is_left_out(tiny: Config, dataset: ImageDataset):
    config = edit(small(tiny), train={"batch_size": 1})
    recipe = rate_finder.make_recipe(config, 3, 22)
    state = train.init_state(recipe, jax.random.key(0), dataset.image_shape)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return recipe.loss(logits, labels) * jnp.where(labels == 0, jnp.nan, 1.0)

    broken = replace(recipe, loss=loss)
    images, labels = dataset.train.images, np.int32([1, 2, 1, 2, 0] * 4 + [1, 2])
    key = jax.random.key(1)
    n_run, losses, _ = rate_finder.sweep(
        broken, state, jnp.array(images), jnp.array(labels), key, 22
    )
    order = train.epoch_order(jax.random.split(key)[0], jnp.zeros((), jnp.int32), 22, 1)
    first = int(np.argmax(labels[np.asarray(order)[:, 0]] == 0))
    assert int(n_run) == first + 1
    found = rate_finder.find(broken, state, images, labels, key, 22)
    assert len(found.losses) == first
    np.testing.assert_array_equal(found.losses, losses[:first])


def test_a_first_loss_that_is_not_finite_is_one_line(tiny: Config, dataset: ImageDataset):
    config = edit(small(tiny), data={"std": (1e-45, 1e-45, 1e-45)})
    said = (
        r"loss \S+ at the first step, which no learning rate has changed: look at data.mean, "
        r"data.std and, if it is set, init.checkpoint"
    )
    with pytest.raises(UserError, match=f"^{said}$"):
        find(config, dataset, 3)


def test_a_tenth_of_the_best_rate_is_suggested():
    rates, losses = np.array([1e-3, 1e-2, 1e-1, 1.0]), np.array([2.0, 0.1, 3.0, 9.0])
    smoothed = np.array([2.0, 1.9, 1.5, 4.0])
    assert rate_finder.Found(rates, losses, smoothed).suggested == pytest.approx(0.01)


def test_an_average_of_the_whole_run_plays_no_part(tiny: Config, dataset: ImageDataset):
    """Its share of a step past the end of the run would be above 1."""
    plain = find(small(tiny), dataset, 3)
    averaged = find(edit(small(tiny), train={"lookahead_steps": 1}), dataset, 3)
    np.testing.assert_array_equal(averaged.losses, plain.losses)


def test_images_are_mirrored_where_training_would(tiny: Config, dataset: ImageDataset):
    plain = find(small(tiny), dataset, 3)
    mirrored = find(edit(small(tiny), augment={"alternate_flip": True}), dataset, 3)
    assert not np.isclose(mirrored.losses[0], plain.losses[0], rtol=1e-6)
