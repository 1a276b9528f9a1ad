"""Equal seeds give equal bits: in fresh processes, and through a stop after any step."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from helpers.cli import SMALL, SMALL_STEPS, command, finish, refuse, start
from helpers.results import result
from helpers.training import edit, fit, fit_until

from cnn_jax import trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset

RUN = (*SMALL, "--runtime.segment_steps=1", "--runtime.checkpoint_seconds=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    assert command(*RUN, "--workdir=run", cwd=cwd).returncode == 0
    assert len(result(cwd / "run")[1]) == SMALL_STEPS
    return cwd / "run"


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bits(whole: Path, tmp_path: Path):
    assert command(*RUN, "--workdir=run", cwd=tmp_path).returncode == 0
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.slow
def test_another_segment_length_gives_the_same_bits(whole: Path, tmp_path: Path):
    finish(*SMALL, "--runtime.segment_steps=5", "--workdir=run", cwd=tmp_path)
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.slow
def test_another_seed_gives_other_bits(whole: Path, tmp_path: Path):
    finish(*RUN, "--seed=1", "--workdir=run", cwd=tmp_path)
    assert result(tmp_path / "run")[0] != result(whole)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_resume_and_resumes(
    whole: Path, tmp_path: Path, signum: int, code: int
):
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    started = start(*RUN, f"--workdir={workdir}", cwd=tmp_path)
    started.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    started.send(signum)
    assert started.end() == code
    assert started.stderr.count("\n") == 1
    assert "the same command resumes" in started.stderr
    rerun = command(*RUN, f"--workdir={workdir}", cwd=tmp_path)
    assert "resuming after step" in rerun.stdout
    assert result(workdir) == result(whole)


AVERAGED = {"optim": {"name": "adam"}, "train": {"ema_decay": 0.9}}
ALTERNATING = {
    "augment": {"flip": "alternate"},
    "model": {"name": "airbench", "blocks": ((4,),), "dense": (), "dropout": 0.0},
    "init": {"whiten": "whiten"},
    "optim": {"groups": (("whiten/.*", ((0, 1.0), (1, None))), (".*", 1.0))},
    "train": {"lookahead_steps": 2},
}


# In the middle of an epoch, and at the end of one.
@pytest.mark.slow
@pytest.mark.parametrize("steps", [(2, 3), pytest.param((1, 4, 5), marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [AVERAGED, ALTERNATING], ids=["averaged", "alternating"])
def test_a_stop_after_any_step_changes_no_bit(
    tiny: Config,
    dataset: ImageDataset,
    tmp_path: Path,
    monkeypatch,
    changes: dict,
    steps: tuple[int, ...],
):
    """Every step of a run of two epochs, with all that a state can hold."""
    config = edit(edit(tiny, **changes), runtime={"segment_steps": 1})

    def trained(workdir: Path) -> str:
        workdir.mkdir(exist_ok=True)
        return trees.sha256(fit(config, dataset, workdir).state)

    expected = trained(tmp_path / "whole")
    for last in steps:
        cut = tmp_path / str(last)
        cut.mkdir()
        fit_until(last, config, dataset, cut, monkeypatch, signal.SIGINT)
        assert trained(cut) == expected


@pytest.mark.slow
def test_a_progress_bar_changes_no_bit(whole: Path, tmp_path: Path):
    """With a pseudo-terminal as standard output, on which the bar is drawn."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax.main", *RUN, "--workdir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm"},
        stdout=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
        while data := terminal.read(65536):  # ends in an OSError, as the other end is closed
            shown += data
    assert process.wait() == 0
    assert b"\x1b[?25l" in shown  # the cursor is hidden while there is a bar
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.slow
def test_a_cold_data_cache_changes_no_bit(whole: Path, tmp_path: Path):
    """The first run decodes and fills the cache, the second one reads it."""
    for name in ("cold", "warm"):
        cache = f"--runtime.cache_dir={tmp_path}/cache"
        assert list(tmp_path.glob("cache/digits-*")) == [] or name == "warm"
        finish(*RUN, cache, f"--workdir={name}", cwd=tmp_path)
        assert len(list(tmp_path.glob("cache/digits-*"))) == 1
        assert result(tmp_path / name) == result(whole)


@pytest.mark.slow
def test_verify_reproduces_the_bits(whole: Path, tmp_path: Path):
    before = sorted(whole.rglob("*"))
    verified = command("--mode=verify", "--workdir=run", cwd=whole.parent, TMPDIR=str(tmp_path))
    assert verified.returncode == 0, verified.stderr
    assert f"params_sha256 matches: {result(whole)[0]}" in verified.stdout
    assert "epoch 2/2" in verified.stdout
    assert sorted(whole.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def edited(whole: Path, cwd: Path, change: Callable[[dict], None]) -> Path:
    """Returns a copy of the run in `cwd` whose summary was changed."""
    shutil.copytree(whole, cwd / "run")
    summary = json.loads((whole / "summary.json").read_text())
    change(summary)
    (cwd / "run/summary.json").write_text(json.dumps(summary))
    return cwd


@pytest.mark.slow
def test_verify_names_the_versions_and_devices_that_differ(whole: Path, tmp_path: Path):
    def change(summary: dict) -> None:
        summary["params_sha256"] = "0" * 64
        summary["versions"]["jax"] = "0.0.1"
        summary["device"] |= {"count": 98, "cpu_count": 99}

    verified = command("--mode=verify", "--workdir=run", cwd=edited(whole, tmp_path, change))
    assert verified.returncode == 1, verified.stderr
    assert f"params_sha256 differs: {'0' * 64} in run, {result(whole)[0]} now" in verified.stdout
    changes = [line for line in verified.stdout.splitlines() if " -> " in line]
    now = json.loads((whole / "summary.json").read_text())["device"]
    assert changes == [
        f"jax: 0.0.1 -> {jax.__version__}",
        f"device count: 98 -> {now['count']}",
        f"device cpu_count: 99 -> {now['cpu_count']}",
    ]


def test_verify_refuses_what_cannot_be_compared(whole: Path, tmp_path: Path):
    def refusal(change: Callable[[dict], None], *arguments: str) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        cwd = edited(whole, tmp_path, change)
        return refuse("--mode=verify", "--workdir=run", *arguments, cwd=cwd)

    assert refusal(lambda s: s["data"].update(sha256="0")) == (
        "the images are not those that run was trained on"
    )
    assert refusal(lambda s: s["config"].update(seed=7)) == (
        "run reports on another config (seed: 7 -> 0)"
    )
    assert "(seed: 0 -> 1)" in refusal(lambda s: None, "--seed=1")
    assert "is not the summary of a run" in refusal(lambda s: s.pop("params_sha256"))
    (tmp_path / "run/summary.json").write_text("{")
    assert "summary.json can't be read" in refuse("--mode=verify", "--workdir=run", cwd=tmp_path)
    (tmp_path / "run/summary.json").unlink()
    assert "is not finished" in refuse("--mode=verify", "--workdir=run", cwd=tmp_path)
