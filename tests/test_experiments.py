"""Experiments: what is missing is trained, what is done is not, and what the report says of it."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console
from test_train import edit

from cnn_jax import config as configuration
from cnn_jax import loop, models, runs
from cnn_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.stop import Stopped
from experiments import measures, plots, report, rows, run, runner, transfer
from experiments.rows import Store
from experiments.spec import (
    AgainstField,
    AgainstMeasured,
    Bars,
    Curves,
    Dots,
    Experiment,
    Points,
)

# 20 digits of each class in batches of 32: seven steps an epoch.
BASE = Config(
    data=DataConfig(image_size=8, images_per_class=20),
    model=ModelConfig(name="vgg", blocks=((4,),), dense=()),
    optim=OptimConfig(learning_rate=0.1),
    train=TrainConfig(epochs=2, batch_size=32, segment_steps=2),
)
DIGITS = "scikit-learn load_digits, scaled to 8x8x3"
SHORTER = edit(BASE, train={"epochs": 1})


def count_classes(trained: runs.TrainedModel, dataset: ImageDataset) -> dict[str, float]:
    return {"tenth": len(trained.class_names) / 100, "images": len(dataset.train) / 1000}


EXPERIMENT = Experiment(
    question="Does a second epoch help?",
    variants={"one": SHORTER, "two": BASE},
    figure=Curves(),
    seeds=2,
    order=("two", "one"),
    columns=("test_accuracy", "train.epochs", "tenth"),
    measured=("tenth", "images"),
    measure=count_classes,
    watch_test=True,
    reference={"two": 0.8},
    note="Few images.",
)


@pytest.fixture(autouse=True, scope="module")
def few_variants() -> Iterator[None]:
    """Keeps the programs that variants share: these few leave room for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


def train(store: Store, variants: list[str], seeds: int = 2) -> str:
    """Trains what is missing and returns what was shown, without a terminal."""
    console = Console(width=120)
    with console.capture() as capture, runner.Board(console) as board:
        runner.train_missing(store, variants, seeds, board)
    return capture.get()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workdirs of all runs, and the report in `results`."""
    folder = tmp_path_factory.mktemp("trained")
    store = Store(EXPERIMENT, folder / "runs", folder / "results")
    train(store, ["two", "one"])
    report.write("try", store, 2, folder / "results")
    return folder


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes every training an error."""
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run", lambda *_: pytest.fail("something was trained again"))
        yield


def states(store: Store, variant: str, seeds: int = 2) -> list[str]:
    return [store.state(run) for part in store.runs(variant, seeds) for run in part]


def found_rows(store: Store, variant: str) -> list[rows.Row]:
    return [row for run in store.runs(variant, 2)[1] if (row := store.row(run))]


def hashes(store: Store, variant: str) -> list[str]:
    return [row["params_sha256"] for row in found_rows(store, variant)]


def test_rows_tell_what_the_runs_found(trained: Path):
    written = rows.read_csv(trained / "results/results.csv")
    assert [(row["variant"], row["seed"], row["epochs"]) for row in written] == [
        ("one", 0, 1),
        ("one", 1, 1),
        ("two", 0, 2),
        ("two", 1, 2),
    ]
    for row in written:
        summary = runs.finished(trained / f"runs/{row['variant']}-seed{row['seed']}")
        assert summary is not None
        for name in ("test_accuracy", "test_loss", "train_accuracy", "seconds", "params_sha256"):
            assert row[name] == summary[name], name
        assert (row["steps"], row["param_count"]) == (7 * row["epochs"], 4 * 28 + 10 * 65)
        assert row["flops_per_image"] == 2 * (8 * 8 * 27 * 4 + 64 * 10)
        assert (row["tenth"], row["images"]) == (0.1, 0.2)
        assert row["validation_accuracy"] is None
        assert row["data"] == DIGITS
        assert "jax" in row["versions"]
    assert len({row["params_sha256"] for row in written}) == 4


def test_curves_have_train_and_test_of_every_epoch(trained: Path):
    curves = rows.read_csv(trained / "results/curves.csv")
    found = [(line["variant"], line["seed"], line["epoch"]) for line in curves]
    assert found == [("one", 0, 1), ("one", 1, 1), *(("two", s, e) for s in (0, 1) for e in (1, 2))]
    row = rows.read_csv(trained / "results/results.csv")[2]
    assert curves[3]["test_accuracy"] == row["test_accuracy"] != curves[2]["test_accuracy"]
    assert curves[3]["train_accuracy"] == row["train_accuracy"]
    assert curves[3]["validation_accuracy"] is None


def test_nothing_is_chosen_by_watching_the_test_set(trained: Path, tmp_path: Path):
    """Same bits as without, no checkpoint of the best, no best epoch."""
    (run, _) = Store(EXPERIMENT, trained / "runs", tmp_path).runs("two", 2)[1]
    dataset = rows.load_data(BASE.data)
    with runs.claim(tmp_path / "plain", run.config):
        trainer = loop.Trainer(run.config, dataset)
        plain = runs.run(trainer, tmp_path / "plain", lambda path: quiet_log(run, path))
    summary = runs.finished(trained / "runs/two-seed0")
    assert summary is not None
    assert plain["params_sha256"] == summary["params_sha256"]
    assert summary["best_epoch"] is None
    assert not list((trained / "runs/two-seed0/checkpoints/best").iterdir())
    assert "test_accuracy" not in (tmp_path / "plain/metrics.jsonl").read_text()


def quiet_log(run: rows.Run, path: Path) -> runner.BoardLog:
    return runner.BoardLog(run, runner.Board(Console(quiet=True)), path)


@pytest.mark.usefixtures("untrained")
def test_finished_workdirs_are_not_trained_again(trained: Path, tmp_path: Path):
    store = Store(EXPERIMENT, trained / "runs", tmp_path)
    assert states(store, "one") == states(store, "two") == ["done", "done"]
    shown = train(store, ["two", "one"])
    assert [line.split()[:2] for line in shown.splitlines()] == [
        ["two", "0"],
        ["two", "1"],
        ["one", "0"],
        ["one", "1"],
    ]


