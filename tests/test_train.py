"""The training step against the same written out, and what `fit` keeps, resumes and stops on."""

import io
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from cnn_jax import loop, losses, train, trees
from cnn_jax.checkpoint import Checkpoints
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog
from cnn_jax.stop import Stopped


def quiet(workdir: Path) -> RunLog:
    return RunLog(workdir, Console(file=io.StringIO()))


def edit(config: Config, **sections: dict) -> Config:
    """Returns `config` with fields of its sections replaced."""
    return replace(config, **{k: replace(getattr(config, k), **v) for k, v in sections.items()})


def run(trainer: loop.Trainer, steps: int) -> tuple[train.TrainState, np.ndarray]:
    """Returns the state and the mean losses after so many steps from the start."""
    state = trainer.init()
    trainer.compile(state)
    seen: list[float] = []
    while len(seen) < steps:
        length = min(trainer.segment_length(len(seen)), steps - len(seen))
        state, history = trainer.run_segment(state, length)
        seen += (history.sums.loss / history.sums.count).tolist()
    return state, np.array(seen)


def fit_until(
    step: int, trainer: loop.Trainer, workdir: Path, monkeypatch, signum: int = signal.SIGTERM
) -> None:
    """Trains until a signal comes in the segment that ends with `step`, and stops there."""
    run_segment = loop.Trainer.run_segment

    def interrupted(self, state, n_steps):
        state, history = run_segment(self, state, n_steps)
        if int(state.step) == step:
            os.kill(os.getpid(), signum)
        return state, history

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"after step {step}"):
        patch.setattr(loop.Trainer, "run_segment", interrupted)
        loop.fit(trainer, workdir, quiet(workdir))


def no_dropout(config: Config) -> Config:
    return edit(config, model={"dropout": 0.0})


def lines(workdir: Path) -> list[dict]:
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_uses_every_example_once_and_masks_the_padding():
    order = train.epoch_order(jax.random.key(0), jnp.int32(0), 22, 8)
    assert order.shape == (3, 8)
    flat = np.asarray(order).ravel()
    assert sorted(flat[:22]) == list(range(22))
    assert list(flat[22:]) == [-1 - flat[0], -1 - flat[1]]
    assert list(flat[:22]) != list(range(22))


def test_the_order_is_a_function_of_key_and_epoch():
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.asarray(train.epoch_order(jax.random.key(seed), jnp.int32(epoch), 22, 8))

    np.testing.assert_array_equal(order(0, 1), order(0, 1))
    assert not np.array_equal(order(0, 1), order(0, 2))
    assert not np.array_equal(order(0, 1), order(1, 1))


