"""What `fit` writes, resumes, stops on and calls."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.results import lines
from helpers.training import (
    change_gradients,
    edit,
    fit,
    fit_until,
    initial,
    no_dropout,
    quiet,
    run,
    train_run,
)

from cnn_jax import fit as fitting
from cnn_jax import trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.fit import Progress
from cnn_jax.hooks import Moment, every
from cnn_jax.runs import checkpoint
from cnn_jax.runs.checkpoint import Checkpoints
from cnn_jax.runs.folder import RunFolder


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps every checkpoint, to be looked at."""
    monkeypatch.setattr(checkpoint, "_KEPT", {"latest": None, "best": None})


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that makes one element of a gradient `value` at some steps, from 1."""

    def spoil(layer: str, name: str, value: float, *steps: int) -> None:
        def change(step, grads):
            leaf = grads[layer][name]
            at = jnp.isin(step + 1, jnp.array(steps))
            bad = leaf.at[(0,) * leaf.ndim].set(value)
            return grads | {layer: grads[layer] | {name: jnp.where(at, bad, leaf)}}

        change_gradients(monkeypatch, change)

    yield spoil
    jax.clear_caches()


@pytest.mark.slow
def test_fit_learns_and_writes_a_line_a_step(tiny: Config, dataset: ImageDataset, workdir: Path):
    config = edit(tiny, train={"epochs": 15}, optim={"name": "adam", "learning_rate": 0.01})
    result = fit(no_dropout(config), dataset, workdir)
    assert fitting.evaluate(result.predictor, dataset.test).accuracy == 1.0
    written = lines(workdir)
    assert [line["step"] for line in written] == list(range(1, 46))
    epochs = [line for line in written if "epoch" in line]
    assert [line["epoch"] for line in epochs] == list(range(1, 16))
    assert {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"} <= set(
        epochs[0]
    )
    assert "test_loss" not in epochs[0]
    assert result.progress.best == max(line["validation_accuracy"] for line in epochs)


def test_watching_the_test_set_adds_its_figures_and_changes_no_bit(
    tiny: Config, dataset: ImageDataset, workdir: Path, tmp_path: Path
):
    (tmp_path / "plain").mkdir()
    plain = fit(tiny, dataset, tmp_path / "plain")
    watched = fit(tiny, dataset, workdir, watch_test=True)
    assert trees.sha256(watched.state) == trees.sha256(plain.state)
    last = lines(workdir)[-1]
    found = fitting.evaluate(watched.predictor, dataset.test)
    assert (last["test_accuracy"], last["test_loss"]) == (found.accuracy, found.loss)


def test_zero_epochs_return_the_network_as_it_starts(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    config = edit(tiny, train={"epochs": 0})
    state = fit(config, dataset, workdir).state
    assert trees.sha256(state.params) == trees.sha256(initial(config, dataset).params)


@pytest.mark.slow
def test_a_signal_saves_and_a_rerun_ends_bitwise_equal(
    tiny: Config, dataset: ImageDataset, tmp_path: Path, monkeypatch
):
    config = edit(tiny, train={"epochs": 3, "ema_decay": 0.9})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = fit(config, dataset, whole).state
    fit_until(5, config, dataset, cut, monkeypatch)
    assert trees.sha256(fit(config, dataset, cut).state) == trees.sha256(expected)

    def steps(folder: Path) -> list[dict]:
        timed = lines(folder)
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in timed]

    assert steps(cut) == steps(whole)


@pytest.mark.slow
def test_more_epochs_end_in_the_bits_of_a_run_that_was_longer_from_the_start(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    """On a constant and on a step schedule; the metrics go on where they ended."""
    for name, schedule in (("constant", "constant"), ("steps", ((1.0, 0.5), (2.0, 0.1)))):
        config = edit(tiny, optim={"schedule": schedule})
        longer = edit(config, train={"epochs": 4})
        assert train_run(config, dataset, tmp_path / name)["epochs"] == 2
        extended = train_run(longer, dataset, tmp_path / name)
        whole = train_run(longer, dataset, tmp_path / f"{name}-whole")
        assert extended["params_sha256"] == whole["params_sha256"]
        assert extended["epochs"] == whole["epochs"] == 4
        assert [line["step"] for line in lines(tmp_path / name)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"optim": {"schedule": "cosine"}}, "optim.schedule=cosine depends on the number of epo"),
        ({"optim": {"schedule": "linear"}}, "optim.schedule=linear depends on the number of epo"),
        ({"train": {"lookahead_steps": 2}}, "train.lookahead_steps averages by the share of all"),
    ],
)
def test_more_epochs_are_refused_where_the_first_depend_on_them(
    tiny: Config, dataset: ImageDataset, workdir: Path, sections: dict, reason: str
):
    config = edit(tiny, **sections)
    train_run(config, dataset, workdir)
    with pytest.raises(UserError, match=f"2 epochs and can't be continued to 3: {reason}"):
        train_run(edit(config, train={"epochs": 3}), dataset, workdir)


def test_fewer_epochs_belong_to_another_run(tiny: Config, dataset: ImageDataset, workdir: Path):
    train_run(tiny, dataset, workdir)
    with pytest.raises(UserError, match=r"another config \(train.epochs: 2 -> 1\)"):
        train_run(edit(tiny, train={"epochs": 1}), dataset, workdir)


@pytest.mark.slow
def test_runtime_settings_and_the_data_folder_block_no_resume(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    whole = train_run(tiny, dataset, workdir.parent / "whole")
    with RunFolder(workdir, quiet).claim(tiny):
        fit_until(2, tiny, dataset, workdir, monkeypatch)
    other = edit(
        tiny,
        data={"dir": "moved"},
        runtime={"segment_steps": 7, "checkpoint_seconds": 0.0, "cache_dir": "cache"},
    )
    assert train_run(other, dataset, workdir)["params_sha256"] == whole["params_sha256"]


def test_changed_images_are_not_trained_on(tiny: Config, dataset: ImageDataset, workdir: Path):
    fit(tiny, dataset, workdir)
    images = dataset.train.images.copy()
    images[0, 0, 0, 0] ^= 1
    other = replace(dataset, train=replace(dataset.train, images=images))
    with pytest.raises(UserError, match="images are not those"):
        fit(tiny, other, workdir)


def test_early_stopping_returns_the_best_parameters(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    """Validation accuracy, set here, peaks in epoch 2; patience 3 stops after epoch 5."""
    figures = iter([0.3, 0.6, 0.5, 0.6, 0.4, 0.9])
    evaluate = fitting.evaluate

    def given(predictor, split):
        return replace(evaluate(predictor, split), accuracy=next(figures))

    monkeypatch.setattr(fitting, "evaluate", given)
    config = edit(tiny, train={"epochs": 9, "patience": 3})
    result = fit(config, dataset, workdir)
    assert lines(workdir)[-1]["step"] == 15
    assert (result.progress.best_epoch, result.progress.best) == (2, 0.6)
    assert int(result.state.step) == 6
    expected, _ = run(config, dataset, 6)
    assert trees.sha256(result.state) == trees.sha256(expected)


@pytest.mark.parametrize("monitor", ["balanced_accuracy", "macro_f1", "loss"])
def test_the_best_epoch_is_that_of_the_monitored_figure(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch, monitor: str
):
    """Figures, set here: each one is best in an epoch of its own, and epoch 1 has NaN logits."""
    figures = {
        "accuracy": [0.9, 0.8, 0.2, 0.1, 0.3],
        "balanced_accuracy": [0.9, 0.1, 0.8, 0.3, 0.2],
        "macro_f1": [0.9, 0.2, 0.3, 0.8, 0.1],
        "loss": [np.nan, 0.9, 0.8, 0.7, 0.1],
    }
    each = iter(
        [dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True)]
    )
    monkeypatch.setattr(fitting, "evaluate", lambda *_: SimpleNamespace(**next(each)))
    config = edit(tiny, train={"epochs": 5, "patience": 5, "monitor": monitor})
    result = fit(config, dataset, workdir)
    expected = {"balanced_accuracy": (3, 0.8), "macro_f1": (4, 0.8), "loss": (5, 0.1)}[monitor]
    assert (result.progress.best_epoch, result.progress.best) == expected
    assert int(result.state.step) == 3 * expected[0]
    ends = [line for line in lines(workdir) if "epoch" in line]
    assert [line["validation_macro_f1"] for line in ends] == figures["macro_f1"]


def test_progress_of_a_checkpoint_that_knew_accuracy_alone():
    old = {"seconds": 1.0, "images": 8, "best_epoch": 3, "skipped_steps": 0}
    found = Progress.of({"progress": {**old, "best_accuracy": 0.75}})
    assert (found.best, found.best_epoch, found.images) == (0.75, 3, 8)
    assert Progress.of({"progress": {**old, "best_accuracy": -1.0, "best_epoch": 0}}).best is None
    assert Progress.of({"progress": vars(found)}) == found


def test_a_damaged_best_checkpoint_is_not_replaced_by_the_last_state(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    config = edit(tiny, train={"epochs": 3, "patience": 3})
    progress = fit(config, dataset, workdir).progress
    for path in (workdir / "checkpoints/best").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    message = f"best holds no undamaged checkpoint of epoch {progress.best_epoch}, the best"
    with pytest.raises(UserError, match=message):
        fit(config, dataset, workdir)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"augment": {"translate": 8}}, "augment.translate must be less than the images' side, 8"),
        ({"augment": {"cutout": 15}}, "augment.cutout hides all of an image with sides of 8"),
        (
            {"augment": {"cutout": 8, "cutout_inside": True}},
            "augment.cutout hides all of an image with sides of 8",
        ),
        ({"train": {"epochs": 2**30}}, "train.epochs: 3221225472 steps are more than int32"),
        (
            {"optim": {"weight_decay": (("haed/.*", 0.1), (".*/kernel", 0.2))}},
            "^optim.weight_decay: .*block1/conv1/bias.*haed",
        ),
        (
            {"optim": {"groups": (("haed/.*", 0.1), (".*/kernel", None))}},
            "^optim.groups: .*block1/conv1/bias.*haed",
        ),
    ],
)
def test_a_config_that_the_images_or_the_network_rule_out_is_refused(
    tiny: Config, dataset: ImageDataset, workdir: Path, sections: dict, message: str
):
    with pytest.raises(UserError, match=message):
        fit(edit(tiny, **sections), dataset, workdir)
    assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize("field", [("translate", 7), ("cutout", 14)])
def test_the_largest_augmentation_that_leaves_something_is_accepted(
    tiny: Config, dataset: ImageDataset, workdir: Path, field: tuple[str, int]
):
    fit(edit(tiny, augment=dict([field]), train={"epochs": 1}), dataset, workdir)


@pytest.mark.usefixtures("keep_all")
def test_checkpoints_are_saved_in_an_epoch_when_due(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    fit(edit(tiny, runtime={"checkpoint_seconds": 0.0}), dataset, workdir)
    with Checkpoints(workdir, "latest") as store:
        assert store.steps() == [2, 3, 5, 6]
    lazy = workdir.parent / "lazy"
    lazy.mkdir()
    fit(edit(tiny, runtime={"checkpoint_seconds": 999.0}), dataset, lazy)
    with Checkpoints(lazy, "latest") as store:
        assert store.steps() == [3, 6]


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
    config = edit(tiny, optim={"learning_rate": 1e30}, runtime={"checkpoint_seconds": 0.0})
    with pytest.raises(UserError, match=r"loss nan, learning rate 1e\+30, gradient norm nan at st"):
        fit(config, dataset, workdir)
    assert all(saved_states(workdir).values())


@pytest.mark.slow
@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize(
    ("step", "value", "named", "kept"),
    [(4, np.nan, 5, [3]), (6, np.inf, 6, [3]), (3, -np.inf, 3, [])],
)
def test_a_gradient_that_is_not_finite_stops_the_run_at_its_segment(
    tiny: Config,
    dataset: ImageDataset,
    workdir: Path,
    spoiled,
    step: int,
    value: float,
    named: int,
    kept: list[int],
):
    """Segments end at steps 3 and 6; within one, the next step's loss shows it."""
    spoiled("head", "kernel", value, step)
    config = edit(tiny, runtime={"segment_steps": 3})
    with pytest.raises(UserError, match=f"rate 0.01, gradient norm (nan|inf) at step {named}: no"):
        fit(config, dataset, workdir)
    assert saved_states(workdir) == dict.fromkeys(kept, True)
    assert [line["step"] for line in lines(workdir)] == list(range(1, max(kept, default=0) + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("keep_all")
def test_an_infinite_bias_that_a_relu_hides_is_noticed(
    tiny: Config, dataset: ImageDataset, workdir: Path, spoiled
):
    spoiled("fc1", "bias", np.inf, 4)
    config = edit(tiny, runtime={"checkpoint_seconds": 0.0})
    with pytest.raises(UserError, match=r"loss 1\.\d+, learning rate .*norm \d.* step 5"):
        fit(no_dropout(config), dataset, workdir)
    assert saved_states(workdir) == {2: True, 3: True}


@pytest.mark.slow
def test_the_gradient_norm_of_a_segment_s_last_step_is_recorded(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    change_gradients(monkeypatch, lambda step, grads: jax.tree.map(jnp.ones_like, grads))
    fit(tiny, dataset, workdir)
    jax.clear_caches()
    norms = {line["step"]: line["grad_norm"] for line in lines(workdir) if "grad_norm" in line}
    expected = trees.param_count(initial(tiny, dataset).params) ** 0.5
    assert norms == pytest.approx(dict.fromkeys((2, 3, 5, 6), expected))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_are_not_finite_are_skipped_and_counted(
    tiny: Config, dataset: ImageDataset, workdir: Path, spoiled, monkeypatch, accumulate: int
):
    """A skipped step leaves everything but the step number as it was."""
    config = edit(tiny, train={"skip_nonfinite": True, "ema_decay": 0.5, "accumulate": accumulate})
    spoiled("fc1", "kernel", np.nan, 2, 6)
    result = fit(config, dataset, workdir)
    assert result.progress.skipped_steps == 2
    written = lines(workdir)
    assert [line["step"] for line in written if line.get("skipped")] == [2, 6]
    assert [line["step"] for line in written if line["loss"] is None] == [2, 6]
    assert [line["step"] for line in written if line["grad_norm"] is None] == [2, 6]
    assert float(result.state.epoch_sums.count) == 16  # the last batch, of 6, was skipped
    before, after = (run(config, dataset, n)[0] for n in (5, 6))
    for name in ("params", "opt_state", "average", "epoch_sums"):
        assert trees.sha256(getattr(before, name)) == trees.sha256(getattr(after, name))
    assert (int(before.step), int(after.step)) == (5, 6)
    with_change = trees.sha256(run(config, dataset, 1)[0])
    monkeypatch.undo()
    jax.clear_caches()
    assert trees.sha256(run(config, dataset, 1)[0]) == with_change


@pytest.mark.slow
def test_an_epoch_of_skipped_steps_stops_the_run(
    tiny: Config, dataset: ImageDataset, workdir: Path, spoiled
):
    spoiled("fc1", "kernel", np.nan, 4, 5, 6)
    config = edit(tiny, train={"skip_nonfinite": True})
    with pytest.raises(UserError, match="skipped every step of epoch 2"):
        fit(config, dataset, workdir)
    assert saved_states(workdir) == {3: True}


@pytest.mark.slow
def test_hooks_are_called_at_their_steps_and_epochs_and_change_no_bit(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    """Also between the ends of segments, of two steps here."""
    calls: dict[str, list] = {"steps": [], "epochs": [], "unmarked": []}

    @every(steps=5)
    def by_steps(moment: Moment) -> None:
        calls["steps"].append((moment.step, moment.metrics["step"]))

    @every(epochs=2)
    def by_epochs(moment: Moment) -> None:
        accuracy = fitting.evaluate(moment.predictor, dataset.validation).accuracy
        assert accuracy == moment.metrics["validation_accuracy"]
        calls["epochs"].append(moment.epoch)

    def unmarked(moment: Moment) -> None:
        assert moment.config == config
        calls["unmarked"].append(moment.epoch)

    config = edit(tiny, train={"epochs": 4})
    plain = workdir.parent / "plain"
    plain.mkdir()
    expected = fit(config, dataset, plain).state
    state = fit(config, dataset, workdir, hooks=(by_steps, by_epochs, unmarked)).state
    assert calls == {"steps": [(5, 5), (10, 10)], "epochs": [2, 4], "unmarked": [1, 2, 3, 4]}
    assert trees.sha256(state) == trees.sha256(expected)


@pytest.mark.parametrize("settings", [{}, {"steps": 2, "epochs": 1}, {"steps": -1}])
def test_every_wants_one_number(settings: dict):
    with pytest.raises(UserError, match="set one of them"):
        every(**settings)