@pytest.mark.usefixtures("untrained")
def test_committed_results_are_not_trained_again(trained: Path, tmp_path: Path):
    """A fresh clone has no workdirs; its report is the same, byte by byte."""
    store = Store(EXPERIMENT, tmp_path / "none", trained / "results")
    assert states(store, "two") == ["done", "done"]
    train(store, ["two", "one"])
    assert not (tmp_path / "none").exists()
    report.write("try", store, 2, tmp_path / "again")
    for name in ("results.csv", "curves.csv", "results.md", "about.json", "try.png"):
        again, before = (tmp_path / "again" / name), (trained / "results" / name)
        assert again.read_bytes() == before.read_bytes(), name


@pytest.mark.usefixtures("untrained")
def test_a_run_that_another_experiment_committed_counts(trained: Path, tmp_path: Path):
    """By its config, whatever it is called there, and only with all that is asked of it."""
    other = replace(EXPERIMENT, variants={"short": SHORTER}, order=(), reference={})

    def found(others: list[Path], **changes: Any) -> Store:
        return Store(replace(other, **changes), tmp_path, tmp_path / "results", others)

    store = found([trained / "results"])
    assert states(store, "short") == ["done", "done"]
    assert states(found([]), "short") == ["missing", "missing"]
    before = [r for r in rows.read_csv(trained / "results/results.csv") if r["epochs"] == 1]
    for wanted, as_one in zip(store.runs("short", 2)[1], before, strict=True):
        row, curve = store.find(wanted) or pytest.fail("lost")
        assert row == as_one | {"variant": "short", rows.EPOCHS_RUN: 1}
        assert [(line["variant"], line["epoch"]) for line in curve] == [("short", 1)]
        assert curve[0]["test_accuracy"] == row["test_accuracy"]
    assert store.seeds == 0
    assert states(found([trained / "results"], measured=("tenth", "new")), "short")[0] == "missing"
    unwatched = tmp_path / "unwatched"
    unwatched.mkdir()
    (unwatched / "results.csv").write_bytes((trained / "results/results.csv").read_bytes())
    lines = rows.read_csv(trained / "results/curves.csv")
    blind = [line | {"test_accuracy": None} for line in lines]
    rows.write_csv(unwatched / "curves.csv", lines[0], blind)
    assert states(found([unwatched]), "short") == ["missing", "missing"]
    (unwatched / "curves.csv").unlink()
    assert states(found([unwatched]), "short") == ["missing", "missing"]
    blind = found([unwatched], figure=Dots(), watch_test=False)
    assert states(blind, "short") == ["done", "done"]


def test_results_of_another_config_do_not_count(trained: Path, tmp_path: Path):
    changed = edit(BASE, optim={"learning_rate": 0.2})
    other = replace(EXPERIMENT, variants={"one": SHORTER, "two": changed})
    store = Store(other, tmp_path / "none", trained / "results")
    assert states(store, "two") == ["missing", "missing"]
    assert states(store, "one") == ["done", "done"]
    store = Store(other, trained / "runs", tmp_path)
    assert states(store, "two") == ["missing; its workdir is another config's"] * 2
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.1 -> 0.2\); remove it, or choose"):
        train(store, ["two"])


@pytest.fixture
def elsewhere(trained: Path, tmp_path: Path) -> Path:
    """A folder of results as those in `trained`, but of a copy of the images."""
    found = rows.read_csv(trained / "results/results.csv")
    (tmp_path / "elsewhere").mkdir()
    lines = [row | {"data": "a copy", "params_sha256": "0"} for row in found]
    rows.write_csv(tmp_path / "elsewhere/results.csv", found[0], lines)
    (tmp_path / "elsewhere/curves.csv").write_bytes((trained / "results/curves.csv").read_bytes())
    return tmp_path / "elsewhere"


def test_what_is_committed_of_other_images_is_trained_anew(elsewhere: Path, tmp_path: Path):
    """Once something must be trained at all: else the images need not be there."""
    store = Store(EXPERIMENT, tmp_path / "runs", elsewhere)
    train(store, ["two", "one"])
    assert not (tmp_path / "runs").exists()
    train(store, ["one"], seeds=3)
    trained = {path.name for path in (tmp_path / "runs").iterdir()}
    assert trained == {"one-seed0", "one-seed1", "one-seed2"}
    assert len(set(hashes(store, "one"))) == 2
    assert states(store, "two") == ["missing", "missing"]

    store = Store(EXPERIMENT, tmp_path / "runs", elsewhere)
    assert states(store, "two") == ["done", "done"]
    with pytest.raises(UserError) as caught:
        report.write("try", store, 2, tmp_path / "report")
    assert str(caught.value) == (
        f"results of different images: one-seed0 is of {DIGITS}, two-seed0 of a copy; "
        "train them on the same: python -m experiments.run try run --seeds=2"
    )
    assert not (tmp_path / "report").exists()
    train(store, ["two", "one"])
    report.write("try", Store(EXPERIMENT, tmp_path / "runs", elsewhere), 2, tmp_path / "report")
    assert "- data: " + DIGITS in (tmp_path / "report/results.md").read_text().splitlines()


def test_borrowed_seeds_of_other_images_are_trained_anew(elsewhere: Path, tmp_path: Path):
    """All that the other experiment has, or its images would stand beside the new ones."""
    found = [r for r in rows.read_csv(elsewhere / "results.csv") if r["variant"] == "one"]
    rows.write_csv(elsewhere / "results.csv", found[0], found)
    borrowing = replace(EXPERIMENT, borrowed=("one",))
    store = Store(borrowing, tmp_path / "runs", tmp_path / "none", [elsewhere])
    train(store, ["two", "one"])
    report.write("try", Store(borrowing, tmp_path / "runs", tmp_path), 2, tmp_path / "report")
    written = rows.read_csv(tmp_path / "report/results.csv")
    assert [(r["variant"], r["seed"]) for r in written] == [
        (v, s) for v in ("one", "two") for s in (0, 1)
    ]
    assert {r["data"] for r in written} == {DIGITS}


def test_a_workdir_of_other_images_is_refused(trained: Path, tmp_path: Path):
    summary = json.loads((trained / "runs/one-seed0/summary.json").read_text())
    summary["data"]["sha256"] = "0"
    shutil.copytree(trained / "runs/one-seed0", tmp_path / "one-seed0")
    runs.write_json(tmp_path / "one-seed0/summary.json", summary)
    known = json.loads((tmp_path / "one-seed0/row.json").read_text())
    known["row"]["data"] = "a copy"
    runs.write_json(tmp_path / "one-seed0/row.json", known)
    line = r"one-seed0 was trained on other images; remove it, or choose another --runs"
    with pytest.raises(UserError, match=line):
        train(Store(EXPERIMENT, tmp_path, tmp_path / "none"), ["one"])
    (tmp_path / "one-seed0/row.json").unlink()
    with pytest.raises(UserError, match=line):
        states(Store(EXPERIMENT, tmp_path, tmp_path / "none"), "one")


