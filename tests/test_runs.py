"""A run's folder: locked by one process, owned by one config, summarised, and read back."""

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.training import edit, fit, quiet, train_run

from cnn_jax import fields, losses, metrics, trees
from cnn_jax import fit as fitting
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.kernels import cores
from cnn_jax.runs import outcome
from cnn_jax.runs.folder import RunFolder, check_config
from cnn_jax.tools.report import load_finished
from cnn_jax.tools.train import train


def claim(path: Path, config: Config):
    return RunFolder(path, quiet).claim(config)


def test_a_workdir_is_claimed_by_one_process_at_a_time(tiny: Config, tmp_path: Path):
    with (
        claim(tmp_path / "new/run", tiny),
        pytest.raises(UserError, match="in use by another process"),
        claim(tmp_path / "new/run", tiny),
    ):
        pass
    with claim(tmp_path / "new/run", tiny):
        assert fields.load(tmp_path / "new/run/config.json") == tiny


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    code: int, tiny: Config, workdir: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(workdir, tiny):
        assert (workdir / "config.json").exists()
    (line,) = warned
    assert line.startswith(f"{workdir}/.lock can't be locked ([Errno {code}]")


def test_a_start_that_fails_claims_nothing(tiny: Config, workdir: Path):
    with pytest.raises(UserError, match="no such photos"), claim(workdir, tiny):
        (workdir / "checkpoints" / "latest").mkdir(parents=True)
        raise UserError("no such photos")
    assert not (workdir / "config.json").exists()
    fields.save(tiny, workdir / "config.json")  # as a start that was killed leaves it
    other = replace(tiny, seed=3)
    with claim(workdir, other):
        assert fields.load(workdir / "config.json") == other
        (workdir / "metrics.jsonl").touch()
    assert fields.load(workdir / "config.json") == other


def test_a_workdir_among_the_photos_is_refused(tiny: Config, tmp_path: Path):
    config = edit(tiny, data={"name": "folder", "dir": str(tmp_path / "photos")})
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    for place in ("photos", "photos/run", "photos/cats/../run"):
        with pytest.raises(UserError, match="lies in the folder of photos"):
            claim(tmp_path / place, config).__enter__()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cats"]
    with claim(tmp_path / "photos-run", config):
        pass


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(
    tiny: Config, workdir: Path
):
    with claim(workdir, tiny):
        (workdir / "metrics.jsonl").touch()
    other = replace(edit(tiny, train={"epochs": 5}), seed=3)
    with pytest.raises(UserError, match=r"seed: 0 -> 3; train.epochs: 2 -> 5"):
        check_config(workdir, other)
    check_config(workdir, edit(tiny, data={"dir": "/elsewhere"}))
    check_config(workdir, edit(tiny, runtime={"segment_steps": 9, "kernels": "xla", "seeds": 2}))


def test_only_the_claim_of_a_run_may_raise_the_epochs(tiny: Config, workdir: Path):
    with claim(workdir, tiny):
        (workdir / "metrics.jsonl").touch()
    longer = edit(tiny, train={"epochs": 5})
    with pytest.raises(UserError, match=r"train.epochs: 2 -> 5"):
        check_config(workdir, longer)
    with claim(workdir, longer):
        assert fields.load(workdir / "config.json") == longer


