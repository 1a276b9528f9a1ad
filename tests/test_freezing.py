"""Frozen parameters keep their bits, cost no gradient and no state, and run as in evaluation."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import noise
from helpers.training import HEAD, edit, fit, initial, leaves, no_dropout, run

from cnn_jax import configs, kernels, models, optim
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.step import Batch, Setup, TrainState, enter_phase, init_state, train_step

NAMES = ["block1/conv1/bias", "block1/conv1/kernel", "head/bias", "head/kernel"]
RESNET = ModelConfig(name="resnet_small", blocks=((4,), (6,)), dense=())


def test_the_first_full_match_wins():
    groups = (("head/kernel", 2.0), ("head/.*", 0.5), (".*", None))
    found = [optim.multiplier(groups, name) for name in NAMES]
    assert found == [None, None, 0.5, 2.0]
    assert optim.multiplier((("head", 1.0),), "head/kernel") is None
    assert optim.multiplier((), "anything") == 1.0


def test_groups_that_do_not_divide_up_the_parameters_list_both_sides():
    groups = (("head/.*", 1.0), ("haed/.*", 0.5), ("head/kernel", 0.1), ("block1/.*/bias", None))
    with pytest.raises(UserError) as caught:
        optim.check_groups("optim.groups", groups, NAMES)
    assert str(caught.value) == (
        "optim.groups: parameters that no pattern matches: block1/conv1/kernel; "
        "unused patterns (they match nothing, or an earlier pattern matches it first): "
        "haed/.*, head/kernel"
    )
    optim.check_groups("optim.groups", HEAD, NAMES)
    optim.check_groups("optim.groups", (), NAMES)


def test_groups_are_checked_before_the_first_step(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    for groups in ((("haed/.*", 1.0),), (("haed/.*", ((0, 1.0), (1, 0.5))),)):
        with pytest.raises(UserError, match=r"block1/conv1/bias.*haed"):
            fit(edit(tiny, optim={"groups": groups}), dataset, workdir)


def test_last_stands_for_the_last_block_and_the_dense_layers(tiny: Config, dataset: ImageDataset):
    config = edit(tiny, optim={"groups": (("head/.*|{last}/.*", 1.0), (".*", None))})
    before, (state, _) = leaves(initial(config, dataset).params), run(config, dataset, 2)
    changed = {
        name.split("/")[0]
        for name, leaf in leaves(state.params).items()
        if not np.array_equal(leaf, before[name])
    }
    assert changed == {"block2", "fc1", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_frozen_parameters_keep_their_bits(tiny: Config, dataset: ImageDataset, name: str):
    """Momentum, weight decay, clipping and the running average all on."""
    settings = {"name": name, "weight_decay": 0.1, "clip_norm": 0.5, "groups": HEAD}
    config = edit(tiny, optim=settings, train={"ema_decay": 0.97})
    start = initial(config, dataset)
    before = leaves(start.params)
    state, _ = run(config, dataset, 6)
    images, labels = dataset.train.images[:8], dataset.train.labels[:8]
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))
    alone, *_ = train_step(Setup.of(config, dataset), start, batch, jax.random.key(0))
    assert list(leaves(state.average["params"])) == ["head/bias", "head/kernel"]
    evaluated = [s.eval_variables["params"] for s in (state, alone)]
    for params in (state.params, alone.params, *evaluated):
        for leaf_name, leaf in leaves(params).items():
            same = np.array_equal(leaf, before[leaf_name])
            assert same == (not leaf_name.startswith("head/")), leaf_name


@pytest.mark.parametrize(
    ("name", "arrays"), [("momentum", 1), ("sgd", 0), ("adam", 2), ("adamw", 2), ("rmsprop", 1)]
)
def test_what_is_frozen_has_no_optimizer_state(
    tiny: Config, dataset: ImageDataset, name: str, arrays: int
):
    """Of head/kernel and head/bias alone; beside them lie only counts of steps."""
    config = edit(tiny, optim={"name": name, "groups": HEAD, "weight_decay": 0.1, "clip_norm": 1})
    state = initial(config, dataset)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(sizes) == sorted([3, 24] * arrays)


def test_the_norm_that_is_clipped_is_of_the_trainable_part():
    """Beside a frozen gradient of norm 1e6 the trainable one of norm 5 is scaled to 1."""
    groups = (("a/.*", 1.0), ("b/.*", None))
    config = replace(Config().optim, name="sgd", learning_rate=1.0, clip_norm=1.0, groups=groups)
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(1)}}
    trainable = optim.trainable_part(params, groups)
    tx = optim.make_optimizer(config, ((0, groups),))
    grads = optim.trainable_part(
        {"a": {"kernel": jnp.array([3.0, 4.0])}, "b": {"kernel": jnp.array([1e6])}}, groups
    )
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    np.testing.assert_allclose(updates["a"]["kernel"], [-0.6, -0.8], rtol=1e-6)
    assert updates["b"]["kernel"] is None


@pytest.mark.slow
def test_multipliers_scale_the_steps(tiny: Config, dataset: ImageDataset):
    config = edit(tiny, optim={"learning_rate": 0.1}, model={"dropout": 0.0})
    whole, _ = run(config, dataset, 1)
    groups = (("head/.*", 1.0), ("fc1/.*", 0.25), (".*", None))
    grouped = edit(config, optim={"groups": groups})
    before = leaves(initial(grouped, dataset).params)
    state, _ = run(grouped, dataset, 1)
    for name, leaf in leaves(state.params).items():
        factor = optim.multiplier(groups, name) or 0
        expected = factor * (leaves(whole.params)[name] - before[name])
        np.testing.assert_allclose(leaf - before[name], expected, atol=1e-7, err_msg=name)


def flops(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "least"),
    [
        (configs.get("vgg3"), 2.5),
        (replace(configs.get("vgg3"), model=replace(RESNET, blocks=((16, 16), (32, 32)))), 2.5),
    ],
)
def test_training_the_head_costs_no_more_than_1_4_forward_passes(config: Config, least: float):
    """Counted by XLA, whose own convolutions are used: it counts the body of a loop only once."""
    shape, n = (32, 32, 3), 16

    def cost_of_a_step(config: Config) -> float:
        setup = Setup(edit(config, train={"batch_size": n}), 10, shape, steps_per_epoch=1)
        state = jax.eval_shape(lambda: init_state(setup, jax.random.key(0)))
        batch = jax.eval_shape(
            lambda: Batch(jnp.zeros((n, *shape), jnp.uint8), jnp.zeros(n, jnp.int32), jnp.ones(n))
        )

        def step(state, batch):
            return train_step(setup, state, batch, jax.random.key(1))

        return flops(step, state, batch)

    model = models.build(config.model, 10)
    images = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with kernels.use("xla"):
        forward = flops(model.apply, variables, images)
        head = cost_of_a_step(edit(config, optim={"groups": HEAD}))
        whole = cost_of_a_step(config)
    print(f"forward {forward:.3g}, head {head / forward:.3f}, whole {whole / forward:.3f}")
    assert 1 <= head / forward <= 1.4
    assert whole / forward > least


NORMED = """
import flax.linen as nn
from cnn_jax import layers