def test_images_of_one_name_that_lie_elsewhere_now_are_not_trained_on_again(
    trained: Path, tmp_path: Path
):
    """Their row is made anew, from the finished run."""
    shutil.copytree(trained / "runs/one-seed0", tmp_path / "one-seed0")
    known = json.loads((tmp_path / "one-seed0/row.json").read_text())
    known["row"]["data"] = "digits in another folder"
    runs.write_json(tmp_path / "one-seed0/row.json", known)
    store = Store(EXPERIMENT, tmp_path, tmp_path / "none")
    train(store, ["one"])
    before = Store(EXPERIMENT, trained / "runs", tmp_path / "none")
    assert found_rows(store, "one")[0] == found_rows(before, "one")[0]


@pytest.mark.parametrize("gone", [(), ("row.json",), ("row.json", "summary.json")])
def test_a_workdir_without_a_test_curve_that_is_asked_for_is_refused(
    gone: tuple[str, ...], trained: Path, tmp_path: Path
):
    """Of a finished run with a row, of one without, and of one that had still to be evaluated."""
    workdir = tmp_path / "one-seed0"
    shutil.copytree(trained / "runs/one-seed0", workdir)
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text.replace("test_accuracy", "unknown"))
    known = json.loads((workdir / "row.json").read_text())
    runs.write_json(workdir / "row.json", known | {"curve": []})
    for name in gone:
        (workdir / name).unlink()
    store = Store(EXPERIMENT, tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match=r"one-seed0 lacks the test accuracy of some .*remove"):
        train(store, ["one"])
    assert states(store, "one")[0] == "missing; its workdir has no test accuracy by epoch"
    blind = replace(EXPERIMENT, figure=Dots(), watch_test=False)
    assert states(Store(blind, tmp_path, tmp_path / "none"), "one")[0] == "done"


def test_a_summary_without_a_row_is_enough(trained: Path, tmp_path: Path):
    """What a kill between the end of training and the row leaves behind."""
    store = Store(EXPERIMENT, trained / "runs", tmp_path)
    (run, _) = store.runs("one", 2)[1]
    before = store.find(run)
    (trained / "runs/one-seed0/row.json").unlink()
    assert store.find(run) == before


def test_an_interrupted_run_is_resumed_with_the_same_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Store(EXPERIMENT, tmp_path / "runs", tmp_path / "results")
    segment = runner.BoardLog.segment

    def interrupt(self: Any, lines: list[dict[str, Any]], images_per_second: float) -> None:
        segment(self, lines, images_per_second)
        if lines[-1]["step"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.BoardLog, "segment", interrupt)
    with pytest.raises(Stopped) as stopped:
        train(store, ["two"])
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert states(store, "two") == ["interrupted at step 9", "missing"]
    monkeypatch.undo()
    train(store, ["two"])
    assert states(store, "two") == ["done", "done"]
    assert hashes(store, "two") == hashes(Store(EXPERIMENT, trained / "runs", tmp_path), "two")


TUNED = Experiment(
    question="?",
    variants={"a": SHORTER},
    figure=Dots(),
    seeds=1,
    rates={"a": (0.001, 0.05, 0.1, 1e38)},
    columns=("optim.learning_rate", "test_accuracy"),
)


def test_borrowed_variants_have_the_seeds_that_are_known(tmp_path: Path):
    borrowing = replace(
        EXPERIMENT,
        figure=Dots(),
        columns=("test_accuracy",),
        borrowed=("two",),
        measured=(),
        measure=None,
        watch_test=False,
    )
    store = Store(borrowing, tmp_path / "runs", tmp_path / "none")
    assert states(store, "two", 3) == ["missing"]
    (tmp_path / "other").mkdir()
    known = [row("two", seed, 0.5) for seed in (0, 2)]
    rows.write_csv(tmp_path / "other/results.csv", known[0], known)
    store = Store(borrowing, tmp_path / "runs", tmp_path / "none", [tmp_path / "other"])
    assert [run.config.seed for run in store.runs("two", 3)[1]] == [0, 2]
    assert [run.config.seed for run in store.runs("one", 3)[1]] == [0, 1, 2]
    report.write("try", store, 3, tmp_path / "report")
    text = (tmp_path / "report/results.md").read_text()
    assert "| two | 2 | 50.0 ± 0.0 |" in text
    assert "| one | 0 of 3, the others missing |" in text


def test_epochs_run_are_those_until_training_stopped(tmp_path: Path):
    """An early stop's result is that of a better epoch, which `epochs` names."""
    stopped = row("two", 0, 0.5, epochs=1)
    curve = [
        {name: 0.5 for name in rows.CURVE} | {"variant": "two", "seed": 0, "epoch": i}
        for i in (1, 2, 3)
    ]
    rows.write_csv(tmp_path / "results.csv", stopped, [stopped])
    rows.write_csv(tmp_path / "curves.csv", curve[0], curve)
    counting = replace(EXPERIMENT, columns=("epochs", rows.EPOCHS_RUN), measured=(), measure=None)
    store = Store(counting, tmp_path / "runs", tmp_path)
    report.write("try", store, 1, tmp_path / "report")
    assert "| two | 1 | 1.0 | 3.0 | 80.0 |" in (tmp_path / "report/results.md").read_text()


def test_an_early_stop_s_validation_accuracy_is_of_the_epoch_that_is_reported(tmp_path: Path):
    stopping = edit(
        BASE,
        data={"validation": 0.2},
        optim={"learning_rate": 0.3},
        train={"epochs": 5, "patience": 1},
    )
    experiment = Experiment("?", {"a": stopping}, Dots(), seeds=1)
    store = Store(experiment, tmp_path / "runs", tmp_path)
    train(store, ["a"], seeds=1)
    found, curve = store.find(store.runs("a", 1)[1][0]) or pytest.fail("not done")
    by_epoch = {line["epoch"]: line["validation_accuracy"] for line in curve}
    assert found["validation_accuracy"] == by_epoch[found["epochs"]] > by_epoch[len(curve)]


