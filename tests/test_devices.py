"""Eight virtual devices on one CPU train as one device does, up to the order of sums."""

import json
from pathlib import Path

import numpy as np
from test_main import SMALL, command, mistake

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def losses(workdir: Path) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def test_eight_devices_give_the_losses_of_one(tmp_path: Path):
    """Dropout and augmentation included: random bits do not depend on where they are used."""
    run = (*SMALL, "--set=model.dropout=0.5", "--set=augment.translate=1")
    assert command(*run, "--workdir=one", cwd=tmp_path).returncode == 0
    result = command(*run, "--workdir=eight", cwd=tmp_path, **EIGHT)
    assert result.returncode == 0, result.stderr
    one, eight = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "eight"))
    assert (one["device"]["count"], eight["device"]["count"]) == (1, 8)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=2e-5)
    np.testing.assert_allclose(eight["test_loss"], one["test_loss"], rtol=1e-4)


def test_a_checkpoint_of_one_device_is_read_by_eight(tmp_path: Path):
    assert command(*SMALL, "--workdir=run", cwd=tmp_path).returncode == 0
    result = command("--mode=evaluate", "--workdir=run", cwd=tmp_path, **EIGHT)
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.stdout


def test_a_batch_that_cannot_be_spread_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", EIGHT["XLA_FLAGS"])
    line = mistake(*SMALL, "--set=train.batch_size=60", cwd=tmp_path)
    assert line.startswith("train.batch_size=60 can't be spread over 8 devices")