class Normed(nn.Module):
    config: object
    n_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = Trunk(name="trunk")(images, train)
        x = x.reshape((len(x), -1))
        x = layers.Dense(8, activation="relu", dropout=0.5, name="fc1")(x, train)
        return layers.Dense(self.n_classes, name="head")(x)

class Trunk(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(3, (3, 3), name="conv")(x)
        y = nn.BatchNorm(momentum=0.5, name="norm")(y, use_running_average=not train)
        return nn.Dropout(0.5, name="drop")(nn.relu(y), deterministic=not train) + x
"""


def step_of_normed(folder: Path, groups) -> tuple[TrainState, TrainState, list[float]]:
    """Returns the states before and after a step, and the losses under three dropout keys.

    The network is a user's: a trunk with a skip path, BatchNorm and dropout inside; fc1; the head.
    """
    (folder / "normed.py").write_text(NORMED)
    model = ModelConfig(name=f"{folder}/normed.py:Normed")
    config = edit(replace(Config(), model=model), optim={"groups": groups}, train={"batch_size": 8})
    images, labels = noise(8, 8, 8, 3), np.arange(8, dtype=np.int32) % 3
    setup = Setup(config, 3, (8, 8, 3), steps_per_epoch=1)
    state = init_state(setup, jax.random.key(0))
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))
    step = jax.jit(lambda key: train_step(setup, state, batch, key))
    steps = [step(jax.random.key(seed)) for seed in range(3)]
    return state, steps[0][0], [float(sums.loss) for _, sums, _ in steps]


def test_frozen_batch_norm_runs_on_statistics_that_do_not_move(tmp_path: Path):
    before, after, losses = step_of_normed(tmp_path, HEAD)
    for name, leaf in leaves(before.batch_stats).items():
        np.testing.assert_array_equal(leaves(after.batch_stats)[name], leaf)
    assert len(set(losses)) == 1  # Dropout is off as well, since it is in frozen layers alone.
    model = models.build(ModelConfig(name=f"{tmp_path}/normed.py:Normed"), 3)
    logits = model.apply(
        {"params": before.params, "batch_stats": before.batch_stats},
        jnp.asarray(noise(8, 8, 8, 3) / 255, jnp.float32),
    )
    expected = -jax.nn.log_softmax(logits)[jnp.arange(8), jnp.arange(8) % 3].sum()
    np.testing.assert_allclose(losses[0], expected, rtol=1e-6)


def test_trained_batch_norm_and_dropout_act(tmp_path: Path):
    before, after, losses = step_of_normed(tmp_path, ())
    for name, leaf in leaves(before.batch_stats).items():
        assert not np.array_equal(leaves(after.batch_stats)[name], leaf), name
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("trained", "different", "moves"),
    [("head|fc1", 3, False), ("head|trunk/conv", 3, False), ("head|trunk/norm", 3, True)],
)
def test_dropout_and_norms_go_with_the_module_that_they_are_in(
    tmp_path: Path, trained: str, different: int, moves: bool
):
    """The trunk's dropout acts wherever a part of the trunk is trained, its norm only if it is."""
    groups = ((f"({trained})/.*", 1.0), (".*", None))
    before, after, losses = step_of_normed(tmp_path, groups)
    assert len(set(losses)) == different
    means = [leaves(state.batch_stats)["trunk/norm/mean"] for state in (before, after)]
    assert np.array_equal(*means) != moves


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"lookahead_steps": 2}])
def test_the_average_of_what_a_phase_unfreezes_starts_from_its_value(
    tiny: Config, dataset: ImageDataset, settings: dict
):
    groups = (("head/.*", 1.0), (".*", ((0, None), (1, 1.0))))
    config = edit(tiny, optim={"groups": groups}, train=settings)
    state, _ = run(config, dataset, 3)
    assert list(leaves(state.average["params"])) == ["head/bias", "head/kernel"]
    state = enter_phase(Setup.of(config, dataset).at(1), state)
    before = leaves(jax.tree.map(np.array, state.params))
    average = leaves(jax.tree.map(np.array, state.average["params"]))
    assert list(average) == list(before)
    for name, leaf in average.items():
        assert np.array_equal(leaf, before[name]) == (not name.startswith("head/")), name
    state, _ = run(config, dataset, 4)
    assert not np.array_equal(leaves(state.params)["fc1/kernel"], before["fc1/kernel"])


