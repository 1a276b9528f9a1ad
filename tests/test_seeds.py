"""The runs of several seeds are the runs that each of them would be alone."""

import json
import re
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.cli import SMALL, finish, on_devices, refuse, start
from helpers.results import losses, summary

from cnn_jax import main

THREE_SEEDS = (*SMALL, "--seed=3", "--runtime.seeds=3", "--workdir=seeds")
# Changes no bit, and lets a signal come between two steps.
STEP_BY_STEP = "--runtime.segment_steps=1"


def results(*workdirs: Path) -> list[tuple[str, float, list[float]]]:
    found = ((summary(path), losses(path).tolist()) for path in workdirs)
    return [(run["params_sha256"], run["test_loss"], steps) for run, steps in found]


def seeds_in(cwd: Path) -> list[Path]:
    return [cwd / f"seeds/seed-{seed}" for seed in (3, 4, 5)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float, list[float]]]:
    """The results of three seeds, each in a command of its own."""
    cwd = tmp_path_factory.mktemp("alone")
    for seed in (3, 4, 5):
        finish(*SMALL, f"--seed={seed}", f"--workdir={seed}", cwd=cwd)
    return results(*(cwd / str(seed) for seed in (3, 4, 5)))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one command has trained three seeds."""
    cwd = tmp_path_factory.mktemp("together")
    finish(*THREE_SEEDS, cwd=cwd)
    return cwd


@pytest.mark.slow
def test_each_seed_has_the_bits_of_its_single_run(alone: list, together: Path):
    assert results(*seeds_in(together)) == alone
    assert len({sha256 for sha256, *_ in alone}) == 3
    total = summary(together / "seeds")
    accuracies = [summary(path)["test_accuracy"] for path in seeds_in(together)]
    np.testing.assert_allclose(total["test_accuracy_mean"], np.mean(accuracies))
    np.testing.assert_allclose(total["test_accuracy_std"], np.std(accuracies, ddof=1))
    assert [run["seed"] for run in total["runs"]] == [3, 4, 5]
    config = json.loads((together / "seeds/seed-5/config.json").read_text())
    assert (config["seed"], config["runtime"]["seeds"]) == (5, 1)
    finish("--mode=verify", "--workdir=seeds/seed-4", cwd=together)


def test_a_folder_of_several_seeds_names_one_for_the_other_modes(together: Path):
    for mode in ("evaluate", "verify", "export"):
        line = refuse(f"--mode={mode}", "--workdir=seeds", cwd=together)
        assert line == (
            "seeds holds the runs of several seeds; name one of them, such as "
            "--workdir=seeds/seed-3"
        )


@pytest.mark.slow
def test_a_rerun_is_finished_and_more_seeds_are_added(together: Path):
    before = [(path / "summary.json").stat().st_mtime_ns for path in seeds_in(together)]
    rerun = finish(*THREE_SEEDS, cwd=together)
    assert "seeds is finished" in rerun.stdout
    added = finish(*THREE_SEEDS, "--runtime.seeds=4", cwd=together)
    assert re.search("4 seeds: test accuracy .*, standard deviation", added.stdout)
    assert [run["seed"] for run in summary(together / "seeds")["runs"]] == [3, 4, 5, 6]
    assert [(path / "summary.json").stat().st_mtime_ns for path in seeds_in(together)] == before


@pytest.mark.slow
def test_several_seeds_do_not_go_into_the_folder_of_one_run(tmp_path: Path):
    finish(*SMALL, "--seed=3", "--workdir=seeds", cwd=tmp_path)
    line = refuse(*THREE_SEEDS, cwd=tmp_path)
    assert line == "seeds holds a single run; choose another --workdir for seeds"


@pytest.mark.slow
def test_a_signal_stops_the_seeds_and_the_same_command_resumes(alone: list, tmp_path: Path):
    process = start(*THREE_SEEDS, STEP_BY_STEP, cwd=tmp_path)
    metrics = seeds_in(tmp_path)[1] / "metrics.jsonl"
    process.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    process.send(signal.SIGTERM)
    assert process.end() == 143
    assert "stopped by SIGTERM" in process.stderr
    assert process.stderr.count("\n") == 1
    assert (seeds_in(tmp_path)[0] / "summary.json").exists()
    assert not (seeds_in(tmp_path)[1] / "summary.json").exists()
    assert not seeds_in(tmp_path)[2].exists()
    finish(*THREE_SEEDS, STEP_BY_STEP, cwd=tmp_path)
    assert results(*seeds_in(tmp_path)) == alone


def test_a_seed_that_fails_ends_the_command_with_its_name(tmp_path: Path):
    line = refuse(*THREE_SEEDS, "--optim.learning_rate=1e30", cwd=tmp_path)
    assert line.startswith("seed 3: loss ")
    assert "no longer finite" in line


def compilations(workdir: str) -> None:
    compiled: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="", **__: compiled.update([fun_name] * ("backend_comp" in event))
    )
    main.main(["cnn_jax", *SMALL, "--runtime.seeds=4", f"--workdir={workdir}"])
    print([n for name, n in compiled.items() if "train_segment" in name])


@pytest.mark.slow
def test_all_seeds_share_one_compilation(tmp_path: Path):
    start_time = time.monotonic()
    assert on_devices(compilations, str(tmp_path / "run"), n=1)[-1] == "[1]"
    assert time.monotonic() - start_time < 200
