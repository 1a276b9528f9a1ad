"""Starting from another network's parameters, and unfreezing by epoch."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from helpers.training import (
    edit,
    fit,
    fit_until,
    initial,
    keys,
    leaves,
    quiet,
    run,
    train_run,
)

from cnn_jax import configs, fields, models, optim, pretrained, trees
from cnn_jax import fit as fitting
from cnn_jax.config import Config, InitConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.runs import checkpoint
from cnn_jax.runs.folder import RunFolder
from cnn_jax.step import Setup, TrainState

GRADUAL = (
    ("head/.*", ((0, 1.0), (1, 0.5), (2, 0.1))),
    ("fc1/.*", ((0, None), (1, 0.5), (2, 0.1))),
    (".*", ((0, None), (2, 0.1))),
)
"""The head alone, from epoch 1 also fc1, from epoch 2 all layers."""


@pytest.fixture
def source(tiny: Config, dataset: ImageDataset, tmp_path: Path) -> Path:
    """The workdir of a finished run, with best and latest parameters that differ."""
    path = tmp_path / "source"
    train_run(edit(tiny, train={"patience": 1, "epochs": 3}), dataset, path)
    return path


def start_state(config: Config, dataset: ImageDataset) -> TrainState:
    setup, folder = Setup.of(config, dataset), RunFolder(Path(), quiet)
    return fitting.start(config, setup, dataset, folder, keys(config)[0])


def started(config: Config, dataset: ImageDataset) -> dict[str, np.ndarray]:
    return leaves(start_state(config, dataset).params)


def start_from(config: Config, workdir: Path, *skip: str) -> Config:
    return replace(config, seed=5, init=InitConfig(checkpoint=str(workdir), skip=skip))


@pytest.mark.slow
def test_all_but_what_is_skipped_is_loaded(tiny: Config, dataset: ImageDataset, source: Path):
    fresh = leaves(initial(replace(tiny, seed=5), dataset).params)
    summary = json.loads((source / "summary.json").read_text())
    whole = started(start_from(tiny, source), dataset)
    assert trees.sha256(whole) == summary["params_sha256"]
    for name, leaf in started(start_from(tiny, source, "head/.*"), dataset).items():
        expected = fresh if name.startswith("head/") else whole
        np.testing.assert_array_equal(leaf, expected[name])
    assert not np.array_equal(whole["head/kernel"], fresh["head/kernel"])


@pytest.mark.parametrize(("patience", "kind"), [(0, "latest"), (1, "best")])
def test_the_checkpoint_is_the_one_that_its_run_reported_on(
    tiny: Config, dataset: ImageDataset, source: Path, patience: int, kind: str
):
    """With early stopping the best one."""
    fields.save(edit(tiny, train={"patience": patience}), source / "config.json")
    wanted, other = (
        trees.sha256(leaves(checkpoint.load_variables(source, name)[0]["params"]))
        for name in (kind, {"latest": "best", "best": "latest"}[kind])
    )
    assert wanted != other
    assert trees.sha256(started(start_from(tiny, source), dataset)) == wanted


def test_averaged_parameters_start_there_too(tiny: Config, dataset: ImageDataset, source: Path):
    config = start_from(edit(tiny, train={"ema_decay": 0.9}), source)
    state = start_state(config, dataset)
    assert trees.sha256(state.average["params"]) == trees.sha256(state.params)


@pytest.mark.slow
def test_what_differs_is_an_error_that_lists_both_sides(
    tiny: Config, dataset: ImageDataset, source: Path
):
    other = edit(start_from(tiny, source, "head/.*"), model={"dense": (6,)})
    with pytest.raises(UserError) as caught:
        started(other, dataset)
    assert str(caught.value) == (
        f"init.checkpoint={source} does not fit the network: it holds fc1/bias [8] float32, "
        "fc1/kernel [16, 8] float32, and this config needs fc1/bias [6] float32, "
        "fc1/kernel [16, 6] float32; init.skip names the parameters that are not loaded from it"
    )
    deeper = edit(start_from(tiny, source), model={"dense": (8, 3)})
    with pytest.raises(UserError, match=r"needs fc2/bias \[3\] float32"):
        started(deeper, dataset)
    shallower = edit(start_from(tiny, source, "head/.*"), model={"dense": (), "dropout": 0.0})
    with pytest.raises(UserError, match=r"it holds fc1/bias .* needs nothing else"):
        started(shallower, dataset)
    skipping = edit(start_from(tiny, source, "head/.*", "fc1/.*"), model={"dense": (6,)})
    assert started(skipping, dataset)["fc1/bias"].shape == (6,)


def load_into(found: dict, fresh: dict, init: InitConfig, monkeypatch) -> tuple[dict, list[str]]:
    """Returns the merged variables and the lines said, `found` being the checkpoint's."""
    said: list[str] = []
    monkeypatch.setattr(pretrained, "_load", lambda init: found)
    return pretrained.load_into(fresh, init, said.append), said