@pytest.mark.slow
def test_a_stage_of_a_residual_network_is_frozen_by_its_pattern(
    tiny: Config, dataset: ImageDataset
):
    groups = (("({last}|head)/.*", 1.0), (".*", None))
    config = edit(replace(tiny, model=RESNET), optim={"groups": groups, "weight_decay": 0.1})
    start, (state, losses) = initial(config, dataset), run(config, dataset, 6)
    for before, after in (
        (leaves(start.params), leaves(state.params)),
        (leaves(start.batch_stats), leaves(state.batch_stats)),
    ):
        for name, leaf in after.items():
            frozen = name.startswith("st") and not name.startswith("stage2")
            assert np.array_equal(leaf, before[name]) == frozen, name
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_a_residual_network_learns(tiny: Config, dataset: ImageDataset):
    config = edit(replace(tiny, model=RESNET), optim={"learning_rate": 0.05})
    _, losses = run(config, dataset, 30)
    assert losses[-3:].mean() < 0.3 * losses[:3].mean()


@pytest.mark.slow
def test_a_schedule_that_ends_early_is_gone_through_by_then(tiny: Config, dataset: ImageDataset):
    """Three steps an epoch: 2 (1 - s / 6) instead of 1 - s / 12; then the bias is frozen."""
    groups = (("fc1/bias", ((0, 2.0), (2, 0.0))), (".*", 1.0))
    config = edit(
        no_dropout(tiny),
        optim={"name": "sgd", "schedule": "linear", "learning_rate": 0.3, "groups": groups},
        train={"epochs": 4},
    )
    setup, plain = Setup.of(config, dataset), edit(config, optim={"groups": ()})
    images, labels = dataset.train.images[:8], dataset.train.labels[:8]
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))
    state = initial(config, dataset)
    for s in (0, 1, 5):
        moved = []
        for one in (config, plain):
            start = replace(initial(one, dataset), step=jnp.int32(s))
            after, *_ = train_step(Setup.of(one, dataset), start, batch, jax.random.key(0))
            moved.append(leaves(after.params))
        for name, before in leaves(state.params).items():
            ratio = 2 * (1 - s / 6) / (1 - s / 12) if name == "fc1/bias" else 1.0
            own, whole = (leaf[name] - before for leaf in moved)
            np.testing.assert_allclose(own, ratio * whole, rtol=1e-3, atol=1e-7, err_msg=name)
    assert not np.array_equal(moved[1]["fc1/bias"], leaves(state.params)["fc1/bias"])
    assert optim.multiplier(setup.at(1).groups, "fc1/bias") == 2.0
    assert optim.multiplier(setup.at(2).groups, "fc1/bias") is None
    shorter = Setup.of(edit(config, train={"epochs": 1}), dataset)
    assert float(shorter.rate_share("fc1/bias", jnp.int32(2))) == pytest.approx(1.0)
