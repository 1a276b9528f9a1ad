"""A run's folder: claimed by one process and one config, summarised, and read back."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import edit, quiet

from cnn_jax import config as configuration
from cnn_jax import evaluate, loop, losses, runs, trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.run_log import RunLog


def finish(config: Config, dataset: ImageDataset, workdir: Path) -> dict:
    with runs.claim(workdir, config):
        return runs.run(loop.Trainer(config, dataset), workdir, quiet)


def test_a_workdir_is_claimed_by_one_process_at_a_time(tiny: Config, tmp_path: Path):
    with (
        runs.claim(tmp_path / "new/run", tiny),
        pytest.raises(UserError, match="in use by another process"),
        runs.claim(tmp_path / "new/run", tiny),
    ):
        pass
    with runs.claim(tmp_path / "new/run", tiny):
        assert configuration.load(tmp_path / "new/run/config.json") == tiny


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(
    tiny: Config, workdir: Path
):
    with runs.claim(workdir, tiny):
        pass
    other = replace(edit(tiny, train={"epochs": 5}), seed=3)
    with pytest.raises(UserError, match=r"seed: 0 -> 3; train.epochs: 2 -> 5"):
        runs.check_config(workdir, other)
    runs.check_config(workdir, edit(tiny, data={"dir": "/elsewhere"}))


def test_a_folder_of_other_things_is_refused(tiny: Config, workdir: Path):
    (workdir / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"), runs.claim(workdir, tiny):
        pass
    assert [p.name for p in workdir.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_a_workdir_that_cannot_be_made_is_one_line(tiny: Config, workdir: Path):
    (workdir / "file").touch()
    with pytest.raises(UserError, match="can't be written"), runs.claim(workdir / "file/x", tiny):
        pass


def test_summary_says_what_was_run(tiny: Config, dataset: ImageDataset, workdir: Path):
    summary = finish(tiny, dataset, workdir)
    written = json.loads((workdir / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary)) == runs.finished(workdir)
    state, progress = loop.fit(loop.Trainer(tiny, dataset), workdir, quiet(workdir))
    assert configuration.from_dict(summary["config"]) == tiny
    assert summary["seed"] == 0
    assert (summary["epochs"], summary["steps"], summary["skipped_steps"]) == (2, 6, 0)
    assert summary["param_count"] == 4 * 28 + 4 * 37 + 8 * 17 + 3 * 9
    assert summary["params_sha256"] == trees.sha256(state.params)
    assert summary["seconds"] == progress.seconds
    np.testing.assert_allclose(summary["images_per_second"], 44 / progress.seconds)
    assert summary["data"]["counts"] == {"train": 22, "validation": 9, "test": 10}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "python"} <= set(summary["versions"])
    assert summary["device"]["platform"] == "cpu"
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["train_accuracy"] == last["train_accuracy"]
    assert 0 <= summary["test_accuracy"] <= 1


def test_the_test_set_is_touched_once(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    seen = []
    trainer_evaluate = loop.Trainer.evaluate

    def counted(self, state, split):
        seen.append("test" if split is dataset.test else "validation")
        return trainer_evaluate(self, state, split)

    monkeypatch.setattr(loop.Trainer, "evaluate", counted)
    finish(tiny, dataset, workdir)
    assert seen == ["validation", "validation", "test"]


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_trained_model_gives_the_reported_result(
    tiny: Config, dataset: ImageDataset, workdir: Path, ema_decay: float
):
    config = edit(tiny, train={"ema_decay": ema_decay})
    summary = finish(config, dataset, workdir)
    trained = runs.load_trained(workdir, config)
    assert trees.sha256(trained.variables["params"]) == summary["params_sha256"]
    assert trained.class_names == ("red", "green", "blue")
    assert trained.image_shape == (8, 8, 3)
    logits = trained.logits(dataset.test.images)
    accuracy = float(np.mean(logits.argmax(axis=1) == dataset.test.labels))
    assert accuracy == summary["test_accuracy"]


def test_views_at_test_time_count_everywhere_and_the_plain_accuracy_stands_beside(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    """After one epoch from a rate at which little is learnt, so that views are not all alike."""
    config = edit(tiny, augment={"test_time": "mirror_translate"}, optim={"learning_rate": 1e-3})
    summary = finish(config, dataset, workdir)
    test = dataset.test
    for test_time, name in (("mirror_translate", "test_accuracy"), ("none", "test_accuracy_plain")):
        trained = runs.load_trained(workdir, edit(config, augment={"test_time": test_time}))
        logits = trained.logits(test.images)
        assert summary[name] == np.mean(logits.argmax(axis=1) == test.labels)
        loss = evaluate.score(logits, test.labels, losses.cross_entropy).loss
        same = np.isclose(loss, summary["test_loss"], rtol=1e-6)
        assert same == (name == "test_accuracy")


def test_early_stopping_reports_on_the_best(tiny: Config, dataset: ImageDataset, workdir: Path):
    config = edit(tiny, train={"patience": 1, "epochs": 6})
    summary = finish(config, dataset, workdir)
    best, latest = (runs.load_trained(workdir, config, kind) for kind in ("", "latest"))
    assert trees.sha256(best.variables["params"]) == summary["params_sha256"]
    assert best.step == summary["best_epoch"] * 3 <= latest.step
    ended = {kind: runs.load_ended(workdir, config, dataset, kind) for kind in ("", "latest")}
    assert ended[""].summary["epochs"] == summary["epochs"] == summary["best_epoch"]
    assert ended["latest"].summary["epochs"] == latest.step // 3 > summary["epochs"]
    images = latest.step // 3 * 22  # speed is that of all that was trained, not up to the best
    np.testing.assert_allclose(summary["images_per_second"], images / summary["seconds"])


def test_json_is_written_whole_or_not_at_all(workdir: Path):
    path = workdir / "value.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_seeds_are_runs_of_their_own_with_one_compilation(
    tiny: Config, dataset: ImageDataset, tmp_path: Path
):
    config = replace(edit(tiny, train={"seeds": 3}), seed=4)
    folder = tmp_path / "seeds"
    compiled, before_run = [], []

    def log_in(workdir: Path) -> RunLog:
        before_run.append(len(compiled))
        return quiet(workdir)

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        total = runs.run_seeds(config, dataset, folder, log_in)
    finally:
        jax.monitoring.clear_event_listeners()
    assert before_run[0] < before_run[1] == before_run[2] == len(compiled)
    written = runs.finished(folder)
    runs.run_seeds(config, dataset, folder, log_in)
    assert len(before_run) == 3, "a finished seed was run again"
    assert written == runs.finished(folder) == json.loads(json.dumps(total))
    singles = [finish(replace(tiny, seed=s), dataset, tmp_path / f"{s}") for s in (4, 5, 6)]
    hashes = [single["params_sha256"] for single in singles]
    assert [run["params_sha256"] for run in total["runs"]] == hashes
    assert len(set(hashes)) == 3
    assert configuration.load(folder / "seed-6/config.json") == replace(tiny, seed=6)
    assert "tiny, seed 6" in (folder / "seed-6/report.html").read_text()
    accuracies = [single["test_accuracy"] for single in singles]
    np.testing.assert_allclose(total["test_accuracy_mean"], np.mean(accuracies))
    np.testing.assert_allclose(total["test_accuracy_std"], np.std(accuracies, ddof=1))
    with pytest.raises(UserError, match=r"holds 3 runs; name one of them, such as .*seed-4"):
        runs.load_trained(folder, config)
    with pytest.raises(UserError, match="holds 3 runs"):
        runs.check_single(folder, config)
    runs.check_single(folder / "seed-4", tiny)


def test_train_returns_a_run_to_look_at_and_does_not_train_it_twice(
    tiny: Config, dataset: ImageDataset, workdir: Path, capsys: pytest.CaptureFixture[str]
):
    first = runs.train(tiny, dataset, workdir)
    assert capsys.readouterr().out.count("epoch ") == 2
    again = runs.train(tiny, dataset, workdir)
    assert capsys.readouterr().out == ""
    assert again.summary == first.summary
    assert first.test.accuracy == first.summary["test_accuracy"]
    assert len(first.metrics) == first.summary["steps"] == 6
    assert trees.sha256(again.variables["params"]) == first.summary["params_sha256"]


def test_an_ended_run_is_finished_and_of_the_classes_of_the_images(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    runs.train(tiny, dataset, workdir)
    others = replace(dataset, class_names=("cyan", "magenta", "yellow"))
    with pytest.raises(UserError, match="the classes of the images are not those"):
        runs.load_ended(workdir, tiny, others)
    (workdir / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        runs.load_ended(workdir, tiny, dataset)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no taskset")
def test_the_cores_of_a_run_are_those_it_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert runs.device()["cpu_count"] == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert runs.device()["cpu_count"] == len(allowed)
