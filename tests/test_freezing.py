"""What is frozen stays bit for bit, costs no gradient and no state, and runs as in evaluation."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import edit, run

from cnn_jax import configs, layers, loop, models, optim, train, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError

HEAD = (("head/.*", 1.0), (".*", None))
NAMES = ["block1/conv1/bias", "block1/conv1/kernel", "head/bias", "head/kernel"]


def leaves(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}


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
        "patterns that are the first to match nothing: haed/.*, head/kernel"
    )
    optim.check_groups("optim.groups", HEAD, NAMES)
    optim.check_groups("optim.groups", (), NAMES)


def test_groups_are_checked_before_the_first_step(tiny: Config, dataset: ImageDataset):
    wrong = (("haed/.*", 1.0),)
    for optimizer in ({"groups": wrong}, {"phases": ((0, ((".*", 1.0),)), (1, wrong))}):
        with pytest.raises(UserError, match=r"block1/conv1/bias.*haed"):
            loop.Trainer(edit(tiny, optim=optimizer), dataset)


def test_last_is_the_number_of_the_last_block(tiny: Config):
    groups = (("block{last}/.*", 1.0), (".*", None))
    phases = optim.make_phases(edit(tiny, optim={"groups": groups}).optim, 2, 10)
    assert phases == ((0, (("block2/.*", 1.0), (".*", None))),)


@pytest.mark.parametrize("name", ["momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_frozen_parameters_keep_their_bits(tiny: Config, dataset: ImageDataset, name: str):
    """Momentum, weight decay, clipping and the running average all on."""
    settings = {"name": name, "weight_decay": 0.1, "clip_norm": 0.5, "groups": HEAD}
    config = edit(tiny, optim=settings, train={"ema_decay": 0.97})
    trainer = loop.Trainer(config, dataset)
    before = leaves(trainer.init().params)
    state, _ = run(trainer, 6)
    images, labels = dataset.train.images[:8], dataset.train.labels[:8]
    batch = train.Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))
    alone, *_ = train.train_step(trainer.recipe, trainer.init(), batch, jax.random.key(0))
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
    state = loop.Trainer(config, dataset).init()
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


def test_multipliers_scale_the_steps(tiny: Config, dataset: ImageDataset):
    config = edit(tiny, optim={"learning_rate": 0.1}, model={"dropout": 0.0})
    whole, _ = run(loop.Trainer(config, dataset), 1)
    groups = (("head/.*", 1.0), ("fc1/.*", 0.25), (".*", None))
    grouped = loop.Trainer(edit(config, optim={"groups": groups}), dataset)
    before = leaves(grouped.init().params)
    state, _ = run(grouped, 1)
    for name, leaf in leaves(state.params).items():
        factor = optim.multiplier(groups, name) or 0
        expected = factor * (leaves(whole.params)[name] - before[name])
        np.testing.assert_allclose(leaf - before[name], expected, atol=1e-7, err_msg=name)


def flops(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_training_the_head_of_vgg3_costs_no_more_than_1_4_forward_passes(monkeypatch):
    """Counted by XLA, whose own convolutions are used: it counts the body of a loop only once."""
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    base = configs.get("vgg3")
    shape, n = (32, 32, 3), 16

    def cost_of_a_step(config: Config) -> float:
        recipe = train.make_recipe(edit(config, train={"batch_size": n}), 10, 1)
        state = jax.eval_shape(lambda: train.init_state(recipe, jax.random.key(0), shape))
        batch = jax.eval_shape(
            lambda: train.Batch(
                jnp.zeros((n, *shape), jnp.uint8), jnp.zeros(n, jnp.int32), jnp.ones(n)
            )
        )

        def step(state, batch):
            return train.train_step(recipe, state, batch, jax.random.key(1))

        return flops(step, state, batch)

    model = models.build(base.model, 10)
    images = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    forward = flops(model.apply, variables, images)
    head = cost_of_a_step(edit(base, optim={"groups": HEAD}))
    whole = cost_of_a_step(base)
    print(f"forward {forward:.3g}, head {head / forward:.3f}, whole {whole / forward:.3f}")
    assert 1 <= head / forward <= 1.4
    assert whole / forward > 2.5


class Normed(models.Classifier):
    """A trunk with BatchNorm and dropout inside, then dropout after fc1, then the head."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="bn")(x)
        x = nn.Dropout(0.5, name="drop")(nn.relu(x), deterministic=not train)
        return self.classify(x, train)


def step_of_normed(groups) -> tuple[train.TrainState, train.TrainState, list[float]]:
    """Returns the states before and after a step, and the losses under three dropout keys."""
    config = edit(Config(), optim={"groups": groups}, train={"batch_size": 8})
    recipe = replace(
        train.make_recipe(config, 3, 1), model=Normed(n_classes=3, dense=(8,), dropout=0.5)
    )
    state = train.init_state(recipe, jax.random.key(0), (8, 8, 3))
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    batch = train.Batch(jnp.asarray(images), jnp.arange(8) % 3, jnp.ones(8))
    steps = [train.train_step(recipe, state, batch, jax.random.key(seed)) for seed in range(3)]
    return state, steps[0][0], [float(sums.loss) for _, sums, _ in steps]


def test_frozen_batch_norm_runs_on_statistics_that_do_not_move():
    before, after, losses = step_of_normed((("head/.*", 1.0), (".*", None)))
    for name, leaf in leaves(before.batch_stats).items():
        np.testing.assert_array_equal(leaves(after.batch_stats)[name], leaf)
    assert len(set(losses)) == 1  # nor does dropout act, which comes after frozen layers alone
    logits = Normed(n_classes=3, dense=(8,)).apply(
        {"params": before.params, "batch_stats": before.batch_stats},
        jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)) / 255, jnp.float32),
    )
    expected = -jax.nn.log_softmax(logits)[jnp.arange(8), jnp.arange(8) % 3].sum()
    np.testing.assert_allclose(losses[0], expected, rtol=1e-6)


def test_trained_batch_norm_and_dropout_act():
    before, after, losses = step_of_normed(())
    for name, leaf in leaves(before.batch_stats).items():
        assert not np.array_equal(leaves(after.batch_stats)[name], leaf), name
    assert len(set(losses)) == 3


def test_dropout_goes_with_the_layer_that_it_follows():
    """fc1 is trained, so its dropout acts; that of the frozen trunk would not by itself."""
    _, after, losses = step_of_normed((("(head|fc1)/.*", 1.0), (".*", None)))
    assert len(set(losses)) == 3
    before, _, _ = step_of_normed(())
    np.testing.assert_array_equal(after.batch_stats["bn"]["mean"], before.batch_stats["bn"]["mean"])


@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"lookahead_steps": 2}])
def test_the_average_of_what_a_phase_unfreezes_starts_from_its_value(
    tiny: Config, dataset: ImageDataset, settings: dict
):
    phases = ((0, HEAD), (1, ((".*", 1.0),)))
    trainer = loop.Trainer(edit(tiny, optim={"phases": phases}, train=settings), dataset)
    state, _ = run(trainer, 3)
    assert list(leaves(state.average["params"])) == ["head/bias", "head/kernel"]
    state = trainer.enter_phase(state, 3)
    before = leaves(jax.tree.map(np.array, state.params))
    average = leaves(jax.tree.map(np.array, state.average["params"]))
    assert list(average) == list(before)
    for name, leaf in average.items():
        assert np.array_equal(leaf, before[name]) == (not name.startswith("head/")), name
    state, _ = trainer.run_segment(state, 1)
    assert not np.array_equal(leaves(state.params)["fc1/kernel"], before["fc1/kernel"])
