"""Schedules against literal values, and optimizers against steps computed by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import optim
from cnn_jax.config import OptimConfig, TrainConfig
from cnn_jax.errors import UserError

PARAMS = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
GRADS = [
    {"kernel": jnp.array([0.1, 0.2]), "bias": jnp.array([-1.0])},
    {"kernel": jnp.array([0.3, -0.4]), "bias": jnp.array([2.0])},
]


def run(config: OptimConfig, grads: list = GRADS) -> dict[str, np.ndarray]:
    """Returns the parameters after one update per gradient."""
    tx, schedule = optim.make_optimizer(config), optim.make_schedule(config, 10, 1)
    params, state = PARAMS, tx.init(PARAMS)
    for step, grad in enumerate(grads):
        updates, state = tx.update(grad, state, params)
        updates = optax.tree.scale(schedule(step), updates)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def rates(config: OptimConfig, steps: list[int]) -> list[float]:
    """Returns the learning rates of a run of 10 epochs of 10 steps."""
    schedule = optim.make_schedule(config, 10, 10)
    return [float(schedule(step)) for step in steps]


def test_constant_schedule():
    assert rates(OptimConfig(learning_rate=0.5), [0, 50, 99]) == [0.5, 0.5, 0.5]


def test_cosine_schedule():
    config = OptimConfig(learning_rate=0.8, schedule="cosine", ends=(0.0, 0.25))
    np.testing.assert_allclose(rates(config, [0, 50, 100]), [0.8, 0.5, 0.2], rtol=1e-6)


def test_linear_schedule_after_warmup():
    config = OptimConfig(learning_rate=1.0, schedule="linear", warmup_epochs=2.0, ends=(0.0, 0.2))
    values = rates(config, [0, 5, 20, 60, 100])
    np.testing.assert_allclose(values, [0.0, 0.25, 1.0, 0.6, 0.2], rtol=1e-6)


def test_a_step_schedule_counts_from_the_start_of_training():
    config = OptimConfig(
        learning_rate=1.0,
        schedule=((3.0, 0.1), (5.5, 0.1)),
        warmup_epochs=1.0,
    )
    values = rates(config, [5, 10, 29, 31, 54, 56, 99])
    np.testing.assert_allclose(values, [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_two_factors_of_a_step_schedule_that_fall_on_one_step_both_count():
    config = OptimConfig(learning_rate=1.0, schedule=((3.0, 0.1), (3.01, 0.1)))
    np.testing.assert_allclose(rates(config, [29, 31]), [1.0, 0.01], rtol=1e-6)


def test_momentum_step_by_hand():
    # v1 = g1; v2 = 0.9 g1 + g2; params - 0.1 (v1 + v2).
    params = run(OptimConfig(learning_rate=0.1, momentum=0.9))
    np.testing.assert_allclose(params["kernel"], [1 - 0.1 * 0.49, -2 - 0.1 * -0.02], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [0.5 - 0.1 * (-1 - 0.9 + 2)], rtol=1e-6)


def test_plain_sgd_step_by_hand():
    params = run(OptimConfig(name="sgd", learning_rate=0.1))
    np.testing.assert_allclose(params["kernel"], [1 - 0.04, -2 + 0.02], rtol=1e-6)


def test_nesterov_step_by_hand():
    # update = g + 0.9 v with v the new velocity.
    params = run(OptimConfig(name="nesterov", learning_rate=0.1, momentum=0.9), GRADS[:1])
    np.testing.assert_allclose(params["kernel"], [1 - 0.019, -2 - 0.038], rtol=1e-6)


def test_adam_first_step_has_the_size_of_the_learning_rate():
    params = run(OptimConfig(name="adam", learning_rate=0.1), GRADS[:1])
    np.testing.assert_allclose(params["kernel"], [0.9, -2.1], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [0.6], rtol=1e-5)


def test_adamw_decays_kernels_apart_from_the_gradient():
    params = run(OptimConfig(name="adamw", learning_rate=0.1, weight_decay=0.5), GRADS[:1])
    np.testing.assert_allclose(params["kernel"], [0.9 - 0.05, -2.1 + 0.1], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [0.6], rtol=1e-5)


def test_rmsprop_first_step_by_hand():
    # The mean square starts at 0, so it is 0.1 g^2 after a step: g / sqrt(0.1 g^2) = 1 / sqrt(0.1).
    params = run(OptimConfig(name="rmsprop", learning_rate=0.01), GRADS[:1])
    np.testing.assert_allclose(params["kernel"][0], 1 - 0.01 / np.sqrt(0.1), rtol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "sgd", "nesterov", "adam", "rmsprop"])
def test_weight_decay_is_added_to_kernel_gradients_only(name: str):
    decay = run(OptimConfig(name=name, weight_decay=0.3), GRADS[:1])
    moved = {"kernel": GRADS[0]["kernel"] + 0.3 * PARAMS["kernel"], "bias": GRADS[0]["bias"]}
    by_hand = run(OptimConfig(name=name), [moved])
    np.testing.assert_allclose(decay["kernel"], by_hand["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(decay["bias"], by_hand["bias"])


def test_clipping_scales_the_whole_gradient_to_the_norm():
    grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}
    params = run(OptimConfig(name="sgd", learning_rate=1.0, clip_norm=1.0), [grads])
    np.testing.assert_allclose(params["kernel"], [1 - 0.6, -2], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [0.5 - 0.8], rtol=1e-6)


def test_decays_hold_for_what_they_match_first_and_are_added_before_momentum():
    # g1 = g + d p; v1 = g1; step by g1 + m v1; then the same with the moved parameter.
    decays = (("bias", 0.2), (".*", 0.3))
    config = OptimConfig(name="nesterov", learning_rate=0.1, momentum=0.85, weight_decay=decays)
    params = run(config)
    for name, decay, grads in (
        ("kernel", 0.3, ([0.1, 0.2], [0.3, -0.4])),
        ("bias", 0.2, ([-1.0], [2.0])),
    ):
        p, v = np.asarray(PARAMS[name], np.float64), 0.0
        for g in grads:
            g = np.array(g) + decay * p
            v = 0.85 * v + g
            p = p - 0.1 * (g + 0.85 * v)
        np.testing.assert_allclose(params[name], p, rtol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_decay_of_zero_and_no_match_leave_alone(name: str):
    decays = (("kernel", 0.0),)
    found = run(OptimConfig(name=name, weight_decay=decays))
    plain = run(OptimConfig(name=name))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_adamw_takes_decays_apart_from_the_gradient():
    decays = (("bias", 0.5), ("kernel", 0.0))
    params = run(OptimConfig(name="adamw", learning_rate=0.1, weight_decay=decays), GRADS[:1])
    np.testing.assert_allclose(params["kernel"], [0.9, -2.1], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [0.6 - 0.025], rtol=1e-5)


def test_warmup_starts_at_its_fraction_of_the_peak():
    config = OptimConfig(
        learning_rate=1.5,
        schedule="linear",
        warmup_epochs=2.3,
        ends=(0.2, 0.07),
    )
    values = rates(config, [0, 23, 100])
    np.testing.assert_allclose(values, [0.3, 1.5, 0.105], rtol=1e-6)
    np.testing.assert_allclose(rates(config, [11])[0], 1.5 * (0.2 + 0.8 * 11 / 23), rtol=1e-6)


def test_the_share_that_an_average_keeps():
    ema = optim.make_average_decay(TrainConfig(ema_decay=0.75), 100)
    lookahead = optim.make_average_decay(TrainConfig(lookahead_steps=5), 100)
    assert ema is not None
    assert lookahead is not None
    shares = [float(ema(jnp.int32(t))) for t in (0, 1, 8, 26, 27, 100)]
    np.testing.assert_allclose(shares, [0.1, 2 / 11, 0.5, 0.75, 0.75, 0.75], rtol=1e-6)
    kept = [float(lookahead(jnp.int32(t))) for t in (1, 4, 5, 50, 99, 100)]
    expected = [1, 1, 9.672262e-5, 0.096722617, 1, 0.77378094]
    np.testing.assert_allclose(kept, expected, rtol=1e-6)
    assert optim.make_average_decay(TrainConfig(), 100) is None


GROUPS = (("head/.*", 1.0), ("{last}/.*", ((0, None), (3, 0.1))), (".*", ((0, None), (6, 0.1))))


def test_groups_become_phases_at_the_epochs_where_a_multiplier_changes():
    phases = optim.make_phases(OptimConfig(groups=GROUPS), lambda: r"(fc\d+|block3)")
    last = r"(fc\d+|block3)/.*"
    assert phases == (
        (0, (("head/.*", 1.0), (last, None), (".*", None))),
        (3, (("head/.*", 1.0), (last, 0.1), (".*", None))),
        (6, (("head/.*", 1.0), (last, 0.1), (".*", 0.1))),
    )
    assert optim.multiplier(phases[1][1], "block3/conv1/kernel") == 0.1
    assert optim.multiplier(phases[1][1], "block2/conv1/kernel") is None
    assert optim.make_phases(OptimConfig(), lambda: pytest.fail("not needed")) == ((0, ()),)
    assert optim.multiplier((), "anything") == 1.0


def test_a_pattern_that_an_earlier_one_shadows_is_named_as_unused():
    groups = ((".*", 1.0), ("head/.*", 0.1))
    with pytest.raises(UserError, match=r"no pattern matches: none; unused patterns .*: head/"):
        optim.check_groups("optim.groups", groups, ["head/kernel", "fc1/kernel"])


def test_a_last_pattern_for_all_others_may_match_nothing():
    names = ["head/kernel", "fc1/kernel"]
    optim.check_groups("optim.groups", (("(head|fc1)/.*", 1.0), (".*", None)), names)
    with pytest.raises(UserError, match=r"unused patterns .*: fc2/\.\*$"):
        optim.check_groups("optim.groups", ((".*1/.*", 1.0), ("fc2/.*", 1.0), (".*", None)), names)


def test_an_optimizer_of_the_users_own_gets_the_config_and_the_schedule_multiplies_it(
    tmp_path: Path,
):
    """Twice the gradient, clipped and decayed before as for every optimizer."""
    (tmp_path / "mine.py").write_text(
        "import optax\n"
        "def doubled(config):\n"
        "    assert config.learning_rate == 0.1\n"
        "    return optax.scale(-2.0)\n"
    )
    name = f"{tmp_path}/mine.py:doubled"
    params = run(OptimConfig(name=name, learning_rate=0.1, weight_decay=0.5), GRADS[:1])
    np.testing.assert_allclose(params["kernel"], [1 - 0.2 * 0.6, -2 - 0.2 * -0.8], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [0.5 + 0.2], rtol=1e-6)
