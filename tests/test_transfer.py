"""Starting from another network's parameters, and unfreezing by epoch."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_runs import finish
from test_train import edit, fit_until, quiet, run

from cnn_jax import checkpoint, configs, loop, models, optim, transfer, trees
from cnn_jax import config as configuration
from cnn_jax.config import Config, InitConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog

HEAD, FROZEN = ("head/.*", 1.0), (".*", None)
PHASES = ((0, (HEAD, FROZEN)), (1, (("(head|fc1)/.*", 0.5), FROZEN)), (2, ((".*", 0.1),)))


def leaves(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}


@pytest.fixture
def source(tiny: Config, dataset: ImageDataset, tmp_path: Path) -> Path:
    """The workdir of a finished run, with best and latest parameters that differ."""
    path = tmp_path / "source"
    finish(edit(tiny, train={"patience": 1, "epochs": 3}), dataset, path)
    return path


def started(config: Config, dataset: ImageDataset) -> dict[str, np.ndarray]:
    return leaves(loop.Trainer(config, dataset).start(RunLog(Path(), silent())).params)


def silent() -> Console:
    return Console(file=io.StringIO())


def start_from(config: Config, workdir: Path, *skip: str, kind: str = "") -> Config:
    init = InitConfig(checkpoint=str(workdir), skip=skip, kind=kind)  # pyright: ignore
    return replace(config, seed=5, init=init)


def test_all_but_what_is_skipped_is_taken(tiny: Config, dataset: ImageDataset, source: Path):
    fresh = leaves(loop.Trainer(replace(tiny, seed=5), dataset).init().params)
    summary = json.loads((source / "summary.json").read_text())
    whole = started(start_from(tiny, source), dataset)
    assert trees.sha256(whole) == summary["params_sha256"]
    for name, leaf in started(start_from(tiny, source, "head/.*"), dataset).items():
        expected = fresh if name.startswith("head/") else whole
        np.testing.assert_array_equal(leaf, expected[name])
    assert not np.array_equal(whole["head/kernel"], fresh["head/kernel"])


@pytest.mark.parametrize("kind", ["latest", "best"])
def test_kind_names_the_checkpoint(tiny: Config, dataset: ImageDataset, source: Path, kind: str):
    given, _ = checkpoint.load_variables(source, kind)
    found = started(start_from(tiny, source, kind=kind), dataset)
    assert trees.sha256(found) == trees.sha256(leaves(given["params"]))


def test_averaged_parameters_start_there_too(tiny: Config, dataset: ImageDataset, source: Path):
    config = start_from(edit(tiny, train={"ema_decay": 0.9}), source)
    state = loop.Trainer(config, dataset).start(RunLog(Path(), silent()))
    assert trees.sha256(state.average["params"]) == trees.sha256(state.params)


def test_what_differs_is_an_error_that_lists_both_sides(
    tiny: Config, dataset: ImageDataset, source: Path
):
    other = edit(start_from(tiny, source, "head/.*"), model={"dense": (6,)})
    with pytest.raises(UserError) as caught:
        started(other, dataset)
    assert str(caught.value) == (
        f"init.checkpoint={source} does not fit the network: it holds fc1/bias [8] float32, "
        "fc1/kernel [16, 8] float32, and this config needs fc1/bias [6] float32, "
        "fc1/kernel [16, 6] float32; init.skip names what is not to be taken from it"
    )
    deeper = edit(start_from(tiny, source), model={"dense": (8, 3)})
    with pytest.raises(UserError, match=r"needs fc2/bias \[3\] float32"):
        started(deeper, dataset)
    shallower = edit(start_from(tiny, source, "head/.*"), model={"dense": (), "dropout": 0.0})
    with pytest.raises(UserError, match=r"it holds fc1/bias .* needs nothing else"):
        started(shallower, dataset)
    skipping = edit(start_from(tiny, source, "head/.*", "fc1/.*"), model={"dense": (6,)})
    assert started(skipping, dataset)["fc1/bias"].shape == (6,)


def test_another_dtype_does_not_fit():
    params = {"params": {"x": np.zeros(3, np.float32)}, "batch_stats": {}}
    half = {"params": {"x": np.zeros(3, np.float16)}, "batch_stats": {}}
    with pytest.raises(UserError, match=r"holds x \[3\] float16, .* needs x \[3\] float32"):
        transfer.merge(half, params, InitConfig(checkpoint="w"))


def test_batch_statistics_come_with_the_parameters():
    old = {"params": {}, "batch_stats": {"bn": {"mean": np.ones(3)}, "head": {"mean": np.ones(2)}}}
    new = {"params": {}, "batch_stats": {"bn": {"mean": np.zeros(3)}, "head": {"mean": np.ones(9)}}}
    init = InitConfig(checkpoint="w", skip=("head/.*",))
    _, batch_stats, line = transfer.merge(old, new, init)
    np.testing.assert_array_equal(batch_stats["bn"]["mean"], np.ones(3))
    assert batch_stats["head"]["mean"].shape == (9,)
    assert line == "1 arrays from w, 1 from the seed"


def test_a_skip_that_matches_nothing_is_an_error(tiny: Config, dataset: ImageDataset, source: Path):
    with pytest.raises(UserError, match=r"init.skip: haed/\.\* matches no parameter"):
        started(start_from(tiny, source, "haed/.*"), dataset)


def test_network_size_and_normalisation_come_with_the_checkpoint(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    seen = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "image_size": 8}
    finish(edit(tiny, data=seen, train={"epochs": 0}), dataset, tmp_path / "source")
    wanted = start_from(configs.get("finetune_head"), tmp_path / "source")
    adopted = transfer.adopt(wanted, wanted.init)
    assert adopted.model == tiny.model
    assert adopted.data == replace(wanted.data, **seen)
    assert replace(adopted, model=wanted.model, data=wanted.data) == wanted


def test_a_checkpoint_that_is_not_there_is_one_line(tiny: Config, tmp_path: Path):
    with pytest.raises(UserError, match="gone is not a workdir"):
        transfer.adopt(tiny, InitConfig(checkpoint=str(tmp_path / "gone")))


def test_phases_train_what_they_name_and_keep_velocities(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    """Three steps an epoch; the states of all segments' ends are looked at."""
    config = edit(tiny, optim={"phases": PHASES}, train={"epochs": 3, "segment_steps": 1})
    states: list[dict[str, np.ndarray]] = []
    entered: list[dict[str, np.ndarray]] = []
    run_segment = loop.Trainer.run_segment

    def recorded(self, state, n_steps):
        entered.append(leaves(state))
        state, history = run_segment(self, state, n_steps)
        states.append(leaves(state))
        return state, history

    monkeypatch.setattr(loop.Trainer, "run_segment", recorded)
    trainer = loop.Trainer(config, dataset)
    states.append(leaves(trainer.init()))
    loop.fit(trainer, workdir, quiet(workdir))
    trained = [{"head"}, {"head", "fc1"}, {"head", "fc1", "block1", "block2"}]
    for step in range(9):
        before, after = states[step], states[step + 1]
        moved = {
            name.split("/")[1]
            for name in after
            if name.startswith("params/") and not np.array_equal(before[name], after[name])
        }
        assert moved == trained[step // 3], step
        traces = {name for name in after if "/trace/" in name}
        assert {name.split("/trace/")[1].split("/")[0] for name in traces} == trained[step // 3]
        kept = [name for name in before if "/trace/" in name]
        assert all(np.array_equal(entered[step][name], before[name]) for name in kept)
        assert step == 0 or any(np.any(before[name]) for name in kept)


def test_adam_corrects_its_averages_for_the_steps_a_parameter_has_seen(
    tiny: Config, dataset: ImageDataset
):
    """The first step of a parameter that joins late has the size of the learning rate."""
    phases = ((0, (HEAD, FROZEN)), (2, ((".*", 1.0),)))
    optimizer = {"name": "adam", "learning_rate": 0.01, "phases": phases}
    config = edit(tiny, optim=optimizer, train={"epochs": 3})
    trainer = loop.Trainer(config, dataset)
    state, _ = run(trainer, 6)
    before = leaves(state.params)
    state = trainer.enter_phase(state, 6)
    state, _ = trainer.run_segment(state, 1)
    moved = np.abs(leaves(state.params)["fc1/kernel"] - before["fc1/kernel"])
    assert 0.009 < moved.max() < 0.0101


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_phases_resume_bitwise(
    tiny: Config, dataset: ImageDataset, tmp_path: Path, monkeypatch, stop_at: int, name: str
):
    optimizer = {"name": name, "phases": PHASES, "weight_decay": 0.01, "clip_norm": 1.0}
    config = edit(tiny, optim=optimizer, train={"epochs": 3, "segment_steps": 1})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected, _ = loop.fit(loop.Trainer(config, dataset), whole, quiet(whole))
    fit_until(stop_at, loop.Trainer(config, dataset), cut, monkeypatch)
    state, _ = loop.fit(loop.Trainer(config, dataset), cut, quiet(cut))
    assert trees.sha256(state) == trees.sha256(expected)


def test_the_best_of_an_earlier_phase_is_returned(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    figures = iter([0.9, 0.3, 0.2])
    evaluate = loop.Trainer.evaluate
    monkeypatch.setattr(
        loop.Trainer,
        "evaluate",
        lambda self, state, split: replace(evaluate(self, state, split), accuracy=next(figures)),
    )
    config = edit(tiny, optim={"phases": PHASES}, train={"epochs": 3, "patience": 2})
    state, progress = loop.fit(loop.Trainer(config, dataset), workdir, quiet(workdir))
    assert (int(state.step), progress.best_epoch) == (3, 1)


@pytest.mark.parametrize("name", [n for n in configs.CONFIGS if n.startswith("finetune")])
def test_fine_tuning_configs_divide_up_the_chapters_networks(name: str):
    config = configs.get(name)
    assert config.init == InitConfig(checkpoint="runs/vgg3", skip=("head/.*",))
    for network in ("simple_cnn", "vgg2", "vgg_dropout"):
        model = configs.get(network).model
        names = models.param_names(models.build(model, 10), (32, 32, 3))
        for _, groups in optim.make_phases(config.optim, len(model.blocks), 1):
            optim.check_groups("optim.groups", groups, names)
            assert optim.multiplier(groups, "head/kernel") == 1.0
    assert configuration.from_dict(json.loads(json.dumps(configuration.to_dict(config)))) == config