def test_a_diverged_run_has_no_number_of_epochs(tmp_path: Path):
    """A mean with a 0 for it would be of nothing."""
    found = [row("two", 0, 0.5, epochs=2), row("two", 1, None)]
    curve = [
        {name: 0.5 for name in rows.CURVE} | {"variant": "two", "seed": 0, "epoch": i}
        for i in (1, 2)
    ]
    rows.write_csv(tmp_path / "results.csv", found[0], found)
    rows.write_csv(tmp_path / "curves.csv", curve[0], curve)
    counting = replace(EXPERIMENT, columns=(rows.EPOCHS_RUN,), measured=(), measure=None)
    report.write("try", Store(counting, tmp_path / "runs", tmp_path), 2, tmp_path / "report")
    assert "| two | 2 | 2.0 (1 diverged) | 80.0 |" in (tmp_path / "report/results.md").read_text()


def test_a_rate_is_chosen_by_the_first_best_validation_accuracy():
    def chosen(*accuracies: float | None) -> float:
        found = [row("a", 0, 0.9, validation_accuracy=accuracy) for accuracy in accuracies]
        (final,) = rows.final_runs(TUNED, "a", 1, found)
        assert final.config == edit(
            SHORTER, optim={"learning_rate": final.config.optim.learning_rate}
        )
        return final.config.optim.learning_rate

    assert chosen(0.3, 0.6, 0.5, None) == 0.05
    assert chosen(0.3, 0.6, 0.6, 0.1) == 0.05
    assert chosen(None, None, None, 0.0) == 1e38
    assert rows.final_runs(TUNED, "a", 1, [row("a", 0, 0.9, validation_accuracy=0.1), None]) == []
    with pytest.raises(UserError, match="a: every learning rate diverged"):
        chosen(None, None, None, None)