def test_another_dtype_does_not_fit(monkeypatch):
    fresh = {"params": {"x": np.zeros(3, np.float32)}, "batch_stats": {}}
    half = {"params": {"x": np.zeros(3, np.float16)}, "batch_stats": {}}
    with pytest.raises(UserError, match=r"holds x \[3\] float16, .* needs x \[3\] float32"):
        load_into(half, fresh, InitConfig(checkpoint="w"), monkeypatch)


def test_batch_statistics_come_with_the_parameters(monkeypatch):
    old = {"params": {}, "batch_stats": {"bn": {"mean": np.ones(3)}, "head": {"mean": np.ones(2)}}}
    new = {"params": {}, "batch_stats": {"bn": {"mean": np.zeros(3)}, "head": {"mean": np.ones(9)}}}
    init = InitConfig(checkpoint="w", skip=("head/.*",))
    merged, said = load_into(old, new, init, monkeypatch)
    np.testing.assert_array_equal(merged["batch_stats"]["bn"]["mean"], np.ones(3))
    assert merged["batch_stats"]["head"]["mean"].shape == (9,)
    assert said == ["loaded 1 parameter arrays from w; 1 are initialised at random"]


def test_a_skip_that_matches_nothing_is_an_error(tiny: Config, dataset: ImageDataset, source: Path):
    with pytest.raises(UserError, match=r"init.skip: haed/\.\* matches no parameter"):
        started(start_from(tiny, source, "haed/.*"), dataset)


def test_network_size_and_normalisation_come_with_the_checkpoint(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    seen = {"normalize": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)), "image_size": 8}
    train_run(edit(tiny, data=seen, train={"epochs": 0}), dataset, tmp_path / "source")
    wanted = start_from(configs.get("finetune_head"), tmp_path / "source")
    adopted = pretrained.adopt(wanted)
    assert adopted.model == tiny.model
    assert adopted.data == replace(wanted.data, **seen)
    assert replace(adopted, model=wanted.model, data=wanted.data) == wanted


