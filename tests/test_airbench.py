"""The configs airbench_muon and airbench96 against their recipes, one step of each written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import colours
from helpers.newton_schulz import orthogonal
from helpers.training import edit, initial, leaves

from cnn_jax import augment, configs, optim
from cnn_jax.config import Config
from cnn_jax.step import Batch, Setup, TrainState, train_step

N = 20
"""The size of a batch."""


def logits_by_hand(params: dict, stats: dict, images: np.ndarray, residual: bool) -> tuple:
    """Returns the logits in training before they are scaled, and the new batch statistics."""
    new_stats = {}

    def convolve(x, kernel, padding="SAME"):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    def gelu(x):
        return x * 0.5 * (1 + jax.lax.erf(x / np.sqrt(2)))

    def pool(x, side):
        x = x[:, : x.shape[1] // side * side, : x.shape[2] // side * side]
        places = [(row, column) for row in range(side) for column in range(side)]
        return functools.reduce(jnp.maximum, [x[:, i::side, j::side] for i, j in places])

    def norm(x, group, name):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        kept, old = 0.9 if residual else 0.6, stats[group][name]
        for kind, value in (("mean", mean), ("var", var)):
            new_stats[f"{group}/{name}/{kind}"] = kept * old[kind] + (1 - kept) * value
        bias = params[group][name]["bias"]
        return (x - mean.reshape(1, 1, 1, -1)) / jnp.sqrt(
            var.reshape(1, 1, 1, -1) + 1e-12
        ) + bias.reshape(1, 1, 1, -1)

    whiten = params["whiten"]
    x = convolve(images, whiten["kernel"], "VALID") + whiten["bias"].reshape(1, 1, 1, -1)
    x = gelu(x)
    for group in sorted(name for name in params if name.startswith("group")):
        x = pool(convolve(x, params[group]["conv1"]["kernel"]), 2)
        x = first = gelu(norm(x, group, "norm1"))
        x = norm(convolve(x, params[group]["conv2"]["kernel"]), group, "norm2")
        if residual:
            x = norm(convolve(gelu(x), params[group]["conv3"]["kernel"]), group, "norm3") + first
        x = gelu(x)
    x = pool(x, 3)
    return x.reshape(len(x), -1) @ params["head"]["kernel"], new_stats


def step(
    config: Config, scale: float, residual: bool
) -> tuple[TrainState, TrainState, dict, dict, dict]:
    """Trains one step on a batch without augmentation.

    Returns the states before and after it, and what is found by hand: gradients of the summed loss
    and the new statistics. The parameters start anywhere, as biases of 0 would hide mistakes.
    """
    config = edit(config, train={"batch_size": N}, augment={"flip": "none", "translate": 0})
    dataset = colours(3 * N, 9, 9, size=16)
    setup, state = Setup.of(config, dataset), initial(config, dataset)
    rng = np.random.default_rng(0)
    state = state.replace(
        params=jax.tree.map(lambda x: x + 0.1 * rng.random(x.shape, np.float32), state.params)
    )
    images, labels = dataset.train.images[:N], dataset.train.labels[:N]
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(N))
    after, *_ = jax.jit(lambda s: train_step(setup, s, batch, jax.random.key(0)))(state)
    mean, std = (np.array(x, np.float32) for x in config.data.normalize)
    pixels = (images / np.float32(255) - mean) / std
    targets = 0.8 * np.eye(3)[labels] + 0.2 / 3

    @jax.jit
    def summed_loss(params):
        logits, stats = logits_by_hand(params, state.batch_stats, pixels, residual)
        return -(targets * jax.nn.log_softmax(logits * scale)).sum(), stats

    grads, stats = jax.grad(summed_loss, has_aux=True)(state.params)
    return state, after, leaves(grads), stats, leaves(after.batch_stats)


@pytest.mark.slow
def test_a_step_of_airbench_muon_by_hand():
    """At small widths; `groups` have 6 outputs at last, by which the logits are divided."""
    config = edit(configs.get("airbench_muon"), model={"blocks": ((4, 4), (6, 6))})
    before, after, grads, stats, new_stats = step(config, 1 / 6, residual=False)
    for name, value in stats.items():
        np.testing.assert_allclose(new_stats[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, p in leaves(before.params).items():
        g, found = grads[name], leaves(after.params)[name]
        if name == "whiten/kernel":
            np.testing.assert_array_equal(found, p)
        elif name.startswith("group") and name.endswith("kernel"):
            scaled = p * np.sqrt(p.shape[-1]) / np.linalg.norm(p)
            direction = orthogonal(g.reshape(-1, g.shape[-1]), 3).reshape(g.shape)
            np.testing.assert_allclose(found, scaled - 0.24 * direction, atol=5e-3, err_msg=name)
        else:
            # The recipe's rates are those of 2000 examples: each here counts as 100 of them.
            rate = (0.67 if name == "head/kernel" else 0.053) * 2000 / N
            g = g + 4e-3 / rate * p
            expected = p - rate * (g + 0.85 * g)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_step_of_airbench96_by_hand():
    """At small widths, in the recipe's units: rates and decays of the summed loss."""
    config = edit(
        configs.get("airbench96"),
        model={"blocks": ((4, 4, 4), (6, 6, 6))},
        augment={"cutout": 0, "cutout_inside": False},
    )
    before, after, grads, stats, new_stats = step(config, 1 / 9, residual=True)
    for name, value in stats.items():
        np.testing.assert_allclose(new_stats[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    steps_of_a_unit = 1024 * (1 + 1 / (1 - 0.85))
    for name, p in leaves(before.params).items():
        g, found = grads[name] * 1024 / N, leaves(after.params)[name]
        if name == "whiten/kernel":
            np.testing.assert_array_equal(found, p)
            continue
        rate = 9 / steps_of_a_unit * (64 if name.endswith(("1/bias", "2/bias", "3/bias")) else 1)
        g = g + 0.012 * 1024 / steps_of_a_unit / rate * p
        expected = p - 0.2 * rate * (g + 0.85 * g)  # the first rate is 0.2 of the peak
        np.testing.assert_allclose(found - p, expected - p, rtol=2e-3, atol=1e-5, err_msg=name)


def test_the_rates_of_the_recipes():
    """As fractions of the peaks, after 0, 1/4 and all but one of the steps."""
    for name, per_epoch, rates in (
        ("airbench_muon", 25, {0: 1.0, 50: 0.75, 199: 0.005}),
        ("airbench96", 49, {0: 0.2, 181: 1.0, 997: 0.5, 1812: 1 / 1632}),
    ):
        config = configs.get(name)
        assert -(-50_000 // config.train.batch_size) == per_epoch
        schedule = optim.make_schedule(config.optim, per_epoch, config.train.epochs)
        for number, share in rates.items():
            expected = share * config.optim.learning_rate
            assert float(schedule(number)) == pytest.approx(expected, rel=1e-4)


def test_airbench96_hides_a_square_inside_of_each_image():
    config = configs.get("airbench96")
    images = jnp.full((300, 32, 32, 3), 200, jnp.uint8)
    view = augment.training_view(images, jax.random.key(0), config.data, config.augment)
    hidden = np.asarray(view == 0).all(-1)
    assert (hidden.sum((1, 2)) == 12 * 12).all()
    places = {(int(np.argmax(h.any(1))), int(np.argmax(h.any(0)))) for h in hidden}
    assert {min(places)[0], max(places)[0]} == {0, 20}