def test_tuning_comes_first_and_a_diverged_run_is_told(tmp_path: Path):
    tuning = rows.tuning_runs(TUNED, "a")
    assert {run.config.data.validation for run in tuning} == {0.1}
    known = [
        row(run.variant, 0, 0.9, validation_accuracy=x, config_sha256=run.sha256, data=DIGITS)
        for run, x in zip(tuning, (0.2, 0.3, 0.4), strict=False)
    ]
    rows.write_csv(tmp_path / "results.csv", known[0], known)
    store = Store(TUNED, tmp_path / "runs", tmp_path)
    assert states(store, "a", 1) == ["done", "done", "done", "missing"]
    assert "no longer finite" in train(store, ["a"], seeds=1)
    assert states(store, "a", 1) == ["done", "done", "done", "diverged", "done"]
    report.write("tuned", store, 1, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert re.search(r"^\| a \| 1 \| 0\.1 \| \d+\.\d \|$", text, re.MULTILINE)
    assert "| a | 0.1 | 40.0 |\n| a | 1e+38 | diverged |" in text
    store = Store(TUNED, tmp_path / "none", tmp_path)
    assert states(store, "a", 1) == ["done", "done", "done", "diverged", "done"]


def test_a_damaged_file_of_results_is_one_line(tmp_path: Path):
    (tmp_path / "results.csv").write_text("variant,seed\na,0,x\n")
    with pytest.raises(UserError, match=r"results.csv can't be read"):
        Store(EXPERIMENT, tmp_path, tmp_path)
    (tmp_path / "results.csv").write_text("variant,seed\na,x\n")
    with pytest.raises(UserError, match=r"results.csv can't be read"):
        Store(EXPERIMENT, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"row": {', "Expecting property name .*"),
        ("[]", "list indices must be .*"),
        ('{"row": {}, "curve": []}', "it is not what a run has left"),
    ],
)
def test_a_damaged_row_of_a_workdir_is_one_line(text: str, problem: str, tmp_path: Path):
    (tmp_path / "one-seed0").mkdir()
    (tmp_path / "one-seed0/row.json").write_text(text)
    line = f"one-seed0/row.json can't be read: {problem}; remove it, and it is made anew"
    with pytest.raises(UserError, match=line):
        states(Store(EXPERIMENT, tmp_path, tmp_path / "none"), "one")


def test_what_is_not_finite_is_an_empty_cell(tmp_path: Path):
    broken = replace(EXPERIMENT, measure=lambda *_: {"tenth": math.inf, "images": math.nan})
    store = Store(broken, tmp_path / "runs", tmp_path)
    train(store, ["one"], seeds=1)
    report.write("try", store, 1, tmp_path)
    known = Store(EXPERIMENT, tmp_path / "none", tmp_path)
    (made,) = known.runs("one", 1)[1]
    found = known.row(made)
    assert found is not None
    assert (found["tenth"], found["images"]) == (None, None)
    assert 0 <= found["test_accuracy"] <= 1


def row(variant: str, seed: int, accuracy: float | None, **others: Any) -> rows.Row:
    made = EXPERIMENT.variants.get(variant, BASE)
    blank = dict.fromkeys((*rows.COLUMNS, *rows.SURROUNDINGS, "tenth", "images"))
    sha256 = rows.config_sha256(replace(made, seed=seed))
    known = {"data": "digits", "device": "1 x cpu", "versions": "jax 1", "seconds": 1.25}
    return (
        blank
        | known
        | {
            "variant": variant,
            "seed": seed,
            "config_sha256": sha256,
            "test_accuracy": accuracy,
            **others,
        }
    )


def test_the_table_has_mean_and_standard_deviation(tmp_path: Path):
    """Of 40, 50 and 75 percent: mean 55, deviation sqrt((225 + 25 + 400) / 2) = 18.03."""
    found = [row("one", seed, x, tenth=0.1) for seed, x in enumerate((0.4, 0.5, 0.75))]
    found.append(row("two", 1, 0.8125, tenth=0.2))
    rows.write_csv(tmp_path / "results.csv", found[0], found)
    store = Store(EXPERIMENT, tmp_path / "none", tmp_path)
    assert store.seeds == 3
    report.write("try", store, 3, tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[:3] == ["# Does a second epoch help?", "", "Few images."]
    assert "no setting was chosen by them" in lines[4]
    assert lines[6:10] == [
        "| variant | seeds | test accuracy, % | epochs | tenth, % "
        "| the chapter's test accuracy, % |",
        "|---|---|---|---|---|---|",
        "| one | 3 | 55.0 ± 18.0 | 1 | 10.0 ± 0.0 |  |",
        "| two | 1 of 3, the others missing | 81.2 | 2 | 20.0 | 80.0 |",
    ]
    assert lines[-5:] == [
        "Made by `python -m experiments.run try run --seeds=3`, then "
        "`python -m experiments.run try report --seeds=3`.",
        "",
        "- data: digits",
        "- device: 1 x cpu",
        "- versions: jax 1",
    ]


def test_a_report_before_any_run_says_missing(tmp_path: Path):
    report.write("try", Store(EXPERIMENT, tmp_path / "none", tmp_path), 2, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| two | 0 of 2, the others missing | missing | 2 | missing | 80.0 |" in text
    assert not (tmp_path / "try.png").exists()


@pytest.mark.parametrize(
    ("column", "values", "text"),
    [
        ("test_accuracy", [0.4, 0.5, 0.75], "55.0 ± 18.0"),
        ("test_accuracy", [0.4], "40.0"),
        ("test_accuracy", [], "missing"),
        ("test_accuracy", [None, None], "diverged"),
        ("test_accuracy", [0.4, None, 0.5], "45.0 ± 7.1 (1 diverged)"),
        ("best_epoch", [math.nan, math.nan], "-"),
        ("best_epoch", [math.nan, None], "- (1 diverged)"),
        ("best_epoch", [2, math.nan, None], "2.0 (1 diverged, 1 without)"),
        ("test_loss", [1.0, 2.0], "1.500 ± 0.707"),
        ("param_count", [83_973_962, 83_973_962], "83,973,962 ± 0"),
        ("flops_per_image", [2_500_000], "2.5"),
    ],
)
def test_cells(column: str, values: list[float | None], text: str):
    assert report.cell(column, values) == text


def test_a_value_that_a_finished_run_does_not_have_is_a_dash(tmp_path: Path):
    """Without validation there is no best epoch."""
    found = [row("one", 0, 0.4), row("two", 0, None)]
    rows.write_csv(tmp_path / "results.csv", found[0], found)
    experiment = replace(EXPERIMENT, columns=("test_accuracy", "best_epoch"))
    report.write("try", Store(experiment, tmp_path / "none", tmp_path), 1, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| one | 1 | 40.0 | - |  |\n| two | 1 | diverged | diverged | 80.0 |" in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"order": ("one", "tow")}, "order: there is no variant tow (did you mean two?)"),
        ({"order": ("two",)}, "order must name every variant once"),
        ({"order": ("two", "one", "two")}, "order must name every variant once"),
        ({"rates": {"tow": (0.1,)}}, "rates: there is no variant tow (did you mean two?)"),
        ({"borrowed": ("vgg",)}, "borrowed: there is no variant vgg"),
        ({"reference": {"vgg": 0.8}}, "reference: there is no variant vgg"),
        ({"watch_test": False}, "Curves are of the test set too: set watch_test"),
    ],
)
def test_an_experiment_that_is_not_whole_is_refused(changes: dict[str, Any], line: str):
    with pytest.raises(UserError) as caught:
        replace(EXPERIMENT, **changes)
    assert str(caught.value) == f"Does a second epoch help? {line}"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"columns": ("test_acuracy",)}, "column test_acuracy (did you mean test_accuracy?)"),
        ({"columns": ("tent",)}, "column tent (did you mean tenth?)"),
        ({"columns": ("train.epoch",)}, "field train.epoch (did you mean train.epochs?)"),
        ({"columns": ("data",)}, "column data"),
        ({"figure": Bars(("tenht",))}, "column tenht (did you mean tenth?)"),
        ({"figure": AgainstMeasured({"imags": 1}, "")}, "column imags (did you mean images?)"),
        ({"figure": Points("second")}, "column second (did you mean seconds?)"),
        ({"figure": AgainstField("epochs", "")}, "field epochs (did you mean train.epochs?)"),
    ],
)
def test_a_column_that_no_run_has_is_refused(changes: dict[str, Any], line: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        Store(replace(EXPERIMENT, **changes), tmp_path, tmp_path)
    assert str(caught.value) == f"Does a second epoch help? There is no {line}"


def test_the_arithmetic_of_training_is_three_times_that_of_all_its_images():
    known = {"flops_per_image": 1e6, "images_per_second": 200.0, "seconds": 50.0}
    assert rows.value(row("one", 0, 0.5) | known, "train_flops") == 3e10
    assert rows.value(row("one", 0, None), "train_flops") is None
    assert math.isnan(rows.value(row("one", 0, 0.5), "train_flops") or 0)
    assert rows.value(row("one", 0, 0.5), "test_accuracy") == 0.5
    assert report.cell("train_flops", [3.5e14]) == "0.35"


def test_the_hash_stands_for_what_a_run_depends_on():
    assert rows.config_sha256(BASE) == "cfa549b16133190d"
    same = replace(edit(BASE, data={"dir": "/elsewhere"}), name="other")
    assert rows.config_sha256(same) == rows.config_sha256(BASE)
    for changed in (replace(BASE, seed=1), edit(BASE, train={"epochs": 3})):
        assert rows.config_sha256(changed) != rows.config_sha256(BASE)


# Of the fields that there were when the committed results were made.
DEFAULTS = """
{"data": {"name": "digits", "image_size": 32, "classes": [], "images_per_class": 0,
  "validation": 0.0, "test_fraction": 0.2, "split_seed": 0, "mean": [0.0, 0.0, 0.0],
  "std": [1.0, 1.0, 1.0]},
"augment": {"flip": false, "alternate_flip": false, "translate": 0, "cutout": 0,
  "test_time": "none"},
"model": {"name": "simple_cnn", "blocks": [[50, 50]], "pooling": "max", "dense": [512],
  "activation": "relu", "dropout": 0.0, "initializer": "glorot_uniform", "dtype": "float32"},
"init": {"checkpoint": "", "kind": "", "skip": [], "whiten": ""},
"optim": {"name": "momentum", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0,
  "decays": [], "clip_norm": 0.0, "schedule": "constant", "warmup_epochs": 0.0,
  "warmup_fraction": 0.0, "final_fraction": 0.0, "boundaries": [], "decay_factor": 0.1,
  "groups": [], "phases": []},
"train": {"epochs": 3, "batch_size": 64, "loss": "cross_entropy", "label_smoothing": 0.0,
  "accumulate": 1, "cache_frozen": false, "ema_decay": 0.0, "lookahead_steps": 0,
  "patience": 0, "skip_nonfinite": false, "deterministic": false, "segment_steps": 50,
  "checkpoint_seconds": 120.0, "keep_checkpoints": 2, "seeds": 1}}
"""


def test_no_default_has_changed_since_results_were_committed():
    """The hash leaves out what is the default's, so they would count for the new default's config.

    A new field needs a default that changes nothing, and no line here.
    """
    found = json.loads(json.dumps(configuration.to_dict(Config())))
    changed = [
        f"{section}.{name}: {default} -> {found[section].get(name)}"
        for section, defaults in json.loads(DEFAULTS).items()
        for name, default in defaults.items()
        if found[section].get(name) != default
    ]
    assert not changed, "keep these defaults, or train anew what is committed and left them alone"


def test_only_chooses_variants_in_the_order_of_running():
    assert rows.chosen_variants(EXPERIMENT, "*") == ["two", "one"]
    assert rows.chosen_variants(EXPERIMENT, "o*") == ["one"]
    with pytest.raises(UserError) as caught:
        rows.chosen_variants(EXPERIMENT, "tow")
    assert str(caught.value) == "--only=tow matches no variant (did you mean two?): two, one"


def test_the_command_lists_runs_and_reports(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    module = SimpleNamespace(EXPERIMENT=EXPERIMENT)
    monkeypatch.setitem(sys.modules, "experiments.try", module)
    monkeypatch.setattr(run, "EXPERIMENTS", ("try",))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for name in ("modes.set_up_jax", "devices.use_cores"):  # JAX has its devices by now.
        monkeypatch.setattr(f"cnn_jax.{name}", lambda _: None)
    (tmp_path / "my runs").mkdir()
    (tmp_path / "my runs/try").symlink_to(trained / "runs")
    flags.FLAGS.mark_as_parsed()
    given = {"runs": str(tmp_path / "my runs"), "seeds": 1}
    with flagsaver.flagsaver(**given, only="t*"):
        run.main(["run.py", "try", "list"])
        listed = capsys.readouterr().out
        run.main(["run.py", "try", "run"])
    assert "│ two     │ 0    │ done" in listed and "│ one" not in listed
    shown = capsys.readouterr().out
    assert shown.startswith("two 0 2 ")
    assert f"python -m experiments.run try report --seeds=1 --runs='{tmp_path}/my runs'" in shown
    with flagsaver.flagsaver(**given):
        run.main(["run.py", "try", "report"])
    assert (tmp_path / "try/results.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert len(rows.read_csv(tmp_path / "try/results.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["chaptre", "list"],
            "unknown experiment chaptre (did you mean chapter?); known: activation, a",
        ),
        (["chapter", "rnu"], "rnu: expected list|run|report (did you mean run?)"),
        (["chapter"], "expected NAME and one of list|run|report"),
    ],
)
def test_a_typo_is_one_line(arguments: list[str], line: str):
    with pytest.raises(UserError) as caught:
        run.main(["run.py", *arguments])
    assert str(caught.value).startswith(line)


