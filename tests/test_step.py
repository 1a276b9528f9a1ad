"""The training step against the same written out, and the compiled segment of steps."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import edit, initial, keys, leaves, no_dropout, run

from cnn_jax import losses, mesh, step, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.fit import compile_segment
from cnn_jax.step import Batch, Setup, epoch_order, train_step


def test_an_epoch_uses_every_example_once_and_masks_the_padding():
    order = epoch_order(jax.random.key(0), jnp.int32(0), 22, 8)
    assert order.shape == (3, 8)
    flat = np.asarray(order).ravel()
    assert sorted(flat[:22]) == list(range(22))
    assert list(flat[22:]) == [-1 - flat[0], -1 - flat[1]]
    assert list(flat[:22]) != list(range(22))


def test_the_order_is_a_function_of_key_and_epoch():
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.asarray(epoch_order(jax.random.key(seed), jnp.int32(epoch), 22, 8))

    np.testing.assert_array_equal(order(0, 1), order(0, 1))
    assert not np.array_equal(order(0, 1), order(0, 2))
    assert not np.array_equal(order(0, 1), order(1, 1))


@pytest.mark.slow
def test_a_segment_equals_plain_momentum_sgd_written_out(tiny: Config, dataset: ImageDataset):
    config = no_dropout(edit(tiny, optim={"learning_rate": 0.1}))
    state, seen = run(config, dataset, 4)
    model = Setup.of(config, dataset).model

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params, images, labels):
        logits = model.apply({"params": params}, images)
        return losses.cross_entropy(logits, labels).mean()

    params = initial(config, dataset).params
    velocity = jax.tree.map(jnp.zeros_like, params)
    order_key = jax.random.split(keys(config)[1], 3)[0]
    expected = []
    for number in range(4):
        order = epoch_order(order_key, jnp.int32(number // 3), 22, 8)[number % 3]
        index = np.asarray(order)[np.asarray(order) >= 0]
        images = jnp.asarray(dataset.train.images[index], jnp.float32) / 255
        value, grads = value_and_grad(params, images, jnp.asarray(dataset.train.labels[index]))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        expected.append(float(value))
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    for name, leaf in trees.named_leaves(params).items():
        np.testing.assert_allclose(
            trees.named_leaves(state.params)[name], leaf, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("length", [1, 3, 7])
def test_bits_do_not_depend_on_the_segment_length(tiny: Config, dataset: ImageDataset, length: int):
    whole, _ = run(edit(tiny, runtime={"segment_steps": 2}), dataset, 6)
    other, _ = run(edit(tiny, runtime={"segment_steps": length}), dataset, 6)
    assert trees.sha256(whole) == trees.sha256(other)


def test_one_program_serves_every_segment(tiny: Config, dataset: ImageDataset):
    """Segments of one and two steps and further epochs are run without another compilation."""
    state = initial(tiny, dataset)
    segment = compile_segment(tiny, Setup.of(tiny, dataset), dataset, state, keys(tiny)[1])
    state, _ = segment(state, 2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    for length in (1, 2, 1, 2):
        state, _ = segment(state, length)
    assert compiled == []
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))  # the listener does hear compilations
    assert compiled
    jax.monitoring.clear_event_listeners()


def test_configs_that_differ_in_what_is_not_compiled_share_a_program(
    tiny: Config, dataset: ImageDataset
):
    other = edit(tiny, runtime={"checkpoint_seconds": 7.0, "seeds": 3}, data={"dir": "elsewhere"})
    other = replace(other, seed=5, name="other")
    assert Setup.of(tiny, dataset) == Setup.of(other, dataset)
    assert hash(Setup.of(tiny, dataset)) == hash(Setup.of(other, dataset))
    longer = edit(tiny, train={"epochs": 9})
    assert Setup.of(tiny, dataset) != Setup.of(longer, dataset)


def test_accumulation_gives_the_step_of_the_whole_batch(tiny: Config, dataset: ImageDataset):
    whole, whole_loss = run(no_dropout(tiny), dataset, 3)
    config = edit(no_dropout(tiny), train={"accumulate": 4})
    parts, parts_loss = run(config, dataset, 3)
    np.testing.assert_allclose(parts_loss, whole_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_parts_of_a_batch_drop_different_units(tiny: Config, dataset: ImageDataset):
    """With one image repeated, equal masks in all parts would give equal losses of the parts."""
    setup = Setup.of(edit(tiny, train={"accumulate": 2}), dataset)
    state = step.init_state(setup, jax.random.key(0))
    images = jnp.repeat(jnp.asarray(dataset.train.images[:1]), 8, axis=0)
    batch = Batch(images, jnp.zeros(8, jnp.int32), jnp.ones(8))
    halves = jax.tree.map(lambda x: x.at[4:].set(0) if x.ndim == 1 else x, batch)
    _, both, _ = train_step(setup, state, batch, jax.random.key(1))
    _, first, _ = train_step(setup, state, halves, jax.random.key(1))
    assert abs(float(both.loss) - 2 * float(first.loss)) > 1e-4


def test_ema_is_the_running_average_of_the_parameters(tiny: Config, dataset: ImageDataset):
    kernels = [np.asarray(run(tiny, dataset, n)[0].params["head"]["kernel"]) for n in (1, 2)]
    start = np.asarray(initial(tiny, dataset).params["head"]["kernel"])
    state, _ = run(edit(tiny, train={"ema_decay": 0.75}), dataset, 2)
    first = 2 / 11 * start + 9 / 11 * kernels[0]  # It begins with (1 + t) / (10 + t).
    expected = 0.25 * first + 0.75 * kernels[1]
    found = state.average["params"]["head"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.params["head"]["kernel"], kernels[1])
    np.testing.assert_array_equal(state.eval_variables["params"]["head"]["kernel"], found)


def normed(config: Config) -> Config:
    """Returns `config` with a small network that has BatchNorm."""
    model = {"name": "airbench", "blocks": ((4,),), "dense": (), "dropout": 0.0}
    return edit(config, model=model)


@pytest.mark.slow
def test_lookahead_goes_on_from_the_average_and_evaluates_it(tiny: Config, dataset: ImageDataset):
    """0.95^2 (2 / 6)^3 of the start stays after two of six steps, running statistics included."""

    def history(config: Config) -> list[tuple[dict[str, np.ndarray], ...]]:
        """Trained and evaluated variables, by name, after 0 to 3 steps."""
        found = []
        for n in range(4):
            state, _ = run(config, dataset, n)
            live = {"params": state.params, "batch_stats": state.batch_stats}
            found.append((leaves(live), leaves(state.eval_variables)))
        return found

    (start, _), (first, _), (after, _), _ = history(normed(tiny))
    averaged = history(edit(normed(tiny), train={"lookahead_steps": 2}))
    _, (one, average_of_one), (two, average_of_two), (three, average_of_three) = averaged
    kept = 0.95**2 * (2 / 6) ** 3
    for name in start:
        np.testing.assert_array_equal(one[name], first[name])
        np.testing.assert_array_equal(average_of_one[name], start[name])
        expected = kept * start[name] + (1 - kept) * after[name]
        np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(average_of_two[name], two[name])
        np.testing.assert_array_equal(average_of_three[name], two[name])
        assert not np.array_equal(three[name], two[name]), name


@pytest.mark.slow
def test_what_a_phase_freezes_keeps_its_last_value_not_its_average(
    tiny: Config, dataset: ImageDataset
):
    groups = (("whiten/.*", ((0, 1.0), (1, None))), (".*", 1.0))
    config = edit(normed(tiny), optim={"groups": groups}, train={"lookahead_steps": 2})
    before, _ = run(config, dataset, 3)
    last = leaves(before.params["whiten"])
    average = np.asarray(before.average["params"]["head"]["kernel"])
    entered = step.enter_phase(Setup.of(config, dataset).at(1), before)
    assert entered.average["params"]["whiten"] == {"bias": None, "kernel": None}
    np.testing.assert_array_equal(entered.average["params"]["head"]["kernel"], average)
    state, _ = run(config, dataset, 5)
    for name, leaf in last.items():
        np.testing.assert_array_equal(state.params["whiten"][name], leaf)
        np.testing.assert_array_equal(state.eval_variables["params"]["whiten"][name], leaf)


def test_batch_norm_sees_other_examples_as_padding_not_one_again_and_again(
    tiny: Config, dataset: ImageDataset
):
    """A batch padded with the whole set once more has the set's own mean and variance."""
    config = edit(normed(tiny), train={"batch_size": 22})
    exact, _ = run(config, dataset, 1)
    padded, _ = run(edit(config, train={"batch_size": 44}), dataset, 1)
    assert float(padded.epoch_sums.count) == 22
    np.testing.assert_allclose(padded.epoch_sums.loss, exact.epoch_sums.loss, rtol=1e-5)
    expected = trees.named_leaves(exact.batch_stats)
    for name, leaf in trees.named_leaves(padded.batch_stats).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_alternating_flip_is_drawn_by_example_and_turns_with_the_epoch(
    tiny: Config, dataset: ImageDataset, monkeypatch
):
    """Whatever step an example falls into, an epoch later its mirror image is trained on."""
    config = edit(no_dropout(tiny), augment={"flip": "alternate"}, optim={"learning_rate": 1e-9})
    seen: dict[int, list[tuple[int, bool]]] = {}

    def record(images, number):
        for image in np.asarray(images):
            for i, own in enumerate(dataset.train.images):
                for flipped, view in ((False, own), (True, own[:, ::-1])):
                    if np.array_equal(image, view):
                        seen.setdefault(int(number) // 3, []).append((i, flipped))

    def recorded(setup, state, batch, *rest):
        jax.debug.callback(record, batch.images, state.step)
        return train_step(setup, state, batch, *rest)

    monkeypatch.setattr(step, "train_step", recorded)
    jax.clear_caches()
    run(config, dataset, 6)
    jax.effects_barrier()
    first, second = (dict(seen[epoch]) for epoch in (0, 1))
    assert set(first) == set(second) == set(range(22))
    assert second == {i: not flipped for i, flipped in first.items()}
    assert 4 < sum(first.values()) < 18
    jax.clear_caches()


def test_epoch_sums_are_those_of_every_example(tiny: Config, dataset: ImageDataset):
    state, seen = run(tiny, dataset, 6)
    assert float(state.epoch_sums.count) == 22
    np.testing.assert_allclose(state.epoch_sums.loss, seen[3:] @ [8, 8, 6], rtol=1e-5)


def test_seeds_change_the_run(tiny: Config, dataset: ImageDataset):
    one, two, again = (
        trees.sha256(run(replace(tiny, seed=seed), dataset, 3)[0].params) for seed in (1, 2, 1)
    )
    assert one == again != two


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_stay_float32(tiny: Config, dataset: ImageDataset, dtype: str):
    state, _ = run(edit(tiny, model={"dtype": dtype}), dataset, 1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("optimizer", ["momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(tiny: Config, dataset: ImageDataset, optimizer: str):
    rate = {"momentum": 0.1, "nesterov": 0.1, "sgd": 0.5}.get(optimizer, 0.01)
    config = no_dropout(edit(tiny, optim={"name": optimizer, "learning_rate": rate}))
    _, seen = run(edit(config, train={"epochs": 20}), dataset, 60)
    assert seen[-6:].mean() < 0.5 * seen[:3].mean()


def test_a_batch_larger_than_the_set_is_padded(tiny: Config, dataset: ImageDataset):
    state, _ = run(edit(tiny, train={"batch_size": 64}), dataset, 1)
    assert float(state.epoch_sums.count) == 22


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("groups", [(), ((".*", ((0, 1.0), (1, 1.0))),)])
def test_a_step_has_its_own_rate_however_many_were_skipped_before(
    tiny: Config, dataset: ImageDataset, optimizer: str, groups: tuple
):
    """The optimizer's state is that of a first step at steps 0 and 4 of 6."""
    settings = {"name": optimizer, "schedule": "linear", "groups": groups}
    config = no_dropout(edit(tiny, optim=settings))
    setup, start = Setup.of(config, dataset), initial(config, dataset)
    images, labels = dataset.train.images[:8], dataset.train.labels[:8]
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))

    def moved(number: int) -> np.ndarray:
        state = replace(start, step=jnp.int32(number))
        after, *_ = train_step(setup, state, batch, jax.random.key(0))
        return np.asarray(after.params["head"]["kernel"] - start.params["head"]["kernel"])

    np.testing.assert_allclose(moved(4), moved(0) / 3, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_skipping_changes_nothing_where_all_is_finite(tiny: Config, dataset: ImageDataset):
    plain, _ = run(tiny, dataset, 6)
    skipping, _ = run(edit(tiny, train={"skip_nonfinite": True}), dataset, 6)
    for name, leaf in trees.named_leaves(plain).items():
        np.testing.assert_allclose(trees.named_leaves(skipping)[name], leaf, rtol=1e-5, atol=1e-7)


def test_the_norm_is_computed_only_where_it_is_wanted(tiny: Config, dataset: ImageDataset):
    setup, state = Setup.of(tiny, dataset), initial(tiny, dataset)
    batch = Batch(jnp.asarray(dataset.train.images[:8]), jnp.zeros(8, jnp.int32), jnp.ones(8))
    *_, norm = train_step(setup, state, batch, jax.random.key(0), with_norm=False)
    assert norm == -1
    *_, norm = train_step(setup, state, batch, jax.random.key(0))
    assert norm > 0


def test_optax_updates_are_what_the_state_keeps(tiny: Config, dataset: ImageDataset):
    """The velocity is one array a parameter, no more: what a step must read and write."""
    state = initial(tiny, dataset)
    velocities = optax.tree_utils.tree_get(state.opt_state, "trace")
    assert trees.param_count(velocities) == trees.param_count(state.params)


@pytest.mark.slow
@pytest.mark.xla
def test_no_parameter_is_copied_in_a_step(tiny: Config, dataset: ImageDataset):
    """XLA updates them where they lie, although the backward pass reads them too."""
    config = edit(no_dropout(tiny), model={"dense": (72, 40)})
    data = dataset.train.images, dataset.train.labels, keys(config)[1], np.int32(1)
    inputs = [mesh.replicate(array) for array in data]
    lowered = step.train_segment.lower(Setup.of(config, dataset), initial(config, dataset), *inputs)
    program = lowered.compile().as_text()
    assert "f32[72,40]" in program
    assert re.findall(r"= f32\[72,40\]\S* copy\(", program) == []
