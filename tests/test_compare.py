"""--mode=compare: what differs between runs, and their curves in one figure."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import SMALL, finish, refuse

from cnn_jax.tools import compare, report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the runs a and b, and one of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    finish(*SMALL, "--workdir=a", cwd=folder)
    changed = ("--train.epochs=1", '--optim.groups=[["head/.*", 1], [".*", null]]')
    finish(*SMALL, *changed, "--workdir=more/b", cwd=folder)
    finish(*SMALL, "--runtime.seeds=2", "--workdir=seeds", cwd=folder)
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """Returns the rows of the tables by their first cell."""
    lines = [line.strip("│┃").split("│") for line in text.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.slow
def test_only_what_differs_is_listed(runs: Path):
    printed = finish("--mode=compare", "a", "more/b", cwd=runs).stdout
    assert re.search("^A  a$", printed, re.MULTILINE)
    assert re.search("^B  more/b$", printed, re.MULTILINE)
    found = rows(printed)
    assert found["train.epochs"] == ["2", "1"]
    assert found["optim.groups"][0] == "[]"
    assert found["epochs"] == ["2", "1"]
    accuracies = [
        f"{compare.outcome.read(runs / run)['test_accuracy']:.2%}" for run in ("a", "more/b")
    ]  # pyright: ignore
    assert found["test accuracy"] == accuracies
    assert not {"optim.learning_rate", "data.name", "jax", "device kind", "parameters"} & set(found)
    assert (runs / "a/figures/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "curves: a/figures/compare.png" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_equal_runs_say_so(runs: Path):
    printed = finish("--mode=compare", "a", "seeds/seed-0", cwd=runs).stdout
    assert "config: no difference" in printed
    assert set(rows(printed)) <= {"training time (s)", "images/s"}


def test_several_seeds_have_mean_and_deviation(runs: Path):
    found = rows(finish("--mode=compare", "a", "seeds", cwd=runs).stdout)
    assert found["runtime.seeds"] == ["1", "2"]
    assert found["seeds"] == ["-", "2"]
    assert re.fullmatch(r"[\d.]+% ± [\d.]+%", found["test accuracy"][1])


def test_curves_are_those_of_each_run(runs: Path):
    a, b = compare.load(runs / "a"), compare.load(runs / "more/b")
    assert list(a.history) == list(b.history) == ["train", "test (once)"]
    np.testing.assert_array_equal(a.history["train"].epochs, [1, 2])
    np.testing.assert_array_equal(b.history["train"].epochs, [1])
    of_seeds = compare.load(runs / "seeds")
    np.testing.assert_array_equal(of_seeds.history["train"].loss, a.history["train"].loss)


def test_a_run_that_is_not_finished_has_curves(runs: Path, tmp_path: Path):
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "copy" / name).write_text((runs / "a" / name).read_text())
    copy = compare.load(tmp_path / "copy")
    assert copy.result == {}
    assert list(copy.history) == ["train"]
    printed = finish("--mode=compare", str(tmp_path / "copy"), str(runs / "a"), cwd=tmp_path).stdout
    assert "copy (not finished)" in printed
    assert rows(printed)["test accuracy"][0] == "-"


def test_it_needs_two_runs(runs: Path):
    for paths in ((), ("a",), ("a", "a")):
        assert "folders of 2 to 26 runs" in refuse("--mode=compare", *paths, cwd=runs)
    line = refuse("--mode=compare", "a", "nowhere", cwd=runs)
    assert line == "nowhere is not the folder of a run: it has no config.json"


def test_the_history_has_the_test_result_as_a_single_point():
    lines = [
        {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.25},
        {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.5},
    ]
    result = {"epochs": 2, "test_loss": 1.5, "test_accuracy": 0.375}
    found = report.history(lines, result)
    assert list(found) == ["train", "test (once)"]
    assert found["test (once)"].single_point and not found["train"].single_point
    assert found["test (once)"].loss.tolist() == [1.5]
    assert found["test (once)"].accuracy.tolist() == [0.375]