def test_the_command_itself_ends_with_2_for_a_typo(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.run", "chapter", "list", "--onyl=vgg*"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: Unknown command line flag 'onyl'. Did you mean: only")
    assert result.stderr.count("\n") == 1


def test_on_a_terminal_the_table_grows():
    console = Console(width=100, height=10, force_terminal=True, color_system=None)
    with console.capture() as capture, runner.Board(console) as board:
        board.now("two-seed0: step 9")
        for seed in range(4):
            board.add(row("two", seed, 0.5, epochs=2, train_accuracy=0.75))
    shown = capture.get()
    assert "two-seed0: step 9" in shown
    last = shown[shown.rindex("variant") :]
    assert last.count("│ two ") == 4, "the finished table has all rows"
    assert "50.00%" in last and "75.00%" in last


NAMES = run.EXPERIMENTS


def loaded(name: str) -> Experiment:
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def test_every_file_of_an_experiment_is_known():
    ablations = (
        "activation augmentation batch_size depth dropout early_stopping initialisation loss "
        "optimizer pooling rotation translation"
    )
    assert set(NAMES) == {"chapter", "airbench", "recipe", *ablations.split()}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_whole(name: str):
    experiment = loaded(name)
    assert set(experiment.order or experiment.variants) == set(experiment.variants)
    assert set(experiment.rates) <= set(experiment.variants)
    assert experiment.seeds >= (1 if name == "chapter" else 3)
    assert isinstance(experiment.figure, Curves) == experiment.watch_test
    known = {*rows.COLUMNS, *rows.DERIVED, *experiment.measured, *configuration.flatten(Config())}
    known.add(rows.EPOCHS_RUN)
    shown = set(experiment.columns)
    if isinstance(experiment.figure, Bars | AgainstMeasured):
        shown |= set(experiment.figure.columns)
    if isinstance(experiment.figure, AgainstField):
        shown.add(experiment.figure.name)
    if isinstance(experiment.figure, Points):
        shown.add(experiment.figure.column)
    assert shown <= known
    planned = [made for v in experiment.variants for made in rows.tuning_runs(experiment, v)]
    planned += [rows.Run(variant, made) for variant, made in experiment.variants.items()]
    same = 1 if name == "batch_size" else 0  # Both of its lines go through one run.
    assert len({run.sha256 for run in planned}) == len({run.name for run in planned}) - same
    assert set(experiment.borrowed) <= set(experiment.variants)
    for wanted in planned:
        assert configuration.from_dict(configuration.to_dict(wanted.config)) == wanted.config
        assert wanted.config.data.name == "cifar10"
    for model in {wanted.config.model for wanted in planned}:
        assert models.summarize(models.build(model, 10), (32, 32, 3))


def test_the_chapter_runs_in_the_chapter_s_settings():
    found = {
        name: (made.train.epochs, made.train.batch_size, made.model.dropout, made.model.initializer)
        for name, made in loaded("chapter").variants.items()
    }
    assert found == {
        "simple_cnn": (3, 64, 0.0, "glorot_uniform"),
        "vgg1": (20, 64, 0.0, "glorot_uniform"),
        "vgg2": (10, 64, 0.0, "glorot_uniform"),
        "vgg2_he": (10, 64, 0.0, "he_uniform"),
        "vgg3": (10, 64, 0.0, "glorot_uniform"),
        "vgg_dropout": (10, 64, 0.5, "glorot_uniform"),
        "vgg_dropout_30": (30, 64, 0.5, "glorot_uniform"),
    }