def test_a_segment_equals_plain_momentum_sgd_written_out(tiny: Config, dataset: ImageDataset):
    config = no_dropout(edit(tiny, optim={"learning_rate": 0.1}))
    trainer = loop.Trainer(config, dataset)
    state, seen = run(trainer, 4)

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params, images, labels):
        logits = trainer.recipe.model.apply({"params": params}, images)
        return losses.cross_entropy(logits, labels).mean()

    params = trainer.init().params
    velocity = jax.tree.map(jnp.zeros_like, params)
    order_key, _ = jax.random.split(jax.random.split(jax.random.key(config.seed))[1])
    expected = []
    for step in range(4):
        order = train.epoch_order(order_key, jnp.int32(step // 3), 22, 8)[step % 3]
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
    whole, _ = run(loop.Trainer(edit(tiny, train={"segment_steps": 2}), dataset), 6)
    other, _ = run(loop.Trainer(edit(tiny, train={"segment_steps": length}), dataset), 6)
    assert trees.sha256(whole) == trees.sha256(other)


def test_one_program_serves_every_segment(tiny: Config, dataset: ImageDataset):
    """Segments of one and two steps and further epochs are run without another compilation."""
    trainer = loop.Trainer(tiny, dataset)
    state = trainer.init()
    trainer.compile(state)
    state, _ = trainer.run_segment(state, 2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    for length in (1, 2, 1, 2):
        state, _ = trainer.run_segment(state, length)
    assert compiled == []
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))  # the listener does hear compilations
    assert compiled
    jax.monitoring.clear_event_listeners()


def test_accumulation_gives_the_step_of_the_whole_batch(tiny: Config, dataset: ImageDataset):
    whole, whole_loss = run(loop.Trainer(no_dropout(tiny), dataset), 3)
    config = edit(no_dropout(tiny), train={"accumulate": 4})
    parts, parts_loss = run(loop.Trainer(config, dataset), 3)
    np.testing.assert_allclose(parts_loss, whole_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_parts_of_a_batch_drop_different_units(tiny: Config, dataset: ImageDataset):
    """With one image repeated, equal masks in all parts would give equal losses of the parts."""
    recipe = train.make_recipe(edit(tiny, train={"accumulate": 2}), 3, 3)
    state = train.init_state(recipe, jax.random.key(0), (8, 8, 3))
    images = jnp.repeat(jnp.asarray(dataset.train.images[:1]), 8, axis=0)
    batch = train.Batch(images, jnp.zeros(8, jnp.int32), jnp.ones(8))
    halves = jax.tree.map(lambda x: x.at[4:].set(0) if x.ndim == 1 else x, batch)
    _, both, _ = train.train_step(recipe, state, batch, jax.random.key(1))
    _, first, _ = train.train_step(recipe, state, halves, jax.random.key(1))
    assert abs(float(both.loss) - 2 * float(first.loss)) > 1e-4


def test_ema_is_the_running_average_of_the_parameters(tiny: Config, dataset: ImageDataset):
    averaged = loop.Trainer(edit(tiny, train={"ema_decay": 0.75}), dataset)
    plain = loop.Trainer(tiny, dataset)
    kernels = [np.asarray(run(plain, n)[0].params["head"]["kernel"]) for n in (1, 2)]
    start = np.asarray(plain.init().params["head"]["kernel"])
    state, _ = run(averaged, 2)
    expected = 0.75 * (0.75 * start + 0.25 * kernels[0]) + 0.25 * kernels[1]
    found = state.average["params"]["head"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.params["head"]["kernel"], kernels[1])
    np.testing.assert_array_equal(state.eval_variables["params"]["head"]["kernel"], found)


def normed(config: Config) -> Config:
    """Returns `config` with a small network that has BatchNorm."""
    model = {"name": "airbench", "blocks": ((4,),), "dense": (), "dropout": 0.0}
    return edit(config, model=model)


def test_lookahead_goes_on_from_the_average_and_evaluates_it(tiny: Config, dataset: ImageDataset):
    """0.95^2 (2 / 6)^3 of the start stays after two of six steps, running statistics included."""
    trainer = loop.Trainer(edit(normed(tiny), train={"lookahead_steps": 2}), dataset)
    plain = loop.Trainer(normed(tiny), dataset)

    def leaves(trainer: loop.Trainer) -> list[tuple[dict[str, np.ndarray], ...]]:
        """What is trained and what is evaluated, by name, after 0 to 3 steps."""
        state, found = trainer.init(), []
        trainer.compile(state)
        for _ in range(4):
            live = {"params": state.params, "batch_stats": state.batch_stats}
            both = jax.tree.map(np.array, (live, state.eval_variables))
            found.append(tuple(map(trees.named_leaves, both)))
            state, _ = trainer.run_segment(state, 1)
        return found

    (start, _), (first, _), (after, _), _ = leaves(plain)
    _, (one, average_of_one), (two, average_of_two), (three, average_of_three) = leaves(trainer)
    kept = 0.95**2 * (2 / 6) ** 3
    for name in start:
        np.testing.assert_array_equal(one[name], first[name])
        np.testing.assert_array_equal(average_of_one[name], start[name])
        expected = kept * start[name] + (1 - kept) * after[name]
        np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(average_of_two[name], two[name])
        np.testing.assert_array_equal(average_of_three[name], two[name])
        assert not np.array_equal(three[name], two[name]), name


def test_what_a_phase_freezes_keeps_its_last_value_not_its_average(
    tiny: Config, dataset: ImageDataset
):
    groups = (("whiten/.*", None), (".*", 1.0))
    config = edit(
        normed(tiny),
        optim={"phases": ((0, ((".*", 1.0),)), (1, groups))},
        train={"lookahead_steps": 2},
    )
    trainer = loop.Trainer(config, dataset)
    state, _ = run(trainer, 3)
    last = {name: np.asarray(leaf) for name, leaf in state.params["whiten"].items()}
    average = np.asarray(state.average["params"]["head"]["kernel"])
    state = trainer.enter_phase(state, 3)
    assert state.average["params"]["whiten"] == {"bias": None, "kernel": None}
    np.testing.assert_array_equal(state.average["params"]["head"]["kernel"], average)
    state, _ = trainer.run_segment(state, 2)
    for name, leaf in last.items():
        np.testing.assert_array_equal(state.params["whiten"][name], leaf)
        np.testing.assert_array_equal(state.eval_variables["params"]["whiten"][name], leaf)


def test_batch_norm_sees_other_examples_as_padding_not_one_again_and_again(
    tiny: Config, dataset: ImageDataset
):
    """A batch padded with the whole set once more has the set's own mean and variance."""
    config = edit(normed(tiny), train={"batch_size": 22})
    exact, _ = run(loop.Trainer(config, dataset), 1)
    padded, _ = run(loop.Trainer(edit(config, train={"batch_size": 44}), dataset), 1)
    assert float(padded.epoch_sums.count) == 22
    np.testing.assert_allclose(padded.epoch_sums.loss, exact.epoch_sums.loss, rtol=1e-5)
    expected = trees.named_leaves(exact.batch_stats)
    for name, leaf in trees.named_leaves(padded.batch_stats).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_alternating_flip_is_drawn_by_example_and_turns_with_the_epoch(
    tiny: Config, dataset: ImageDataset, monkeypatch
):
    """Whatever step an example falls into, an epoch later its mirror image is trained on."""
    config = edit(no_dropout(tiny), augment={"alternate_flip": True}, optim={"learning_rate": 1e-9})
    seen: dict[int, list[tuple[int, bool]]] = {}

    def record(images, step):
        for image in np.asarray(images):
            for i, own in enumerate(dataset.train.images):
                for flipped, view in ((False, own), (True, own[:, ::-1])):
                    if np.array_equal(image, view):
                        seen.setdefault(int(step) // 3, []).append((i, flipped))

    original = train.train_step

    def recorded(recipe, state, batch, *rest):
        jax.debug.callback(record, batch.images, state.step)
        return original(recipe, state, batch, *rest)

    monkeypatch.setattr(train, "train_step", recorded)
    run(loop.Trainer(config, dataset), 6)
    jax.effects_barrier()
    first, second = (dict(seen[epoch]) for epoch in (0, 1))
    assert set(first) == set(second) == set(range(22))
    assert second == {i: not flipped for i, flipped in first.items()}
    assert 4 < sum(first.values()) < 18


def test_decays_are_checked_against_the_parameters(tiny: Config, dataset: ImageDataset):
    decays = (("haed/.*", 0.1), (".*/kernel", 0.2))
    with pytest.raises(UserError, match=r"^optim.decays: .*block1/conv1/bias.*haed"):
        loop.Trainer(edit(tiny, optim={"decays": decays}), dataset)


def test_epoch_sums_are_those_of_every_example(tiny: Config, dataset: ImageDataset):
    state, seen = run(loop.Trainer(tiny, dataset), 6)
    assert float(state.epoch_sums.count) == 22
    np.testing.assert_allclose(state.epoch_sums.loss, seen[3:] @ [8, 8, 6], rtol=1e-5)


def test_seeds_change_the_run(tiny: Config, dataset: ImageDataset):
    one, two, again = (
        trees.sha256(run(loop.Trainer(replace(tiny, seed=seed), dataset), 3)[0].params)
        for seed in (1, 2, 1)
    )
    assert one == again != two


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_stay_float32(tiny: Config, dataset: ImageDataset, dtype: str):
    state, _ = run(loop.Trainer(edit(tiny, model={"dtype": dtype}), dataset), 1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("optimizer", ["momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(tiny: Config, dataset: ImageDataset, optimizer: str):
    rate = {"momentum": 0.1, "nesterov": 0.1, "sgd": 0.5}.get(optimizer, 0.01)
    config = no_dropout(edit(tiny, optim={"name": optimizer, "learning_rate": rate}))
    _, seen = run(loop.Trainer(edit(config, train={"epochs": 20}), dataset), 60)
    assert seen[-6:].mean() < 0.5 * seen[:3].mean()


def test_fit_learns_and_writes_a_line_a_step(tiny: Config, dataset: ImageDataset, workdir: Path):
    config = edit(tiny, train={"epochs": 15}, optim={"name": "adam", "learning_rate": 0.01})
    trainer = loop.Trainer(no_dropout(config), dataset)
    state, progress = loop.fit(trainer, workdir, quiet(workdir))
    assert trainer.evaluate(state, dataset.test).accuracy == 1.0
    written = lines(workdir)
    assert [line["step"] for line in written] == list(range(1, 46))
    epochs = [line for line in written if "epoch" in line]
    assert [line["epoch"] for line in epochs] == list(range(1, 16))
    assert {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"} <= set(
        epochs[0]
    )
    assert progress.best_accuracy == max(line["validation_accuracy"] for line in epochs)


def test_zero_epochs_return_the_network_as_it_starts(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    trainer = loop.Trainer(edit(tiny, train={"epochs": 0}), dataset)
    state, _ = loop.fit(trainer, workdir, quiet(workdir))
    assert trees.sha256(state.params) == trees.sha256(trainer.init().params)


def test_a_batch_larger_than_the_set_is_padded(tiny: Config, dataset: ImageDataset):
    state, _ = run(loop.Trainer(edit(tiny, train={"batch_size": 64}), dataset), 1)
    assert float(state.epoch_sums.count) == 22


def test_a_signal_saves_and_a_rerun_ends_bitwise_equal(
    tiny: Config, dataset: ImageDataset, tmp_path: Path, monkeypatch
):
    config = edit(tiny, train={"epochs": 3, "ema_decay": 0.9})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected, _ = loop.fit(loop.Trainer(config, dataset), whole, quiet(whole))

    fit_until(5, loop.Trainer(config, dataset), cut, monkeypatch)
    state, _ = loop.fit(loop.Trainer(config, dataset), cut, quiet(cut))
    assert trees.sha256(state) == trees.sha256(expected)

    def steps(folder: Path) -> list[dict]:
        timed = lines(folder)
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in timed]

    assert steps(cut) == steps(whole)


def test_changed_images_are_not_trained_on(tiny: Config, dataset: ImageDataset, workdir: Path):
    loop.fit(loop.Trainer(tiny, dataset), workdir, quiet(workdir))
    images = dataset.train.images.copy()
    images[0, 0, 0, 0] ^= 1
    other = replace(dataset, train=replace(dataset.train, images=images))
    with pytest.raises(UserError, match="images are not those"):
        loop.fit(loop.Trainer(tiny, other), workdir, quiet(workdir))


def test_early_stopping_returns_the_best_parameters(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    """Validation accuracy, given here, peaks in epoch 2; patience 3 stops after epoch 5."""
    figures = iter([0.3, 0.6, 0.5, 0.6, 0.4, 0.9])
    evaluate = loop.Trainer.evaluate

    def given(self, state, split):
        return replace(evaluate(self, state, split), accuracy=next(figures))

    monkeypatch.setattr(loop.Trainer, "evaluate", given)
    config = edit(tiny, train={"epochs": 9, "patience": 3})
    state, progress = loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    assert lines(workdir)[-1]["step"] == 15
    assert (progress.best_epoch, progress.best_accuracy) == (2, 0.6)
    assert int(state.step) == 6
    expected, _ = run(loop.Trainer(config, dataset), 6)
    assert trees.sha256(state) == trees.sha256(expected)


def test_a_damaged_best_checkpoint_is_not_replaced_by_the_last_state(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    config = edit(tiny, train={"epochs": 3, "patience": 3})
    _, progress = loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    for path in (workdir / "checkpoints/best").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    said = f"checkpoints/best holds no whole checkpoint of epoch {progress.best_epoch}, the best"
    with pytest.raises(UserError, match=said):
        loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"augment": {"translate": 8}}, "augment.translate must be less than the images' side, 8"),
        ({"augment": {"cutout": 15}}, "augment.cutout hides all of images with sides of 8"),
        ({"train": {"epochs": 2**30}}, "train.epochs: 3221225472 steps are more than int32"),
    ],
)
def test_what_the_images_rule_out_is_refused(
    tiny: Config, dataset: ImageDataset, sections: dict, said: str
):
    with pytest.raises(UserError, match=said):
        loop.Trainer(edit(tiny, **sections), dataset)
    allowed = {k: {name: n - 1 for name, n in v.items()} for k, v in sections.items()}
    if "augment" in sections:
        loop.Trainer(edit(tiny, **allowed), dataset)


def test_checkpoints_are_saved_in_an_epoch_when_due(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    config = edit(tiny, train={"checkpoint_seconds": 0.0, "keep_checkpoints": 9})
    loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    with Checkpoints(workdir, "latest") as store:
        assert store.steps() == [2, 3, 5, 6]
    lazy = workdir.parent / "lazy"
    lazy.mkdir()
    config = edit(tiny, train={"checkpoint_seconds": 999.0, "keep_checkpoints": 9})
    loop.fit(loop.Trainer(config, dataset), lazy, quiet(lazy))
    with Checkpoints(lazy, "latest") as store:
        assert store.steps() == [3, 6]


def with_gradients(monkeypatch, change) -> None:
    """Puts `change(step, grads)` in the place of the gradients of every step."""
    gradients = train._gradients

    def changed(recipe, state, batch, key):
        grads, batch_stats, sums = gradients(recipe, state, batch, key)
        return change(state.step, grads), batch_stats, sums

    monkeypatch.setattr(train, "_gradients", changed)


def spoil(layer: str, name: str, value: float, *steps: int):
    """Returns a change of gradients: one element becomes `value` at the given steps, from 1."""

    def change(step, grads):
        leaf = grads[layer][name]
        at = jnp.isin(step + 1, jnp.array(steps))
        spoiled = leaf.at[(0,) * leaf.ndim].set(value)
        return grads | {layer: grads[layer] | {name: jnp.where(at, spoiled, leaf)}}

    return change


def saved_states(workdir: Path) -> dict[int, bool]:
    """Returns, for each checkpoint of a run, whether all that it holds is finite."""
    found = {}
    for kind in ("latest", "best"):
        with Checkpoints(workdir, kind) as store:
            for step in store.steps():
                arrays = store.read(step, lambda name: True).arrays.values()
                found[step] = all(np.isfinite(array).all() for array in arrays)
    return found


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    config = edit(tiny, optim={"learning_rate": 1e30}, train={"checkpoint_seconds": 0.0})
    with pytest.raises(UserError, match=r"loss nan, learning rate 1e\+30, gradient norm nan at st"):
        loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    assert all(saved_states(workdir).values())


@pytest.mark.parametrize(
    ("step", "value", "named", "kept"),
    [(4, np.nan, 5, [3]), (6, np.inf, 6, [3]), (3, -np.inf, 3, [])],
)
def test_a_gradient_that_is_not_finite_stops_the_run_at_its_segment(
    tiny: Config,
    dataset: ImageDataset,
    workdir: Path,
    monkeypatch,
    step: int,
    value: float,
    named: int,
    kept: list[int],
):
    """Segments end at steps 3 and 6; within one, the next step's loss tells."""
    with_gradients(monkeypatch, spoil("head", "kernel", value, step))
    config = edit(tiny, train={"segment_steps": 3, "keep_checkpoints": 9})
    with pytest.raises(UserError, match=f"rate 0.01, gradient norm (nan|inf) at step {named}: no"):
        loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    assert saved_states(workdir) == dict.fromkeys(kept, True)
    assert [line["step"] for line in lines(workdir)] == list(range(1, max(kept, default=0) + 1))


def test_an_infinite_bias_that_a_relu_hides_is_noticed(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    with_gradients(monkeypatch, spoil("fc1", "bias", np.inf, 4))
    config = edit(tiny, train={"checkpoint_seconds": 0.0, "keep_checkpoints": 9})
    with pytest.raises(UserError, match=r"loss 1\.\d+, learning rate .*norm \d.* step 5"):
        loop.fit(loop.Trainer(no_dropout(config), dataset), workdir, quiet(workdir))
    assert saved_states(workdir) == {2: True, 3: True}


def test_the_gradient_norm_of_a_segment_s_last_step_is_recorded(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    with_gradients(monkeypatch, lambda step, grads: jax.tree.map(jnp.ones_like, grads))
    trainer = loop.Trainer(tiny, dataset)
    loop.fit(trainer, workdir, quiet(workdir))
    norms = {line["step"]: line["grad_norm"] for line in lines(workdir) if "grad_norm" in line}
    expected = trees.param_count(trainer.init().params) ** 0.5
    assert norms == pytest.approx(dict.fromkeys((2, 3, 5, 6), expected))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_are_not_finite_are_skipped_and_counted(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch, accumulate: int
):
    """A skipped step leaves everything but the step number as it was."""
    config = edit(tiny, train={"skip_nonfinite": True, "ema_decay": 0.5, "accumulate": accumulate})
    with_gradients(monkeypatch, spoil("fc1", "kernel", np.nan, 2, 6))
    trainer = loop.Trainer(config, dataset)
    state, progress = loop.fit(trainer, workdir, quiet(workdir))
    assert progress.skipped_steps == 2
    written = lines(workdir)
    assert [line["step"] for line in written if line.get("skipped")] == [2, 6]
    assert [line["step"] for line in written if line["loss"] is None] == [2, 6]
    assert [line["step"] for line in written if line["grad_norm"] is None] == [2, 6]
    assert float(state.epoch_sums.count) == 16  # the last batch, of 6, was the skipped one
    before, after = (run(trainer, n)[0] for n in (5, 6))
    for name in ("params", "opt_state", "average", "epoch_sums"):
        assert trees.sha256(getattr(before, name)) == trees.sha256(getattr(after, name))
    assert (int(before.step), int(after.step)) == (5, 6)
    monkeypatch.undo()
    assert trees.sha256(run(loop.Trainer(config, dataset), 1)[0]) == trees.sha256(
        run(trainer, 1)[0]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("phases", [(), ((0, ((".*", 1.0),)), (1, ((".*", 1.0),)))])
def test_a_step_has_its_own_rate_however_many_were_skipped_before(
    tiny: Config, dataset: ImageDataset, optimizer: str, phases: tuple
):
    """The optimizer's state is that of a first step at steps 0 and 4 of 6."""
    settings = {"name": optimizer, "schedule": "linear", "phases": phases}
    trainer = loop.Trainer(no_dropout(edit(tiny, optim=settings)), dataset)
    images, labels = dataset.train.images[:8], dataset.train.labels[:8]
    batch = train.Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(8))

    def moved(step: int) -> np.ndarray:
        state = replace(trainer.init(), step=jnp.int32(step))
        after, *_ = train.train_step(trainer.recipe, state, batch, jax.random.key(0))
        before, after = (s.params["head"]["kernel"] for s in (trainer.init(), after))
        return np.asarray(after - before)

    np.testing.assert_allclose(moved(4), moved(0) / 3, rtol=1e-3, atol=1e-7)


def test_skipping_changes_nothing_where_all_is_finite(tiny: Config, dataset: ImageDataset):
    plain, _ = run(loop.Trainer(tiny, dataset), 6)
    config = edit(tiny, train={"skip_nonfinite": True})
    skipping, _ = run(loop.Trainer(config, dataset), 6)
    for name, leaf in trees.named_leaves(plain).items():
        np.testing.assert_allclose(trees.named_leaves(skipping)[name], leaf, rtol=1e-5, atol=1e-7)


def test_an_epoch_of_skipped_steps_stops_the_run(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    with_gradients(monkeypatch, spoil("fc1", "kernel", np.nan, 4, 5, 6))
    config = edit(tiny, train={"skip_nonfinite": True})
    with pytest.raises(UserError, match="skipped every step of epoch 2"):
        loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    assert saved_states(workdir) == {3: True}


def test_optax_updates_are_what_the_state_keeps(tiny: Config, dataset: ImageDataset):
    """The velocity is one array a parameter, no more: what a step must read and write."""
    state = loop.Trainer(tiny, dataset).init()
    velocities = optax.tree_utils.tree_get(state.opt_state, "trace")
    assert trees.param_count(velocities) == trees.param_count(state.params)


def test_no_parameter_is_copied_in_a_step(tiny: Config, dataset: ImageDataset):
    """XLA updates them where they lie, although the backward pass reads them too."""
    config = edit(no_dropout(tiny), model={"dense": (72, 40)})
    trainer = loop.Trainer(config, dataset)
    trainer.compile(trainer.init())
    program = trainer.compiled.as_text()
    assert "f32[72,40]" in program
    assert re.findall(r"= f32\[72,40\]\S* copy\(", program) == []
