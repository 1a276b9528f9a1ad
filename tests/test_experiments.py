"""Experiments: what is missing is trained, what is done is not, and what the report says of it."""

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
from helpers.training import edit, quiet
from rich.console import Console

from cnn_jax import backend, fields, fit, models
from cnn_jax.config import (
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor
from cnn_jax.runs import checkpoint, outcome
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.stop import Stopped
from cnn_jax.tools import report as run_report
from cnn_jax.tools.train import train as train_run
from experiments import charts, measures, publish, run, store, tables, training
from experiments.spec import (
    PRETRAINED,
    AgainstField,
    AgainstMeasured,
    Bars,
    Curves,
    Dots,
    Experiment,
    Points,
)
from experiments.store import Run, Store
from experiments.tables import Row, Table

ROOT = Path(__file__).parents[1]

# 20 digits of each class in batches of 32: seven steps an epoch. Half of each side is seen.
BASE = Config(
    data=DataConfig(image_size=8, crop=0.5, images_per_class=20),
    model=ModelConfig(name="vgg", blocks=((4,),), dense=()),
    optim=OptimConfig(learning_rate=0.1),
    train=TrainConfig(epochs=2, batch_size=32),
    runtime=RuntimeConfig(segment_steps=2),
)
DIGITS = "scikit-learn load_digits, scaled to 16x16x3"
SHORTER = edit(BASE, train={"epochs": 1})


def count_classes(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    return {"tenth": len(predictor.class_names) / 100, "images": len(dataset.train) / 1000}


EXPERIMENT = Experiment(
    question="Does a second epoch help?",
    variants={"one": SHORTER, "two": BASE},
    figure=Curves(),
    seeds=2,
    columns=("test_accuracy", "train.epochs", "tenth"),
    measured=("tenth", "images"),
    measure=count_classes,
    reference={"two": 0.8},
    note="Few images.",
)
BLIND = replace(EXPERIMENT, figure=Dots())
"""Without test accuracies by epoch."""


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Keeps the compiled programs, of which there are few here, and writes no report.html."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        patch.setattr(run_report, "write", lambda *_: None)
        yield


def train(rows: Store, variants: list[str], seeds: int = 2) -> str:
    """Trains what is missing and returns what was shown, without a terminal."""
    console = Console(width=120)
    with console.capture() as capture:
        training.train_missing(rows, variants, seeds, console)
    return capture.get()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workdirs of all runs, and the report in `results`."""
    folder = tmp_path_factory.mktemp("trained")
    rows = Store(EXPERIMENT, folder / "runs", folder / "results")
    train(rows, ["two", "one"])
    publish.write("try", rows, 2, folder / "results")
    return folder


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes every training an error."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *_, **__: pytest.fail("something was trained"))
        yield


def states(rows: Store, variant: str, seeds: int = 2) -> list[str]:
    return [rows.state(run) for part in rows.runs(variant, seeds) for run in part]


def found_rows(rows: Store, variant: str) -> list[Row]:
    return [row for run in rows.runs(variant, 2)[1] if (row := rows.row(run))]


def hashes(rows: Store, variant: str) -> list[str]:
    return [row["params_sha256"] for row in found_rows(rows, variant)]


def made(variant: str, seed: int, accuracy: float | None, **others: Any) -> tuple[Run, Row]:
    """Returns a run of EXPERIMENT, and a row for it; None as accuracy: the run diverged."""
    config = replace(EXPERIMENT.variants.get(variant, BASE), seed=seed)
    row = dict.fromkeys((*tables.RESULTS, *tables.PROVENANCE, "tenth", "images"))
    row |= {"data": "digits", "data_sha256": "0", "device": "1 x cpu", "versions": "jax 1"}
    row |= {"variant": variant, "seed": seed, "seconds": 1.25, "commit": "1234567", "curve": []}
    row |= {"test_accuracy": accuracy, "epochs": None if accuracy is None else 1}
    return Run(variant, config), row | others


def commit(folder: Path, *pairs: tuple[Run, Row]) -> None:
    """Writes the files that the rows of an experiment are read back from."""
    Store(EXPERIMENT, folder / "none", folder / "none").write(folder, dict(pairs))


def epochs_of(variant: str, n: int) -> list[Row]:
    """Returns the curve of a run of seed 0 with so many epochs."""
    line = dict.fromkeys(tables.CURVE, 0.5) | {"variant": variant, "seed": 0}
    return [line | {"epoch": i} for i in range(1, n + 1)]


def report(experiment: Experiment, folder: Path, seeds: int) -> str:
    """Writes the report of what is committed in a folder, and returns its page."""
    publish.write("try", Store(experiment, folder / "none", folder), seeds, folder / "report")
    return (folder / "report/results.md").read_text()


@pytest.mark.slow
def test_rows_have_the_results_of_the_runs(trained: Path):
    written = store.read_csv(trained / "results/results.csv")
    assert [(row["variant"], row["seed"], row["epochs"]) for row in written] == [
        ("one", 0, 1),
        ("one", 1, 1),
        ("two", 0, 2),
        ("two", 1, 2),
    ]
    for row in written:
        summary = outcome.read(trained / f"runs/{row['variant']}-seed{row['seed']}")
        assert summary is not None
        for name in ("test_accuracy", "test_loss", "train_accuracy", "seconds", "params_sha256"):
            assert row[name] == summary[name], name
        assert (row["steps"], row["param_count"]) == (7 * row["epochs"], 4 * 28 + 10 * 65)
        assert row["flops_per_image"] == 2 * (8 * 8 * 27 * 4 + 64 * 10)
        assert (row["tenth"], row["images"]) == (0.1, 0.2)
        assert row["validation_accuracy"] is None
        assert (row["data"], row["data_sha256"]) == (DIGITS, summary["data"]["sha256"])
        assert "jax" in row["versions"]
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", row["commit"])
    assert len({row["params_sha256"] for row in written}) == 4


def test_curves_have_train_and_test_of_every_epoch(trained: Path):
    curves = store.read_csv(trained / "results/curves.csv")
    found = [(line["variant"], line["seed"], line["epoch"]) for line in curves]
    assert found == [("one", 0, 1), ("one", 1, 1), *(("two", s, e) for s in (0, 1) for e in (1, 2))]
    row = store.read_csv(trained / "results/results.csv")[2]
    assert curves[3]["test_accuracy"] == row["test_accuracy"] != curves[2]["test_accuracy"]
    assert curves[3]["train_accuracy"] == row["train_accuracy"]
    assert curves[3]["validation_accuracy"] is None


def test_about_json_has_the_whole_config_of_every_run(trained: Path):
    configs = json.loads((trained / "results/about.json").read_text())["configs"]
    assert configs["runs"]["two-seed1"] == {"seed": 1, "train.epochs": 2}
    whole = configs["common"] | configs["runs"]["two-seed1"]
    wanted = fields.identity(replace(BASE, seed=1))
    assert whole == json.loads(json.dumps(wanted))


def test_nothing_is_chosen_by_watching_the_test_set(trained: Path, tmp_path: Path):
    """The bits are those of a run that is not watched, and there is no best epoch."""
    (one, _) = Store(EXPERIMENT, trained / "runs", tmp_path).runs("two", 2)[1]
    dataset = store.load_data(BASE.data, "")
    plain = train_run(one.config, dataset, tmp_path / "plain", make_log=quiet).summary
    summary = outcome.read(trained / "runs/two-seed0")
    assert summary is not None
    assert plain["params_sha256"] == summary["params_sha256"]
    assert summary["best_epoch"] is None
    assert not list((trained / "runs/two-seed0/checkpoints/best").iterdir())
    assert "test_accuracy" not in (tmp_path / "plain/metrics.jsonl").read_text()


@pytest.mark.usefixtures("untrained")
def test_finished_workdirs_are_not_trained_again(trained: Path, tmp_path: Path):
    rows = Store(EXPERIMENT, trained / "runs", tmp_path)
    assert states(rows, "one") == states(rows, "two") == ["done", "done"]
    shown = train(rows, ["two", "one"])
    names = ["two-seed0", "two-seed1", "one-seed0", "one-seed1"]
    assert [line.split(":")[0] for line in shown.splitlines()] == names


@pytest.mark.usefixtures("untrained")
def test_committed_results_are_not_trained_again(trained: Path, tmp_path: Path):
    """A fresh clone has no workdirs; its report is the same, byte by byte."""
    rows = Store(EXPERIMENT, tmp_path / "none", trained / "results")
    assert states(rows, "two") == ["done", "done"]
    train(rows, ["two", "one"])
    assert not (tmp_path / "none").exists()
    publish.write("try", rows, 2, tmp_path / "report")
    for name in ("results.csv", "curves.csv", "results.md", "about.json", "try.png"):
        rewritten, before = (tmp_path / "report" / name), (trained / "results" / name)
        assert rewritten.read_bytes() == before.read_bytes(), name


@pytest.mark.usefixtures("untrained")
def test_a_run_that_another_experiment_committed_counts(trained: Path, tmp_path: Path):
    """By its config, whatever it is called there, and only with all that is measured here."""
    other = replace(EXPERIMENT, variants={"short": SHORTER}, reference={})

    def found(others: list[Path], **changes: Any) -> Store:
        return Store(replace(other, **changes), tmp_path, tmp_path / "results", others)

    rows = found([trained / "results"])
    assert states(rows, "short") == ["done", "done"]
    assert states(found([]), "short") == ["missing", "missing"]
    before = [r for r in store.read_csv(trained / "results/results.csv") if r["epochs"] == 1]
    for wanted, as_one in zip(rows.runs("short", 2)[1], before, strict=True):
        row = rows.row(wanted) or pytest.fail("lost")
        curve = row.pop("curve")
        assert row == as_one | {"variant": "short"}
        assert [(line["variant"], line["epoch"]) for line in curve] == [("short", 1)]
        assert curve[0]["test_accuracy"] == row["test_accuracy"]
    assert rows.seeds == 0, "of its own committed results"
    assert states(found([trained / "results"], measured=("tenth", "new")), "short")[0] == "missing"
    unwatched = tmp_path / "unwatched"
    shutil.copytree(trained / "results", unwatched)
    lines = store.read_csv(trained / "results/curves.csv")
    blind = [line | {"test_accuracy": None} for line in lines]
    store.write_csv(unwatched / "curves.csv", lines[0], blind)
    assert states(found([unwatched]), "short") == ["missing", "missing"]
    (unwatched / "curves.csv").unlink()
    assert states(found([unwatched]), "short") == ["missing", "missing"]
    assert states(found([unwatched], figure=Dots()), "short") == ["done", "done"]


def test_results_of_another_config_do_not_count(trained: Path, tmp_path: Path):
    changed = edit(BASE, optim={"learning_rate": 0.2})
    other = replace(EXPERIMENT, variants={"one": SHORTER, "two": changed})
    rows = Store(other, tmp_path / "none", trained / "results")
    assert states(rows, "two") == ["missing", "missing"]
    assert states(rows, "one") == ["done", "done"]
    rows = Store(other, trained / "runs", tmp_path)
    line = r"two-seed0 belongs .*optim.learning_rate: 0.1 -> 0.2\); remove it, or choose another --"
    with pytest.raises(UserError, match=line):
        train(rows, ["two"])


CHANGES = {
    "kernels": "xla",
    "storage": "stream",
    "workers": 2,
    "cache_dir": "/elsewhere",
    "segment_steps": 7,
    "checkpoint_seconds": 1.0,
    "seeds": 2,
    "deterministic": True,
}


@pytest.mark.usefixtures("untrained")
def test_settings_of_the_runtime_are_not_part_of_a_row_s_key(trained: Path, tmp_path: Path):
    assert set(CHANGES) == set(vars(RuntimeConfig())), "every field of the section"
    for name, value in CHANGES.items():
        assert Run("", edit(BASE, runtime={name: value})).key == Run("", BASE).key, name
    elsewhere = replace(edit(BASE, data={"dir": "/elsewhere"}, runtime=CHANGES), name="other")
    assert Run("", elsewhere).key == Run("", BASE).key
    for changed in (replace(BASE, seed=1), edit(BASE, train={"epochs": 3})):
        assert Run("", changed).key != Run("", BASE).key
    found = replace(EXPERIMENT, variants={"one": SHORTER, "two": elsewhere})
    assert states(Store(found, tmp_path, trained / "results"), "two") == ["done", "done"]


@pytest.mark.usefixtures("untrained")
def test_rows_outlive_the_version_that_wrote_them(trained: Path, tmp_path: Path):
    """A field that did not exist has its default, and one that is gone makes no error."""
    shutil.copytree(trained / "results", tmp_path / "results")
    about = json.loads((tmp_path / "results/about.json").read_text())
    common = about["configs"]["common"]
    assert common.pop("train.ema_decay") == 0.0
    outcome.write_json(tmp_path / "results/about.json", about)
    assert states(Store(EXPERIMENT, tmp_path, tmp_path / "results"), "two") == ["done", "done"]
    common["train.magic"] = 1
    outcome.write_json(tmp_path / "results/about.json", about)
    rows = Store(EXPERIMENT, tmp_path, tmp_path / "results")
    assert states(rows, "two") == ["missing", "missing"]


@pytest.fixture
def elsewhere(trained: Path, tmp_path: Path) -> Path:
    """A folder of results like those in `trained`, but of other images."""
    shutil.copytree(trained / "results", tmp_path / "elsewhere")
    found = store.read_csv(trained / "results/results.csv")
    lines = [row | {"data": "a copy", "data_sha256": "0", "params_sha256": "0"} for row in found]
    store.write_csv(tmp_path / "elsewhere/results.csv", found[0], lines)
    return tmp_path / "elsewhere"


def test_rows_of_other_images_are_trained_again_once_any_run_is_missing(
    elsewhere: Path, tmp_path: Path
):
    """If none is, the images need not be there."""
    rows = Store(EXPERIMENT, tmp_path / "runs", elsewhere)
    train(rows, ["two", "one"])
    assert not (tmp_path / "runs").exists()
    train(rows, ["one"], seeds=3)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "one-seed0",
        "one-seed1",
        "one-seed2",
    }
    assert len(set(hashes(rows, "one"))) == 2
    assert states(rows, "two") == ["missing", "missing"]

    rows = Store(EXPERIMENT, tmp_path / "runs", elsewhere)
    assert states(rows, "two") == ["done", "done"]
    with pytest.raises(UserError) as caught:
        publish.write("try", rows, 2, tmp_path / "report")
    assert str(caught.value) == (
        f"results of different images: one-seed0 ({DIGITS}) and two-seed0 (a copy); "
        "to train both: python -m experiments.run try run --seeds=2"
    )
    assert not (tmp_path / "report").exists()
    train(rows, ["two", "one"])
    publish.write("try", Store(EXPERIMENT, tmp_path / "runs", elsewhere), 2, tmp_path / "report")
    assert "- data: " + DIGITS in (tmp_path / "report/results.md").read_text().splitlines()


def test_borrowed_seeds_of_other_images_are_trained_again(elsewhere: Path, tmp_path: Path):
    """All that the other experiment has, or two kinds of images would be compared."""
    found = [r for r in store.read_csv(elsewhere / "results.csv") if r["variant"] == "one"]
    store.write_csv(elsewhere / "results.csv", found[0], found)
    borrowing = replace(EXPERIMENT, borrowed=("one",))
    train(Store(borrowing, tmp_path / "runs", tmp_path / "none", [elsewhere]), ["two", "one"])
    publish.write("try", Store(borrowing, tmp_path / "runs", tmp_path), 2, tmp_path / "report")
    written = store.read_csv(tmp_path / "report/results.csv")
    assert [(r["variant"], r["seed"]) for r in written] == [
        (v, s) for v in ("one", "two") for s in (0, 1)
    ]
    assert {r["data"] for r in written} == {DIGITS}


def test_a_workdir_of_other_images_is_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "runs/one-seed0", tmp_path / "one-seed0")
    summary = json.loads((trained / "runs/one-seed0/summary.json").read_text())
    summary["data"]["sha256"] = "0"
    outcome.write_json(tmp_path / "one-seed0/summary.json", summary)
    (row,) = store.read_csv(tmp_path / "one-seed0/results.csv")
    store.write_csv(tmp_path / "one-seed0/results.csv", row, [row | {"data_sha256": "0"}])
    rows = Store(EXPERIMENT, tmp_path, tmp_path / "none")
    line = r"one-seed0 was trained on other images; remove it, or choose another --runs"
    with pytest.raises(UserError, match=line):
        train(rows, ["one"])


@pytest.mark.parametrize("gone", [(), ("results.csv",), ("results.csv", "summary.json")])
def test_a_workdir_without_a_test_curve_that_is_asked_for_is_refused(
    gone: tuple[str, ...], trained: Path, tmp_path: Path
):
    """One that is finished and has a row, one without, and one that was not evaluated yet."""
    workdir = tmp_path / "one-seed0"
    shutil.copytree(trained / "runs/one-seed0", workdir)
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text.replace("test_accuracy", "unknown"))
    (workdir / "curves.csv").unlink()
    for name in gone:
        (workdir / name).unlink()
    rows = Store(EXPERIMENT, tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match=r"one-seed0 lacks the test accuracies of some .*remove"):
        train(rows, ["one"])
    train(Store(BLIND, tmp_path, tmp_path / "none"), ["one"], seeds=1)


def test_a_finished_run_without_a_row_is_not_trained_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill between the end of training and the row leaves it."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    (tmp_path / "runs/one-seed0/results.csv").unlink()
    rows = Store(EXPERIMENT, tmp_path / "runs", tmp_path)
    assert states(rows, "one") == ["interrupted at step 7", "done"]
    monkeypatch.setattr(fit, "train_segment", lambda *_: pytest.fail("it was trained"))
    train(rows, ["one"])
    assert found_rows(rows, "one") == found_rows(
        Store(EXPERIMENT, trained / "runs", tmp_path), "one"
    )


def test_an_interrupted_run_is_resumed_with_the_same_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = Store(EXPERIMENT, tmp_path / "runs", tmp_path / "results")
    segment = RunLog.segment

    def interrupt(self: Any, lines: list[dict[str, Any]], images_per_second: float) -> None:
        segment(self, lines, images_per_second)
        if lines[-1]["step"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "segment", interrupt)
    with pytest.raises(Stopped) as stopped:
        train(rows, ["two"])
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert states(rows, "two") == ["interrupted at step 9", "missing"]
    monkeypatch.undo()
    train(rows, ["two"])
    assert states(rows, "two") == ["done", "done"]
    assert hashes(rows, "two") == hashes(Store(EXPERIMENT, trained / "runs", tmp_path), "two")


def test_borrowed_variants_have_the_seeds_that_are_known(tmp_path: Path):
    borrowing = replace(BLIND, columns=("test_accuracy",), borrowed=("two",), measured=())
    rows = Store(borrowing, tmp_path / "runs", tmp_path / "none")
    assert states(rows, "two", 3) == ["missing"]
    commit(tmp_path / "other", *(made("two", seed, 0.5) for seed in (0, 2)))
    rows = Store(borrowing, tmp_path / "runs", tmp_path / "none", [tmp_path / "other"])
    assert [run.config.seed for run in rows.runs("two", 3)[1]] == [0, 2]
    assert [run.config.seed for run in rows.runs("one", 3)[1]] == [0, 1, 2]
    publish.write("try", rows, 3, tmp_path / "report")
    text = (tmp_path / "report/results.md").read_text()
    assert "| two | 2 | 50.0 ± 0.0 |" in text
    assert "| one | 0 of 3, others missing |" in text


def test_epochs_run_are_those_until_training_stopped(tmp_path: Path):
    """With early stopping the result is that of a better epoch, which `epochs` names."""
    commit(tmp_path, made("two", 0, 0.5, epochs=1, curve=epochs_of("two", 3)))
    text = report(replace(EXPERIMENT, columns=("epochs", "epochs_run"), measured=()), tmp_path, 1)
    assert "| two | 1 | 1.0 | 3.0 | 80.0 |" in text


def test_a_diverged_run_has_no_number_of_epochs(tmp_path: Path):
    """With a 0 for it the mean would be wrong."""
    finished = made("two", 0, 0.5, epochs=2, curve=epochs_of("two", 2))
    commit(tmp_path, finished, made("two", 1, None))
    text = report(replace(EXPERIMENT, columns=("epochs_run",), measured=()), tmp_path, 2)
    assert "| two | 2 | 2.0 (1 diverged) | 80.0 |" in text


def test_an_early_stop_s_validation_accuracy_is_of_the_epoch_that_is_reported(tmp_path: Path):
    stopping = edit(
        BASE,
        data={"validation": 0.2},
        optim={"learning_rate": 0.3},
        train={"epochs": 5, "patience": 1},
    )
    rows = Store(Experiment("?", {"a": stopping}, Dots(), seeds=1), tmp_path / "runs", tmp_path)
    train(rows, ["a"], seeds=1)
    (found,) = found_rows(rows, "a")
    by_epoch = {line["epoch"]: line["validation_accuracy"] for line in found["curve"]}
    assert found["validation_accuracy"] == by_epoch[found["epochs"]] > by_epoch[len(by_epoch)]


TUNED = Experiment(
    question="?",
    variants={"a": SHORTER, "b": edit(SHORTER, model={"blocks": ((2,),)})},
    figure=Dots(),
    seeds=1,
    rates={"a": (0.001, 0.05, 0.1, 1e38), "b": "a"},
    columns=("optim.learning_rate", "test_accuracy"),
)


def tuning(accuracies: list[float | None], **others: Any) -> list[tuple[Run, Row]]:
    """Returns the first runs that tune variant a of TUNED, and rows with validation accuracies."""
    runs, _ = Store(TUNED, Path("none"), Path("none")).runs("a", 1)
    pairs = []
    for one, accuracy in zip(runs, accuracies, strict=False):
        _, row = made(one.variant, 0, accuracy, **others)
        pairs.append((one, row | {"validation_accuracy": accuracy, "test_accuracy": None}))
    return pairs


def test_the_rate_with_the_best_validation_accuracy_is_chosen(tmp_path: Path):
    def chosen(variant: str, *accuracies: float | None) -> float:
        commit(tmp_path, *tuning(list(accuracies)))
        (final,) = Store(TUNED, tmp_path / "none", tmp_path).runs(variant, 1)[1]
        rate = final.config.optim.learning_rate
        assert final.config == edit(TUNED.variants[variant], optim={"learning_rate": rate})
        return rate

    assert chosen("a", 0.3, 0.6, 0.5, None) == 0.05
    assert chosen("a", 0.3, 0.6, 0.6, 0.1) == 0.05, "of equal ones the smallest rate"
    assert chosen("a", None, None, None, 0.0) == 1e38
    assert chosen("b", 0.3, 0.6, 0.5, None) == 0.05, "the rate of a"
    commit(tmp_path, *tuning([0.1, 0.2, 0.3]))
    assert Store(TUNED, tmp_path / "none", tmp_path).runs("a", 1)[1] == []
    with pytest.raises(UserError, match="a: training diverged at every learning rate"):
        chosen("a", None, None, None, None)


def test_tuning_comes_first_and_a_diverged_run_is_reported(tmp_path: Path):
    data_sha256 = store.load_data(edit(BASE, data={"validation": 0.1}).data, "").sha256
    pairs = tuning([0.2, 0.3, 0.4], data=DIGITS, data_sha256=data_sha256)
    assert {run.config.data.validation for run, _ in pairs} == {0.1}
    commit(tmp_path, *pairs)
    rows = Store(TUNED, tmp_path / "runs", tmp_path)
    assert states(rows, "a", 1) == ["done", "done", "done", "missing"]
    assert "no longer finite" in train(rows, ["a"], seeds=1)
    assert states(rows, "a", 1) == ["done", "done", "done", "diverged", "done"]
    publish.write("tuned", rows, 1, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "10% of all training images held out and seed 0" in text
    assert re.search(r"^\| a \| 1 \| 0\.1 \| \d+\.\d \|$", text, re.MULTILINE)
    assert "| b | 0 of 1, others missing | 0.1 | missing |" in text
    assert "| a | 0.1 | 40.0 |\n| a | 1e+38 | diverged |\n\n" in text
    rows = Store(TUNED, tmp_path / "none", tmp_path)
    assert states(rows, "a", 1) == ["done", "done", "done", "diverged", "done"]


PRETRAINING = edit(SHORTER, data={"classes": ("0", "1", "2"), "images_per_class": 0})
FINE_TUNED = edit(
    SHORTER,
    data={"classes": ("3", "4")},
    init={"checkpoint": PRETRAINED, "skip": ("head/.*",)},
    optim={"groups": (("head/.*", 1.0), (".*", None))},
)
TRANSFER = Experiment(
    question="?",
    variants={"scratch": replace(FINE_TUNED, init=InitConfig()), "head": FINE_TUNED},
    figure=Dots(),
    seeds=2,
    split_by_seed=True,
    pretraining=PRETRAINING,
)


def kernel(workdir: Path) -> np.ndarray:
    variables, _ = checkpoint.load_variables(workdir, "latest")
    return np.asarray(variables["params"]["block1"]["conv1"]["kernel"])


@pytest.mark.slow
def test_a_pretrained_network_is_trained_first_and_once(tmp_path: Path):
    rows = Store(TRANSFER, tmp_path / "runs", tmp_path / "results")
    train(rows, ["scratch"], seeds=1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["scratch-seed0"]
    shown = train(rows, ["head"])
    assert shown.count("pretrained-seed0: starts") == 1
    (folder,) = (tmp_path / "runs/head-seed0").glob("from-*")
    source = tmp_path / "runs/pretrained-seed0"
    np.testing.assert_array_equal(kernel(folder), kernel(source))
    assert not np.array_equal(kernel(tmp_path / "runs/scratch-seed0"), kernel(source))
    images = {row["data_sha256"] for row in found_rows(rows, "head")}
    assert len(images) == 2, "each seed has other images"
    accuracy = rows.row(rows.pretraining_run() or pytest.fail("it has none"))
    publish.write("try", rows, 2, tmp_path / "results")
    text = (tmp_path / "results/results.md").read_text()
    assert f"network on its own classes: {100 * (accuracy or {})['test_accuracy']:.1f} %" in text

    rows = Store(TRANSFER, tmp_path / "none", tmp_path / "results")
    assert states(rows, "head") == ["done", "done"]
    assert rows.state(rows.all_runs(["head"], 2)[0]) == "done"
    longer = replace(TRANSFER, pretraining=edit(PRETRAINING, train={"epochs": 2}))
    rows = Store(longer, tmp_path / "none", tmp_path / "results")
    assert states(rows, "head") == ["missing", "missing"], "it is another network"
    assert states(rows, "scratch", 1) == ["done"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", "variant,seed\na,0,x\n"),
        ("results.csv", "variant,seed\na,x\n"),
        ("curves.csv", "variant,seed\na,x\n"),
        ("about.json", '{"configs": {'),
        ("about.json", "[]"),
        ("about.json", '{"runs": 1}'),
    ],
)
def test_a_damaged_file_of_results_is_one_line(name: str, text: str, tmp_path: Path):
    """In the committed results, and in a workdir."""
    commit(tmp_path / "one-seed0", made("one", 0, 0.5))
    (tmp_path / "one-seed0" / name).write_text(text)
    for workdirs, results in ((tmp_path, "none"), (tmp_path / "none", "one-seed0")):
        with pytest.raises(UserError, match=rf"{name} can't be read: .*; restore or remove it"):
            Store(EXPERIMENT, workdirs, tmp_path / results)


def test_a_value_that_is_not_finite_is_an_empty_cell(tmp_path: Path):
    broken = replace(EXPERIMENT, measure=lambda *_: {"tenth": math.inf, "images": math.nan})
    rows = Store(broken, tmp_path / "runs", tmp_path)
    train(rows, ["one"], seeds=1)
    publish.write("try", rows, 1, tmp_path)
    (found,) = found_rows(Store(EXPERIMENT, tmp_path / "none", tmp_path), "one")
    assert (found["tenth"], found["images"]) == (None, None)
    assert 0 <= found["test_accuracy"] <= 1


def test_the_table_has_mean_and_standard_deviation(tmp_path: Path):
    """Of 40, 50 and 75 percent: mean 55, deviation sqrt((225 + 25 + 400) / 2) = 18.03."""
    pairs = [made("one", seed, x, tenth=0.1) for seed, x in enumerate((0.4, 0.5, 0.75))]
    commit(tmp_path, *pairs, made("two", 1, 0.8125, tenth=0.2))
    assert Store(BLIND, tmp_path / "none", tmp_path).seeds == 3
    lines = report(BLIND, tmp_path, 3).splitlines()
    assert lines[:3] == ["# Does a second epoch help?", "", "Few images."]
    assert lines[4:8] == [
        "| variant | seeds | test accuracy, % | epochs | tenth, % "
        "| the chapter's test accuracy, % |",
        "|---|---|---|---|---|---|",
        "| one | 3 | 55.0 ± 18.0 | 1 | 10.0 ± 0.0 |  |",
        "| two | 1 of 3, others missing | 81.2 | 2 | 20.0 | 80.0 |",
    ]
    assert lines[-6:] == [
        "Made by `python -m experiments.run try run --seeds=3`, then "
        "`python -m experiments.run try report --seeds=3`.",
        "",
        "- data: digits",
        "- device: 1 x cpu",
        "- versions: jax 1",
        "- code: 1234567",
    ]


def test_a_report_before_any_run_says_missing(tmp_path: Path):
    text = report(EXPERIMENT, tmp_path, 2)
    assert "no epoch, checkpoint or setting was chosen by them" in text
    assert "| two | 0 of 2, others missing | missing | 2 | missing | 80.0 |" in text
    assert not (tmp_path / "report/try.png").exists()


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
        ("train_flops", [3.5e14], "0.35"),
    ],
)
def test_cells(column: str, values: list[float | None], text: str):
    assert tables.cell(column, values) == text


def test_a_value_that_a_finished_run_does_not_have_is_a_dash(tmp_path: Path):
    """Without validation there is no best epoch."""
    commit(tmp_path, made("one", 0, 0.4), made("two", 0, None))
    text = report(replace(BLIND, columns=("test_accuracy", "best_epoch")), tmp_path, 1)
    assert "| one | 1 | 40.0 | - |  |\n| two | 1 | diverged | diverged | 80.0 |" in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rates": {"tow": (0.1,)}}, "rates: there is no variant tow (did you mean two?)"),
        ({"rates": {"two": "one"}}, "rates: no rate is chosen for one"),
        ({"borrowed": ("vgg",)}, "borrowed: there is no variant vgg"),
        ({"reference": {"vgg": 0.8}}, "reference: there is no variant vgg"),
        (
            {"variants": {"one": BASE, "two": edit(BASE, init={"checkpoint": PRETRAINED})}},
            "two needs the field `pretraining`",
        ),
        ({"columns": ("test_acuracy",)}, "There is no column test_acuracy (did you mean test_ac"),
        ({"columns": ("tent",)}, "There is no column tent (did you mean tenth?)"),
        ({"columns": ("train.epoch",)}, "There is no field train.epoch (did you mean train.epochs"),
        ({"columns": ("data",)}, "There is no column data"),
        ({"figure": Bars(("tenht",))}, "There is no column tenht (did you mean tenth?)"),
        (
            {"figure": AgainstMeasured({"imags": 1}, "")},
            "There is no column imags (did you mean im",
        ),
        ({"figure": Points("second")}, "There is no column second (did you mean seconds?)"),
        ({"figure": AgainstField("epoch", "")}, "There is no column epoch"),
    ],
)
def test_an_experiment_that_is_inconsistent_is_refused(changes: dict[str, Any], line: str):
    with pytest.raises(UserError) as caught:
        replace(EXPERIMENT, **changes)
    assert str(caught.value).startswith(f"Does a second epoch help? {line}")


def test_the_flops_of_training_are_three_times_those_of_all_its_images():
    known = {"flops_per_image": 1e6, "images_per_second": 200.0, "seconds": 50.0}
    (_, finished), (_, diverged) = made("one", 0, 0.5), made("one", 0, None)
    assert tables.value(finished | known, "train_flops") == 3e10
    assert tables.value(diverged, "train_flops") is None
    assert math.isnan(tables.value(finished, "train_flops") or 0)
    assert tables.value(finished, "test_accuracy") == 0.5


def test_only_chooses_variants_by_a_pattern():
    assert run.chosen_variants(EXPERIMENT, "*") == ["one", "two"]
    assert run.chosen_variants(EXPERIMENT, "o*") == ["one"]
    with pytest.raises(UserError) as caught:
        run.chosen_variants(EXPERIMENT, "tow")
    assert str(caught.value) == "--only=tow matches no variant (did you mean two?): one, two"


def test_the_command_lists_trains_and_reports(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    module = SimpleNamespace(EXPERIMENT=EXPERIMENT)
    monkeypatch.setitem(sys.modules, "experiments.try", module)
    monkeypatch.setattr(run, "EXPERIMENTS", ["try"])
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(backend, "set_up", lambda _: None)  # JAX has its devices by now
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
    assert re.match(r"two-seed0: done, test accuracy \d+\.\d\d%\n", shown)
    assert f"python -m experiments.run try report --seeds=1 --runs='{tmp_path}/my runs'" in shown
    with flagsaver.flagsaver(**given):
        run.main(["run.py", "try", "report"])
    assert (tmp_path / "try/results.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert len(store.read_csv(tmp_path / "try/results.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["chaptre", "list"], "unknown experiment chaptre (did you mean chapter?); known: "),
        (["chapter", "rnu"], "rnu: expected list|run|report (did you mean run?)"),
        (["chapter"], "expected NAME and one of list|run|report"),
    ],
)
def test_a_typo_is_one_line(arguments: list[str], line: str):
    with pytest.raises(UserError) as caught:
        run.main(["run.py", *arguments])
    assert str(caught.value).startswith(line)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command of the experiments below `folder`, without any workdirs."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_command_itself_exits_with_2_for_a_typo():
    result = command(ROOT, "chapter", "list", "--onyl=vgg*")
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*\bonyl\b.* did you mean:? .*only.*\n", result.stderr, re.I)


@pytest.mark.slow
def test_the_documented_experiment_is_found_in_its_file(tmp_path: Path):
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=ignored)
    page = (ROOT / "docs/experiments.md").read_text()
    (example,) = re.findall(r"```python\n(# experiments/width.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "experiments/width.py").write_text(example)
    result = command(tmp_path, "width", "list", "--seeds=1")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"│ (\d+) +│ 0 +│ missing", result.stdout) == ["8", "16", "32"]
    assert "width" in command(tmp_path, "widht", "list").stderr


COMMITTED = [name for name in run.EXPERIMENTS if (run.RESULTS / name).is_dir()]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_those_of_the_experiment(name: str, tmp_path: Path):
    """Every run is done, and the report of the rows is the committed one."""
    experiment, folder = run.load(name), run.RESULTS / name
    rows = Store(experiment, tmp_path / "none", folder)
    seeds = max(experiment.seeds, rows.seeds)
    runs = rows.all_runs(experiment.variants, seeds)
    assert {rows.state(one) for one in runs} <= {"done", "diverged"}
    assert {one.variant for one in runs} >= set(experiment.variants)
    publish.write(name, rows, seeds, tmp_path / name)
    for file in ("results.csv", "curves.csv", "about.json", "results.md"):
        assert (tmp_path / name / file).read_text() == (folder / file).read_text(), file
    for row in store.read_csv(folder / "results.csv"):
        assert row["commit"] and len(row["data_sha256"]) == 64
    for model in {one.config.model for one in runs}:
        assert inspection.summarize(models.build(model, 10), (32, 32, 3))


def test_the_chapter_is_trained_with_the_chapter_s_settings():
    found = {
        name: (made.train.epochs, made.train.batch_size, made.model.dropout, made.model.initializer)
        for name, made in run.load("chapter").variants.items()
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
    # A unit of a convolution is dead if it is flat at every place.
    assert measures.dead_and_flat(found.reshape(1, 2, 1, 3), activation) == (dead, flat)


def test_units_are_counted_for_every_layer_but_the_head():
    config = edit(BASE, data={"crop": 1.0})
    dataset = store.load_data(config.data, "")
    model = models.build(config.model, 10)
    images = dataset.train.images
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    bias = np.array([-100, 0, 0, 0], np.float32)
    variables["params"]["block1"]["conv1"]["bias"] = bias
    predictor = Predictor(config, model, variables, tuple("0123456789"), (8, 8, 3))
    found = measures.units(predictor, dataset)
    assert list(found) == ["block1/conv1 dead", "block1/conv1 flat"]
    assert found["block1/conv1 dead"] == 0.25
    kernel = variables["params"]["block1"]["conv1"]["kernel"]
    inputs = np.pad(images / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(inputs, (3, 3), axis=(1, 2))
    outputs = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias.reshape(1, 1, 1, 4)
    np.testing.assert_allclose(found["block1/conv1 flat"], np.mean(outputs <= 0), atol=1e-3)


def test_shifts_move_and_reflect():
    image = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1).repeat(3, axis=-1)

    def shifted(down: int, right: int) -> list[list[int]]:
        return measures.shift(image, down, right)[0, :, :, 0].tolist()

    assert shifted(1, 0) == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert shifted(0, -1) == [[1, 2, 1], [4, 5, 4], [7, 8, 7]]
    np.testing.assert_array_equal(measures.shift(image, 0, 0), image)


def test_rotations_are_counter_clockwise_about_the_centre():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(measures.rotate(images, 0), images)
    np.testing.assert_array_equal(measures.rotate(images, 90), np.rot90(images, 1, axes=(1, 2)))
    np.testing.assert_array_equal(measures.rotate(images, 180), images[:, ::-1, ::-1])
    constant = np.full((1, 8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(measures.rotate(constant, 30), constant)


def test_accuracies_of_changed_images_are_means_over_directions(dataset: ImageDataset):
    """A network that predicts 1 where the first row of pixels is unchanged, and else 0.

    The images are the same along every row, so only shifts up and down change them. Rotated by 90
    degrees they differ in both directions, except for the first: it begins with a row of 0, and
    its last column, which becomes its first row when it is rotated one way, is made 0 as well.
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
        predictor: Any = SimpleNamespace(logits=logits)
        return measure(predictor, replace(dataset, test=test))

    shifted = accuracies(measures.shifted, images)
    assert shifted["shift 0"] == 1.0
    assert shifted["shift 1"] == 0.5
    assert list(shifted) == list(run.load("translation").measured)
    rotated = accuracies(measures.rotated, turning)
    assert rotated["0 degrees"] == 1.0
    assert rotated["90 degrees"] == pytest.approx(0.05)
    assert list(rotated) == list(run.load("rotation").measured)


def test_the_activation_experiment_names_the_layers_of_its_network():
    experiment = run.load("activation")
    model = models.build(experiment.variants["relu"].model, 10)
    layers = [row.name for row in inspection.summarize(model, (32, 32, 3)) if row.params]
    expected = tuple(f"{layer} {share}" for layer in layers[:-1] for share in ("dead", "flat"))
    assert experiment.measured == expected


def test_means_leave_out_missing_values():
    values = np.array([[0.4, 0.5, 0.75], [0.5, np.nan, np.nan], [np.nan] * 3])
    means, deviations = charts.mean_and_std(values)
    np.testing.assert_allclose(means, [0.55, 0.5, np.nan], rtol=1e-12)
    np.testing.assert_allclose(deviations, [0.18027756377319948, 0, 0], rtol=1e-12)


def table(**accuracies: list[float]) -> Table:
    """Returns a table of variants with so many seeds, each with its place as number of epochs."""
    rows = {
        name: [
            made("one", seed, x, train_accuracy=x + 0.1, seconds=1.0 + 2 * seed, tenth=x / 2)[1]
            for seed, x in enumerate(values)
        ]
        for name, values in accuracies.items()
    }
    configs = {name: [edit(BASE, train={"epochs": i + 1})] for i, name in enumerate(accuracies)}
    return Table(configs, rows)


def labelled(figure: Any) -> dict[str, list]:
    """Returns the points of the first axes' lines by label."""
    lines = figure.axes[0].lines
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in lines}


TABLE = table(**{"b-2": [0.2, 0.2], "b-1": [0.4, 0.6]})


def test_lines_show_means_in_order_and_their_spread():
    figure = AgainstField("train.epochs", "epochs", measured=("tenth",)).draw(TABLE)
    found = labelled(figure)
    np.testing.assert_allclose(found["b"], [[1, 0.2], [2, 0.5]])
    np.testing.assert_allclose(found["tenth"], [[1, 0.1], [2, 0.25]])
    assert figure.axes[0].get_xlabel() == "epochs"
    band = figure.axes[0].collections[0].get_paths()[0].vertices  # pyright: ignore
    heights = {(x, round(y, 6)) for x, y in band}
    assert heights == {(1, 0.2), (2, 0.358579), (2, 0.641421)}, "0.5 and sqrt(0.02) each way"
    by_number = AgainstMeasured({"tenth": 3, "test_accuracy": 1}, "x").draw(TABLE)
    np.testing.assert_allclose(labelled(by_number)["b-1"], [[1, 0.5], [3, 0.25]])


def test_a_logarithmic_axis_has_its_ticks_at_the_points():
    values = np.array([[0.4, 0.6], [0.2, 0.2]])
    many = {str(i): (np.array([20.0, 500.0]), values) for i in range(5)}
    crowded = charts.lines(many, "x", logarithmic=True)
    assert [text.get_text() for text in crowded.axes[0].get_xticklabels()] == ["20", "500"]
    assert len(crowded.legends[0].get_texts()) == 5
    unlike = many | {"shorter": (np.array([100.0]), values[:1])}
    ticks = charts.lines(unlike, "x", logarithmic=True).axes[0].get_xticks()
    assert ticks.tolist() == [20, 100, 500], "of lines with different numbers of points"


def test_bars_dots_and_points_show_means_and_their_spread():
    bars = Bars(("test_accuracy", "train_accuracy")).draw(TABLE).axes[0]
    heights = [patch.get_height() for patch in bars.patches]  # pyright: ignore
    np.testing.assert_allclose(heights, [0.2, 0.5, 0.3, 0.6])
    (_, second, *_) = bars.collections[0].get_segments()  # pyright: ignore
    np.testing.assert_allclose(second, [[0.8, 0.358579], [0.8, 0.641421]], atol=1e-6)
    dots = Dots().draw(TABLE).axes[0]
    np.testing.assert_allclose(np.asarray(dots.lines[0].get_xydata()), [[0.2, 0], [0.5, 1]])
    (_, second, *_) = dots.collections[0].get_segments()  # pyright: ignore
    np.testing.assert_allclose(second, [[0.358579, 1], [0.641421, 1]], atol=1e-6)
    assert [text.get_text() for text in dots.get_yticklabels()] == ["b-2", "b-1"]
    points = Points("seconds").draw(TABLE).axes[0]
    found = [np.asarray(line.get_xydata()).tolist() for line in points.lines]
    assert [[2, 0.2]] in found and [[2, 0.5]] in found
    assert [text.get_text() for text in points.texts] == ["b-2", "b-1"]
    assert points.get_xlabel() == "training time, s"


def test_curves_are_means_of_the_seeds_and_missing_variants_have_none():
    def line(epoch: int, accuracy: float) -> Row:
        return {"epoch": epoch, "train_accuracy": accuracy, "test_accuracy": accuracy / 2}

    seeds = [{"curve": [line(1, 0.2), line(2, 0.6)]}, {"curve": [line(1, 0.4)]}]
    figure = Curves().draw(replace(TABLE, rows={"b-2": [], "b-1": seeds}))
    assert labelled(figure) == {"b-1": [[1, pytest.approx(0.3)], [2, 0.6]]}
    test = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(np.asarray(test), [0.15, 0.3])


@pytest.mark.parametrize(
    "figure",
    [
        Curves(),
        Dots(),
        Bars(("test_accuracy", "train_accuracy")),
        AgainstField("train.epochs", "epochs", logarithmic=True),
        AgainstMeasured({"tenth": 0.1, "images": 0.2}, "number"),
        Points("train_flops"),
    ],
)
def test_a_figure_shows_variants_with_different_numbers_of_seeds(figure: Any, tmp_path: Path):
    """Nothing is known of a variant before its rate is chosen, and one run may have diverged."""
    found = table(a=[0.4, 0.5, 0.75], b=[0.2, 0.3], c=[])
    found.rows["b"][0] |= {"epochs": None}
    figure.draw(replace(found, configs=dict(found.configs) | {"c": []})).savefig(
        tmp_path / "figure.png"
    )