@pytest.mark.parametrize(
    ("activation", "outputs", "dead", "flat"),
    [
        ("relu", [[0, 0, 2], [0, 1, 3]], 1 / 3, 3 / 6),
        ("tanh", [[0.999, 0.992, -0.999], [-0.999, 0.999, 0]], 1 / 3, 4 / 6),
        ("sigmoid", [[0.001, 0.5, 0.999], [0.001, 0.01, 0.9]], 1 / 3, 3 / 6),
    ],
)
def test_dead_units_and_flat_outputs(activation: str, outputs: list, dead: float, flat: float):
    found = np.array(outputs)
    assert measures.dead_and_flat(found, activation) == (dead, flat)
    # Of a convolution's outputs a unit is dead if it is at every place.
    assert measures.dead_and_flat(found.reshape(1, 2, 1, 3), activation) == (dead, flat)


def test_units_are_counted_for_every_layer_but_the_head():
    model = models.build(BASE.model, 10)
    images = rows.load_data(BASE.data).train.images
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    bias = np.array([-100, 0, 0, 0], np.float32)
    variables["params"]["block1"]["conv1"]["bias"] = bias
    trained = runs.TrainedModel(BASE, model, variables, tuple("0123456789"), (8, 8, 3), 0)
    found = measures.units(trained, rows.load_data(BASE.data))
    assert list(found) == ["block1/conv1 dead", "block1/conv1 flat"]
    assert found["block1/conv1 dead"] == 0.25
    kernel = variables["params"]["block1"]["conv1"]["kernel"]
    inputs = np.pad(images / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(inputs, (3, 3), axis=(1, 2))
    outputs = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias.reshape(1, 1, 1, 4)
    np.testing.assert_allclose(found["block1/conv1 flat"], np.mean(outputs <= 0), atol=1e-3)


def test_shifts_move_and_reflect():
    image = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1)
    assert measures.shift(image, 1, 0).reshape(3, 3).tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert measures.shift(image, 0, -1).reshape(3, 3).tolist() == [[1, 2, 1], [4, 5, 4], [7, 8, 7]]
    np.testing.assert_array_equal(measures.shift(image, 0, 0), image)


def test_rotations_turn_counter_clockwise_about_the_centre():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(measures.rotate(images, 0), images)
    np.testing.assert_array_equal(measures.rotate(images, 90), np.rot90(images, 1, axes=(1, 2)))
    np.testing.assert_array_equal(measures.rotate(images, 180), images[:, ::-1, ::-1])
    constant = np.full((1, 8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(measures.rotate(constant, 30), constant)


def test_accuracies_of_changed_images_are_means_over_directions(dataset: ImageDataset):
    """A network that says 1 where the first row of pixels is as it was, and else 0.

    The images are the same along every row, so only shifts up and down change them. Turned by 90
    degrees they differ in both directions, except for the first: it begins with a row of 0, and
    its last column, which becomes its first row when it is turned one way, is made 0 as well.
    """
    images = np.broadcast_to(np.arange(32, dtype=np.uint8).reshape(1, 32, 1, 1), (10, 32, 32, 3))
    images = images.copy()
    turning = images.copy()
    turning[0, :, -1] = 0

    def accuracies(measure: Any, images: np.ndarray) -> dict[str, float]:
        def logits(seen: np.ndarray) -> np.ndarray:
            same = (seen[:, 0] == images[:, 0]).all(axis=(1, 2)).astype(int)
            return np.eye(3)[same]

        test = replace(dataset.test, images=images, labels=np.ones(10, np.int32))
        trained: Any = SimpleNamespace(logits=logits)
        return measure(trained, replace(dataset, test=test))

    shifted = accuracies(measures.shifted, images)
    assert shifted["shift 0"] == 1.0
    assert shifted["shift 1"] == 0.5
    assert list(shifted) == list(loaded("translation").measured)
    rotated = accuracies(measures.rotated, turning)
    assert rotated["0 degrees"] == 1.0
    assert rotated["90 degrees"] == pytest.approx(0.05)
    assert list(rotated) == list(loaded("rotation").measured)


def test_the_activation_experiment_names_the_layers_of_its_network():
    made = loaded("activation").variants["relu"].model
    layers = [r.name for r in models.summarize(models.build(made, 10), (32, 32, 3)) if r.params]
    expected = tuple(f"{layer} {share}" for layer in layers[:-1] for share in ("dead", "flat"))
    assert loaded("activation").measured == expected


def test_means_leave_out_what_is_missing():
    values = np.array([[0.4, 0.5, 0.75], [0.5, np.nan, np.nan], [np.nan] * 3])
    means, deviations = plots.mean_and_std(values)
    np.testing.assert_allclose(means, [0.55, 0.5, np.nan], rtol=1e-12)
    np.testing.assert_allclose(deviations, [0.18027756377319948, 0, 0], rtol=1e-12)


@pytest.mark.parametrize(("seeds", "cell"), [(1, "| 30.0 |"), (2, "| 35.0 ± 7.1 |")])
def test_the_table_of_transfer_has_a_mean_for_each_method_and_number(seeds: int, cell: str):
    measured = [
        {"method": method, "shots": shots, "seed": seed, "test_accuracy": 0.3 + 0.1 * seed}
        for method in transfer.METHODS
        for shots in transfer.SHOTS
        for seed in range(seeds)
    ]
    measured[0]["test_accuracy"] += 0.4  # of the first method at 20 images a class
    found = transfer.accuracies(measured)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(
        transfer.METHODS, (3, seeds)
    )
    first, second, *_ = transfer.table(found).splitlines()[2:]
    assert first.startswith("| scratch | 70.0" if seeds == 1 else "| scratch | 55.0")
    assert first.endswith(cell)
    assert second.count(cell[1:]) == len(transfer.SHOTS)


def test_figures_show_means_in_order_and_their_spread(tmp_path: Path):
    values = np.array([[0.4, 0.6], [0.2, 0.2]])
    lines = plots.lines({"a": (np.array([2.0, 1.0]), values)}, x_label="x", y_label="y")
    (line,) = lines.axes[0].lines
    np.testing.assert_allclose(np.asarray(line.get_xydata()), [[1, 0.2], [2, 0.5]])
    (band,) = lines.axes[0].collections
    heights = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}  # pyright: ignore
    assert heights == {(1, 0.2), (2, 0.358579), (2, 0.641421)}, "0.5 and sqrt(0.02) each way"
    many = {str(i): (np.array([20.0, 500.0]), values) for i in range(5)}
    crowded = plots.lines(many, x_label="x", y_label="y", logarithmic=True)
    assert [text.get_text() for text in crowded.axes[0].get_xticklabels()] == ["20", "500"]
    assert len(crowded.legends[0].get_texts()) == 5
    unlike = many | {"shorter": (np.array([100.0]), values[:1])}
    ticks = plots.lines(unlike, x_label="x", y_label="y", logarithmic=True).axes[0].get_xticks()
    assert ticks.tolist() == [20, 100, 500], "of lines of unlike numbers of points"
    bars = plots.bars(["a", "b"], {"test": values, "train": values + 0.1})
    heights = [patch.get_height() for patch in bars.axes[0].patches]  # pyright: ignore
    np.testing.assert_allclose(heights, [0.5, 0.2, 0.6, 0.3])
    (first, *_) = bars.axes[0].collections[0].get_segments()  # pyright: ignore
    np.testing.assert_allclose(first, [[-0.2, 0.358579], [-0.2, 0.641421]], atol=1e-6)
    dots = plots.dots(["a", "b"], values, label="test")
    means, _, _, *_ = dots.axes[0].lines
    np.testing.assert_allclose(np.asarray(means.get_xydata()), [[0.5, 0], [0.2, 1]])
    (first, *_) = dots.axes[0].collections[0].get_segments()  # pyright: ignore
    np.testing.assert_allclose(first, [[0.358579, 0], [0.641421, 0]], atol=1e-6)
    assert [text.get_text() for text in dots.axes[0].get_yticklabels()] == ["a", "b"]
    curves = plots.learning_curves({"a": (np.array([0.1, 0.2]), np.array([0.3, 0.4]))})
    for axes, expected in zip(curves.axes, ([0.1, 0.2], [0.3, 0.4]), strict=True):
        np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), expected)
    points = plots.points({"a": (np.array([1.0, 3.0]), values[0])}, x_label="x", y_label="y")
    (point,) = points.axes[0].lines[:1]
    np.testing.assert_allclose(np.asarray(point.get_xydata()), [[2, 0.5]])
    assert [text.get_text() for text in points.axes[0].texts] == ["a"]
    for figure in (lines, crowded, bars, dots, curves, points):
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("unlike", [{"rates": {"b-2": (0.1, 0.2)}}, {"borrowed": ("b-2",)}])
@pytest.mark.parametrize(
    "figure",
    [
        Dots(),
        Bars(("test_accuracy", "train_accuracy")),
        AgainstField("train.epochs", "epochs"),
        AgainstMeasured({"tenth": 0.1, "images": 0.2}, "number"),
        Points("seconds"),
    ],
)
def test_a_figure_shows_variants_of_unlike_numbers_of_seeds(
    figure: Any, unlike: dict[str, Any], tmp_path: Path
):
    """Of a variant nothing is known before its rate, and as much as there is if it is borrowed."""
    variants, measured = {"b-1": SHORTER, "b-2": BASE}, ("tenth", "images")
    experiment = Experiment("?", variants, figure, seeds=3, measured=measured, **unlike)
    numbers = {"train_accuracy": 0.6, "tenth": 0.1, "images": 0.2}
    known = [row("one", seed, 0.5, **numbers) | {"variant": "b-1"} for seed in range(3)]
    rows.write_csv(tmp_path / "results.csv", known[0], known)
    report.write("try", Store(experiment, tmp_path / "runs", tmp_path), 3, tmp_path)
    assert (tmp_path / "try.png").exists()