def test_a_folder_of_other_things_is_refused(tiny: Config, workdir: Path):
    (workdir / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"), claim(workdir, tiny):
        pass
    assert [p.name for p in workdir.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_a_workdir_that_cannot_be_made_is_one_line(tiny: Config, workdir: Path):
    (workdir / "file").touch()
    with pytest.raises(UserError, match="can't be written"), claim(workdir / "file/x", tiny):
        pass


@pytest.mark.slow
def test_summary_says_what_was_run(tiny: Config, dataset: ImageDataset, workdir: Path):
    found = train_run(tiny, dataset, workdir)
    assert found == outcome.read(workdir)
    result = fit(tiny, dataset, workdir)
    assert fields.from_dict(found["config"]) == tiny
    assert found["seed"] == 0
    assert (found["epochs"], found["steps"], found["skipped_steps"]) == (2, 6, 0)
    assert found["param_count"] == 4 * 28 + 4 * 37 + 8 * 17 + 3 * 9
    assert found["params_sha256"] == trees.sha256(result.state.params)
    assert found["seconds"] == result.progress.seconds
    np.testing.assert_allclose(found["images_per_second"], 44 / result.progress.seconds)
    assert found["data"]["counts"] == {"train": 22, "validation": 9, "test": 10}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "python"} <= set(found["versions"])
    assert found["device"]["platform"] == "cpu"
    assert found["device"]["kernels"] == "cpu"
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["train_accuracy"] == last["train_accuracy"]
    assert 0 <= found["test_accuracy"] <= 1


def test_the_test_set_is_evaluated_once(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    seen = []
    logits = fitting.Predictor.logits

    def counted(self, images, *rest):
        seen.append("test" if images is dataset.test.images else "validation")
        return logits(self, images, *rest)

    monkeypatch.setattr(fitting.Predictor, "logits", counted)
    train(tiny, dataset, workdir, make_log=quiet)
    # After each epoch, and for the temperature; of the test images, the result alone.
    assert seen == ["validation", "validation", "test", "validation"]


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_loaded_predictor_gives_the_reported_result(
    tiny: Config, dataset: ImageDataset, workdir: Path, ema_decay: float
):
    config = edit(tiny, train={"ema_decay": ema_decay})
    found = train_run(config, dataset, workdir)
    predictor = outcome.load_predictor(workdir, config)
    assert trees.sha256(predictor.variables["params"]) == found["params_sha256"]
    assert predictor.class_names == ("red", "green", "blue")
    assert predictor.image_shape == (8, 8, 3)
    logits = predictor.logits(dataset.test.images)
    accuracy = float(np.mean(logits.argmax(axis=1) == dataset.test.labels))
    assert accuracy == found["test_accuracy"]


@pytest.mark.slow
def test_views_at_test_time_count_everywhere_and_the_plain_accuracy_stands_beside(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    """After one epoch at a rate at which little is learnt, so that views are not all alike."""
    config = edit(tiny, augment={"test_time": "mirror_translate"}, optim={"learning_rate": 1e-3})
    found = train_run(config, dataset, workdir)
    test = dataset.test
    for test_time, name in (("mirror_translate", "test_accuracy"), ("none", "test_accuracy_plain")):
        changed = edit(config, augment={"test_time": test_time})
        logits = outcome.load_predictor(workdir, changed).logits(test.images)
        assert found[name] == np.mean(logits.argmax(axis=1) == test.labels)
        loss = metrics.score(logits, test.labels, losses.cross_entropy).loss
        same = np.isclose(loss, found["test_loss"], rtol=1e-6)
        assert same == (name == "test_accuracy")


@pytest.mark.slow
def test_early_stopping_reports_on_the_best(tiny: Config, dataset: ImageDataset, workdir: Path):
    config = edit(tiny, train={"patience": 1, "epochs": 6})
    found = train_run(config, dataset, workdir)
    best, latest = (outcome.load_predictor(workdir, config, kind) for kind in ("", "latest"))
    assert trees.sha256(best.variables["params"]) == found["params_sha256"]
    assert best.step == found["best_epoch"] * 3 <= latest.step
    ended = {kind: load_finished(workdir, config, dataset, kind) for kind in ("", "latest")}
    assert ended[""].summary["epochs"] == found["epochs"] == found["best_epoch"]
    assert ended["latest"].summary["epochs"] == latest.step // 3 > found["epochs"]
    images = latest.step // 3 * 22  # speed is that of all that was trained, not up to the best
    np.testing.assert_allclose(found["images_per_second"], images / found["seconds"])


def test_json_is_written_atomically(workdir: Path):
    path = workdir / "value.json"
    outcome.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        outcome.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_train_returns_a_run_to_look_at_and_does_not_train_it_twice(
    tiny: Config, dataset: ImageDataset, workdir: Path, capsys: pytest.CaptureFixture[str]
):
    first = train(tiny, dataset, workdir)
    assert capsys.readouterr().out.count("epoch ") == 2
    second = train(tiny, dataset, workdir)
    assert capsys.readouterr().out == ""
    assert second.summary == first.summary
    assert first.test.accuracy == first.summary["test_accuracy"]
    assert len(first.metrics) == first.summary["steps"] == 6
    assert trees.sha256(second.predictor.variables["params"]) == first.summary["params_sha256"]


def test_a_run_that_is_read_back_is_finished_and_has_the_classes_of_the_images(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    train_run(tiny, dataset, workdir)
    others = replace(dataset, class_names=("cyan", "magenta", "yellow"))
    with pytest.raises(UserError, match="the classes of the images are not those"):
        load_finished(workdir, tiny, others)
    (workdir / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        load_finished(workdir, tiny, dataset)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no taskset")
def test_the_cores_of_a_run_are_those_it_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert outcome.device()["cpu_count"] == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert outcome.device()["cpu_count"] == len(allowed)


@pytest.mark.parametrize(
    ("line", "file", "text", "expected"),
    [
        ("0::/job/step", "cpu.max", "150000 100000", 2),
        ("0::/job/step", "job/cpu.max", "100000 100000", 1),
        ("0::/job/step", "job/step/cpu.max", "max 100000", 64),
        ("3:cpu,cpuacct:/job", "cpu/job/cpu.cfs_quota_us", "20000", 1),
        ("3:cpu,cpuacct:/job", "cpu/job/cpu.cfs_quota_us", "-1", 64),
    ],
)
def test_a_container_s_share_of_time_counts_as_cores(
    line: str, file: str, text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    limit = tmp_path / "sys/fs/cgroup" / file
    for path, content in ((tmp_path / "proc/self/cgroup", line), (limit, text)):
        path.parent.mkdir(parents=True)
        path.write_text(content + "\n")
    if "cfs" in file:
        limit.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert cores.usable_cpus(tmp_path) == expected
