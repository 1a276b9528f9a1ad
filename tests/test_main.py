"""The command as a user types it: modes, and one line for mistakes that only a mode can see."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import SMALL, command, refuse

from cnn_jax.tools import MODES


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the small run was started in; the run is in its `run`."""
    cwd = tmp_path_factory.mktemp("trained")
    result = command(*SMALL, "--workdir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--train.epoch=3"], "unknown flag --train.epoch (did you mean --train.epochs?)"),
        (["--mode=evaluate"], "runs/quickstart does not exist"),
        (["--mode=predict", "--workdir=nowhere", "x.png"], "nowhere/config.json does not exist"),
        (["--mode=compare", "nowhere", "."], "nowhere is not the folder of a run"),
        (["--data.name=cifra10"], "unknown data set cifra10 (did you mean cifar10?)"),
        (["--data.name=folder", "--data.dir=gone"], "gone"),
        (["--config=finetune_head"], "runs/vgg3 does not exist; `./launch.sh vgg3` trains it; it"),
        (["--hooks=gone.py:log"], "gone.py:log: gone.py does not exist"),
        (["--train.loss=gone.py:focal"], "gone.py:focal: gone.py does not exist"),
        (["--model.name=vgg16"], "model.name=vgg16 has blocks of 2, 2, 3, 3 and 3 convolutions"),
        (["--workdir=/proc/nothing"], "workdir /proc/nothing can't be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, tmp_path: Path):
    assert line in refuse(*arguments, cwd=tmp_path)


def test_every_mode_is_a_module():
    for name in MODES:
        module = importlib.import_module(f"cnn_jax.tools.{name}")
        assert list(inspect.signature(module.run).parameters) == ["request"]


def test_no_data_and_no_network_names_the_three_ways(tmp_path: Path):
    line = refuse("--config=simple_cnn", f"--data.dir={tmp_path}", cwd=tmp_path)
    for way in ("data.dir", "data.name=digits", "data.name=folder"):
        assert way in line


def test_a_pipe_that_is_closed_is_no_error(tmp_path: Path):
    program = f"{sys.executable} -m cnn_jax.main --help; echo $? >code"
    ended = subprocess.run(
        ["sh", "-c", f"({program}) | true"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.stderr == ""
    assert (tmp_path / "code").read_text().strip() in ("0", "141")


def test_summary_prints_the_chapter_s_total(tmp_path: Path):
    result = command("--config=simple_cnn", "--mode=summary", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "6,583,192" in result.stdout
    assert "32 x 32 x 50" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_summary_shows_the_group_of_every_parameter(tmp_path: Path):
    groups = (
        '--optim.groups=[["head/.*",1],["fc[12]/.*",[[0,null],[3,0.1]]],[".*",[[0,null],[3,1]]]]'
    )
    result = command("--config=vgg1", "--mode=summary", groups, cwd=tmp_path, COLUMNS="120")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in result.stdout.split("\n")]
    assert ["", "parameter", "pattern", "from epoch 0", "from epoch 3", ""] in rows
    assert ["", "block1/conv1/kernel", ".*", "frozen", "1", ""] in rows
    assert ["", "fc2/bias", "fc[12]/.*", "frozen", "0.1", ""] in rows
    assert ["", "head/kernel", "head/.*", "1", "1", ""] in rows
    line = refuse("--config=vgg1", "--mode=summary", groups.replace("fc[12]", "cf"), cwd=tmp_path)
    assert "unused patterns" in line
    assert line.endswith(": cf/.*")


@pytest.mark.slow
def test_a_workdir_holds_what_the_readme_says(trained: Path):
    names = {path.name for path in (trained / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= names
    assert {"checkpoints", "tensorboard"} <= names


def test_a_finished_run_is_not_run_again(trained: Path):
    before = (trained / "run/summary.json").read_text()
    result = command(*SMALL, "--workdir=run", cwd=trained)
    assert result.returncode == 0
    assert "run is finished" in result.stdout
    assert (trained / "run/summary.json").read_text() == before


def test_a_summary_of_a_workdir_is_of_its_own_network(trained: Path):
    shown = command("--mode=summary", "--workdir=run", cwd=trained).stdout
    assert shown == command("--mode=summary", *SMALL, cwd=trained).stdout
    assert shown != command("--mode=summary", cwd=trained).stdout
    assert "gone/config.json" in refuse("--mode=summary", "--workdir=gone", cwd=trained)


def test_what_can_not_be_written_is_one_line(trained: Path):
    (trained / "run/features").write_text("no folder")
    line = refuse("--mode=features", "--workdir=run", cwd=trained)
    assert "run/features" in line
    (trained / "run/features").unlink()


def test_another_config_is_refused_in_a_workdir(trained: Path):
    line = refuse(*SMALL, "--seed=7", "--workdir=run", cwd=trained)
    assert "seed: 0 -> 7" in line


def test_evaluate_repeats_the_reported_accuracy(trained: Path):
    result = command("--mode=evaluate", "--workdir=run", cwd=trained)
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((trained / "run/summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.stdout


def test_the_default_workdir_is_named_by_what_was_changed(tmp_path: Path):
    result = command(*SMALL[:3], "--train.epochs=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name == (
        "quickstart-data.image_size=8-model.blocks=[[4]]-model.dense=[16]-train.epochs=0"
    )


def test_a_workdir_without_a_checkpoint_is_one_line(tmp_path: Path):
    empty = command(*SMALL[:-2], "--train.epochs=0", "--workdir=run", cwd=tmp_path)
    assert empty.returncode == 0
    assert "no checkpoint" in refuse("--mode=evaluate", "--workdir=run", cwd=tmp_path)