def test_points_of_a_line_are_found_by_name_and_field(tmp_path: Path):
    variants = {
        f"{line}-{size}": edit(BASE, train={"batch_size": size}, optim={"learning_rate": rate})
        for line, rate in (("a", 0.1), ("b", 0.2))
        for size in (16, 32)
    }
    figure = AgainstField("train.batch_size", "batch", logarithmic=True)
    experiment = Experiment("?", variants, figure, seeds=1)
    store = Store(experiment, tmp_path / "none", tmp_path)
    final = {name: store.runs(name, 1)[1] for name in variants}
    found = {
        n: row("one", 0, 0.1 * i) | {"variant": n, "config_sha256": final[n][0].sha256}
        for i, n in enumerate(variants)
    }
    rows.write_csv(tmp_path / "results.csv", found["a-16"], found.values())
    axes = report.draw(Store(experiment, tmp_path / "none", tmp_path), final, []).axes[0]
    data = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert data["a"] == [[16, 0.0], [32, 0.1]]
    np.testing.assert_allclose(data["b"], [[16, 0.2], [32, 0.3]])
    assert axes.get_xlabel() == "batch"


def test_points_stand_at_what_the_table_says_and_missing_variants_have_no_curve(tmp_path: Path):
    variants = {"one": BASE, "other": edit(BASE, train={"epochs": 5})}
    experiment = Experiment("?", variants, Points("train_flops"), seeds=1)
    store = Store(experiment, tmp_path / "none", tmp_path)
    final = {name: store.runs(name, 1)[1] for name in variants}
    training = {"flops_per_image": 2e12, "images_per_second": 10, "seconds": 5}
    known = row("one", 0, 0.5, **training) | {"config_sha256": final["one"][0].sha256}
    rows.write_csv(tmp_path / "results.csv", known, [known])
    store = Store(experiment, tmp_path / "none", tmp_path)
    axes = report.draw(store, final, []).axes[0]
    (point,) = axes.lines[:1]
    np.testing.assert_allclose(np.asarray(point.get_xydata()), [[0.3, 0.5]])
    assert axes.get_xlabel() == "PFLOPs of training"

    watching = replace(experiment, figure=Curves(), watch_test=True)
    store = Store(watching, tmp_path / "none", tmp_path)
    line = dict.fromkeys(rows.CURVE) | {"epoch": 1, "train_accuracy": 0.4, "test_accuracy": 0.3}
    figure = report.draw(store, final, [line | {"variant": "one", "seed": 0}])
    assert [str(line.get_label()) for line in figure.axes[0].lines] == ["one"]