def test_fields_that_the_user_sets_win_over_the_checkpoints(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    train_run(edit(tiny, data={"image_size": 8}, train={"epochs": 0}), dataset, tmp_path / "source")
    wanted = edit(
        start_from(configs.get("finetune_all"), tmp_path / "source"),
        model={"dropout": 0.125},
        data={"image_size": 16},
    )
    adopted = pretrained.adopt(wanted, frozenset({"model.dropout", "data.image_size"}))
    assert adopted.model == replace(tiny.model, dropout=0.125)
    assert adopted.data.image_size == 16


def test_a_checkpoint_that_is_not_there_is_one_line(tiny: Config, tmp_path: Path):
    with pytest.raises(UserError, match="gone"):
        pretrained.adopt(start_from(tiny, tmp_path / "gone"))


@pytest.mark.slow
def test_phases_train_what_they_name_and_keep_velocities(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    """Three steps an epoch; the states at the ends of all segments are looked at."""
    config = edit(
        tiny, optim={"groups": GRADUAL}, train={"epochs": 3}, runtime={"segment_steps": 1}
    )
    states: list[dict[str, np.ndarray]] = []
    entered: list[dict[str, np.ndarray]] = []
    compile_segment = fitting.compile_segment

    def recorded(*args):
        segment = compile_segment(*args)

        def run(state, n_steps):
            entered.append(leaves(state))
            state, history = segment(state, n_steps)
            states.append(leaves(state))
            return state, history

        return run

    monkeypatch.setattr(fitting, "compile_segment", recorded)
    states.append(leaves(initial(config, dataset)))
    fit(config, dataset, workdir)
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


@pytest.mark.slow
def test_adam_corrects_its_averages_for_the_steps_a_parameter_has_seen(
    tiny: Config, dataset: ImageDataset
):
    """The first step of a parameter that joins late has the size of the learning rate."""
    groups = (("head/.*", 1.0), (".*", ((0, None), (2, 1.0))))
    optimizer = {"name": "adam", "learning_rate": 0.01, "groups": groups}
    config = edit(tiny, optim=optimizer, train={"epochs": 3})
    before, after = (leaves(run(config, dataset, n)[0].params) for n in (6, 7))
    moved = np.abs(after["fc1/kernel"] - before["fc1/kernel"])
    assert 0.009 < moved.max() < 0.0101


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_phases_resume_bitwise(
    tiny: Config, dataset: ImageDataset, tmp_path: Path, monkeypatch, stop_at: int, name: str
):
    optimizer = {"name": name, "groups": GRADUAL, "weight_decay": 0.01, "clip_norm": 1.0}
    config = edit(tiny, optim=optimizer, train={"epochs": 3}, runtime={"segment_steps": 1})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    expected = fit(config, dataset, whole).state
    fit_until(stop_at, config, dataset, cut, monkeypatch)
    assert trees.sha256(fit(config, dataset, cut).state) == trees.sha256(expected)


@pytest.mark.slow
def test_the_best_of_an_earlier_phase_is_returned(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    figures = iter([0.9, 0.3, 0.2])
    evaluate = fitting.evaluate
    monkeypatch.setattr(
        fitting,
        "evaluate",
        lambda predictor, split: replace(evaluate(predictor, split), accuracy=next(figures)),
    )
    config = edit(tiny, optim={"groups": GRADUAL}, train={"epochs": 3, "patience": 2})
    result = fit(config, dataset, workdir)
    assert (int(result.state.step), result.progress.best_epoch) == (3, 1)


NETWORKS = [name for name in configs.CONFIGS if not name.startswith("finetune")]


@pytest.mark.parametrize("name", [n for n in configs.CONFIGS if n.startswith("finetune")])
@pytest.mark.parametrize("network", NETWORKS)
def test_fine_tuning_configs_divide_up_every_network(name: str, network: str):
    """Each named recipe fits each named network: patterns name no family's layers."""
    config = configs.get(name)
    assert config.init == InitConfig(checkpoint="runs/vgg3", skip=("head/.*",))
    model = models.build(configs.get(network).model, 10)
    names = inspection.param_names(model, (32, 32, 3))
    for _, groups in optim.make_phases(config.optim, partial(models.last_block, model)):
        optim.check_groups("optim.groups", groups, names)
        assert optim.multiplier(groups, "head/kernel") == 1.0
    assert fields.from_dict(json.loads(json.dumps(fields.to_dict(config)))) == config


ACCEPTED = "; it takes a run's folder, a .safetensors file of weights, or hf:REPO"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("net.h5", "is a .h5, which can't be read here"),
        ("net", "is a file of unknown kind, which can't be read here"),
        ("run/config.json", "is a file of a run; name its folder, run"),
        ("runs/vgg3", "does not exist; `./launch.sh vgg3` trains it"),
        ("gone.safetensors", "does not exist"),
        ("folder", "is a folder without config.json, so it is not a run's"),
        (
            "weights",
            "is a folder without config.json, so it is not a run's "
            "(did you mean weights/a.safetensors?)",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_is_one(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "folder", "weights"):
        Path(folder).mkdir()
    for file in ("net.h5", "net", "run/config.json", "weights/a.safetensors", "weights/b.txt"):
        Path(file).touch()
    config = Config(init=InitConfig(checkpoint=name))
    for refused in (lambda: pretrained.adopt(config), lambda: pretrained._load(config.init)):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value) == f"init.checkpoint={name} {why}{ACCEPTED}"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_file_of_pytorch_comes_with_the_command_that_converts_it(suffix: str, tmp_path: Path):
    path = tmp_path / f"net{suffix}"
    path.touch()
    with pytest.raises(UserError) as caught:
        pretrained.adopt(Config(init=InitConfig(checkpoint=str(path))))
    found = re.search(r'python -c "(.*)"; it takes', str(caught.value))
    assert found
    code = compile(found[1], "command", "exec")
    saved, torch = [], SimpleNamespace(load=lambda *_, **__: {"a": 1})
    modules = {
        "torch": torch,
        "safetensors.torch": SimpleNamespace(save_file=lambda *args: saved.append(args)),
    }
    with patch.dict(sys.modules, modules):
        exec(code, {})
    assert saved == [({"a": 1}, str(path.with_suffix(".safetensors")))]
