"""The command as a user types it: every mode, and one line for every mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax.configs import CONFIGS

# Two epochs of a very small network on a part of the digits: seconds, yet it learns something.
SMALL = (
    "--set=model.blocks=[[4]]",
    "--set=model.dense=[16]",
    "--set=data.image_size=8",
    "--set=data.images_per_class=40",
    "--set=train.epochs=2",
    "--set=optim.learning_rate=0.1",
)


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cnn_jax.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd, **env)
    output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the small run was started in; the run is in its `run`."""
    cwd = tmp_path_factory.mktemp("trained")
    result = command(*SMALL, "--workdir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


def mistake(*arguments: str, cwd: Path) -> str:
    """Returns the one line that a mistaken command prints."""
    result = command(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config=vgg_dropuot"], "unknown config vgg_dropuot (did you mean vgg_dropout?)"),
        (["--set=train.epoch=3"], "unknown field train.epoch (did you mean train.epochs?)"),
        (["--set=train.epochs=many"], "train.epochs=many: expected int"),
        (["--set=optim.name=adm"], "optim.name=adm: expected momentum|sgd|nesterov|adam"),
        (["--set=train.epochs"], "--set=train.epochs: expected section.field=value"),
        (["--mode=evalute"], "--mode=evalute: expected train|evaluate|summary|predict|verify"),
        (["--confg=vgg1"], "Unknown command line flag 'confg'. Did you mean: config ?"),
        (["vgg1"], "unexpected argument vgg1"),
        (["--mode=evaluate", "--workdir=nowhere"], "nowhere/config.json does not exist"),
        (["--mode=verify", "--workdir=nowhere"], "nowhere/config.json does not exist"),
        (["--mode=evaluate"], "runs/quickstart does not exist"),
        (["--mode=predict", "--workdir=nowhere", "x.png"], "nowhere/config.json does not exist"),
        (["--set=data.name=cifra10"], "unknown data set cifra10 (did you mean cifar10?)"),
        (["--set=data.name=folder", "--set=data.dir=gone"], "gone"),
        (["--workdir=/proc/nothing"], "workdir /proc/nothing can't be written"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, tmp_path: Path):
    assert line in mistake(*arguments, cwd=tmp_path)


def test_no_data_and_no_network_names_the_three_ways(tmp_path: Path):
    line = mistake("--config=simple_cnn", f"--set=data.dir={tmp_path}", cwd=tmp_path)
    for way in ("data.dir", "data.name=digits", "data.name=folder"):
        assert way in line


def test_help_lists_configs_and_fields(tmp_path: Path):
    result = command("--help", cwd=tmp_path)
    assert result.returncode == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for name, make in CONFIGS.items():
        assert f"{name} {(make.__doc__ or '').splitlines()[0]}" in lines
    assert "optim.learning_rate" in result.stdout


def test_flags_are_checked_without_jax_or_tensorflow(tmp_path: Path):
    script = (
        "import sys, cnn_jax.main; "
        "print([m for m in ('jax', 'flax', 'tensorflow', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_summary_prints_the_chapter_s_total(tmp_path: Path):
    result = command("--config=simple_cnn", "--mode=summary", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "6,583,192" in result.stdout
    assert "32 x 32 x 50" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_summary_shows_the_group_of_every_parameter(tmp_path: Path):
    groups = '--set=optim.phases=[[0,[["head/.*",1],[".*",null]]],[3,[["fc[12]/.*",0.1],[".*",1]]]]'
    result = command("--config=vgg1", "--mode=summary", groups, cwd=tmp_path, COLUMNS="120")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in result.stdout.split("\n")]
    assert ["", "parameter", "learning rate from epoch 0", "learning rate from epoch 3", ""] in rows
    assert ["", "block1/conv1/kernel", "frozen  (.*)", "x 1  (.*)", ""] in rows
    assert ["", "fc2/bias", "frozen  (.*)", "x 0.1  (fc[12]/.*)", ""] in rows
    assert ["", "head/kernel", "x 1  (head/.*)", "x 1  (.*)", ""] in rows
    line = mistake("--config=vgg1", "--mode=summary", groups.replace("fc[12]", "cf"), cwd=tmp_path)
    assert "patterns that are the first to match nothing: cf/.*" in line


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
    assert "gone/config.json" in mistake("--mode=summary", "--workdir=gone", cwd=trained)


def test_what_can_not_be_written_is_one_line(trained: Path):
    (trained / "run/features").write_text("no folder")
    line = mistake("--mode=features", "--workdir=run", cwd=trained)
    assert "run/features" in line
    (trained / "run/features").unlink()


def test_another_config_is_refused_in_a_workdir(trained: Path):
    line = mistake(*SMALL, "--set=seed=7", "--workdir=run", cwd=trained)
    assert "seed: 0 -> 7" in line


def test_evaluate_repeats_the_reported_accuracy(trained: Path):
    result = command("--mode=evaluate", "--workdir=run", cwd=trained)
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((trained / "run/summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.stdout


def test_predict_prints_class_and_probability(trained: Path):
    photos = trained / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    Image.fromarray(pixels).convert("L").save(photos / "b.jpg")
    (photos / "broken.jpg").write_bytes(b"no image")
    arguments = ("--mode=predict", "--workdir=run")
    plain = command(*arguments, "photos", cwd=trained)
    assert plain.returncode == 0, plain.stderr
    assert re.fullmatch(
        r"photos/a.png: \d \(\d+\.\d%\)\nphotos/b.jpg: \d \(\d+\.\d%\)\n", plain.stdout
    )
    assert "broken.jpg" in plain.stderr
    as_json = command(*arguments, "--json", "photos/a.png", cwd=trained)
    (prediction,) = json.loads(as_json.stdout)
    assert prediction["file"] == "photos/a.png"
    assert prediction["class"] in "0123456789"
    assert 0.1 <= prediction["probability"] <= 1
    assert "broken.jpg" in mistake(*arguments, "photos/broken.jpg", cwd=trained)
    assert "gone.png" in mistake(*arguments, "photos/gone.png", cwd=trained)
    assert "needs image files" in mistake(*arguments, cwd=trained)


def test_the_default_workdir_is_named_by_what_was_changed(tmp_path: Path):
    result = command(*SMALL[:-2], "--set=train.epochs=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("quickstart-model.blocks=[[4]]-model.dense=[16]")


def test_a_workdir_without_a_checkpoint_is_one_line(tmp_path: Path):
    empty = command(*SMALL[:-2], "--set=train.epochs=0", "--workdir=run", cwd=tmp_path)
    assert empty.returncode == 0
    assert "no checkpoint" in mistake("--mode=evaluate", "--workdir=run", cwd=tmp_path)
