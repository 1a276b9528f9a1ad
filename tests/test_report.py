"""report.html and the figures of a run: self-contained, escaped, and for runs of every kind."""

import base64
import html
import json
import os
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import traverse_util
from helpers.cli import SMALL, finish, refuse
from helpers.disks import fill, mounted
from helpers.drawings import pixels
from helpers.predictors import random_predictor
from helpers.training import edit, quiet, train_run

from cnn_jax import command, configs, fields, losses, metrics, saliency
from cnn_jax.config import AugmentConfig, Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.predictor import Predictor
from cnn_jax.runs import outcome
from cnn_jax.tools import figures, report
from cnn_jax.tools.report import FinishedRun
from cnn_jax.tools.train import train

WORKDIR = Path("runs/it's")
STARTED = {"folder": "/tmp", "python": "/py/bin/python", "variables": {}}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
STRANGE = ('<script>alert("1")</script>', "a&b'$x$", "\udcff\n\u202e")


class Page(HTMLParser):
    """The tags and attributes of a page, and its text outside the style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] != "style":
            self.text += data

    def images(self) -> dict[str, bytes]:
        """Returns the embedded PNG files by their alternative text."""
        alts = [value for name, value in self.attributes if name == "alt"]
        sources = [value for name, value in self.attributes if name == "src"]
        head = "data:image/png;base64,"
        assert all(str(source).startswith(head) for source in sources)
        content = [base64.b64decode(str(source).removeprefix(head)) for source in sources]
        return dict(zip(map(str, alts), content, strict=True))


def finished(config: Config, dataset: ImageDataset, logits: np.ndarray) -> FinishedRun:
    """Returns a run of two epochs of three steps with these logits on the test images."""
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 7)
    ]
    lines[2] |= {"epoch": 1, "train_loss": 0.75, "train_accuracy": 0.25}
    lines[4] |= {"loss": None, "skipped": True}
    lines[5] |= {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.5}
    for line in (lines[2], lines[5]):
        line |= {"validation_loss": 1.0, "validation_accuracy": 0.375}
    summary = {
        "config": fields.to_dict(config),
        "test_accuracy": 0.4321,
        "test_loss": 1.2345,
        "epochs": 2,
        "steps": 6,
        "seconds": 12.34,
        "images_per_second": 567.8,
        "best_epoch": None,
        "best_validation_accuracy": None,
        "param_count": 1234567,
        "params_sha256": "f00d",
        "data": {"source": dataset.source, "counts": dataset.counts, "sha256": "beef"},
        "device": {"platform": "gpu", "kind": "H<100>", "count": 4, "cpu_count": 2},
        "versions": {"jax": "9.8.7"},
    }
    test = metrics.score(logits, dataset.test.labels, losses.from_config(config.train))
    predictor = random_predictor(config, dataset.class_names)
    return FinishedRun(summary, lines, dataset, predictor, test)


@pytest.fixture
def logits(dataset: ImageDataset) -> np.ndarray:
    """Correct for all test images but the second and the third, which are predicted as red."""
    found = 5 * np.eye(3, dtype=np.float32)[dataset.test.labels]
    found[1], found[2] = (3, 0, 0), (9, 0, 0)
    return found


def test_the_page_is_complete_and_loads_nothing(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    source = report.page(WORKDIR, finished(tiny, dataset, logits))
    page = Page(source)
    shown = ["learning curves", "confusion matrix", "mistakes", "filters first"]
    assert list(page.images()) == shown
    for image in page.images().values():
        assert struct.unpack(">I", image[16:20])[0] == 960
    assert not set(page.tags) & {"script", "iframe", "object", "embed", "a", "form"}
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert all(str(value).startswith("data:") for value in addresses)
    assert "://" not in re.sub(r"base64,[^\"]*", "", source)
    assert "url(" not in source and "@import" not in source
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    for text in (
        "80.00% (49.0% to 94.3%)",
        "1,234,567",
        "12.3 s",
        "568 images/s",
        "9.8.7",
        "made in a",
    ):
        assert text in page.text
    for text in ("4 x H<100> (gpu), 2 CPU cores", "22 train, 9 validation, 10 test images, 3 cl"):
        assert text in page.text
    for text in ("beef", "f00d", "optim.learning_rate", "blue", "66.7%", "red (1)"):
        assert text in page.text
    headings = re.findall("<h2>(.*?)</h2>", source)
    assert headings == [
        "Learning curves",
        "Confusion matrix",
        "Worst mistakes",
        "First-layer filters",
        "Reproduce this run",
        "Environment",
        "Config",
    ]


def test_headline_figures_have_intervals_and_warnings_stand_below(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    run = finished(tiny, dataset, logits)
    summary = {**run.summary, "warnings": ["fewer than 5 <test> images: red (4)"]}
    summary |= {"best_epoch": 2, "best_validation_macro_f1": 0.625}
    config = edit(tiny, train={"monitor": "macro_f1"})
    predictor = replace(run.predictor, config=config, temperature=0.5)
    page = Page(report.page(WORKDIR, replace(run, summary=summary, predictor=predictor)))
    found = metrics.figures(run.test, dataset.class_names, 0.5)
    low, high = found["macro_f1_interval"]
    assert f"macro-F1{found['macro_f1']:.2%} ({low:.1%} to {high:.1%})" in page.text
    assert f"balanced accuracy{found['balanced_accuracy']:.2%} (" in page.text
    assert f"calibration error{found['calibration_error']:.1%}" in page.text
    assert found["calibration_error"] != metrics.figures(run.test, "rgb", 1.0)["calibration_error"]
    assert "best validation macro f162.50% in epoch 2" in page.text
    assert "Warning: fewer than 5 <test> images: red (4)" in page.text
    assert "top-5" not in page.text


def test_the_class_table_has_recall_and_precision(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    """Of 4 red, 3 green and 3 blue images a green and a blue one are predicted as red."""
    text = report.page(WORKDIR, finished(tiny, dataset, logits))
    rows = re.findall("<tr><td>(.*?)</td></tr>", text)
    assert [row.split("</td><td>") for row in rows] == [
        ["red", "4", "100.0%", "66.7%", "80.0%", "-"],
        ["green", "3", "66.7%", "100.0%", "80.0%", "red (1)"],
        ["blue", "3", "66.7%", "100.0%", "80.0%", "red (1)"],
    ]


# Decodes each picture of the page and logs its width to the console, which shows blocked loads too.
VIEWER = """<!DOCTYPE html>
<iframe src="report.html"></iframe>
<script>
const width = (image) => createImageBitmap(image).then((bitmap) => bitmap.width, () => "broken");
window.onload = async () => {
  const images = [...frames[0].document.images];
  const widths = await Promise.all(images.map(width));
  console.log(images.map((image, i) => `${image.alt}: ${widths[i]}`).join(", "));
};
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="the system has no Chromium")
def test_a_browser_shows_every_picture_and_blocks_nothing(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray, tmp_path: Path
):
    report.write(tmp_path, finished(tiny, dataset, logits))
    (tmp_path / "viewer.html").write_text(VIEWER)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --enable-logging=stderr "
    flags += "--allow-file-access-from-files --virtual-time-budget=10000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "viewer.html").as_uri())
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    logged = re.findall(r'CONSOLE.*?\] "(.*)", source: ', ran.stderr)
    shown = ("learning curves", "confusion matrix", "mistakes", "filters first")
    assert logged == [", ".join(f"{name}: 960" for name in shown)]


def test_names_of_classes_and_files_are_escaped(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    files = tuple(f"{i}<b>\x1b&\udcff.png" for i in range(10))
    strange = replace(
        dataset,
        class_names=STRANGE,
        source="folder <i>&amp;",
        test=replace(dataset.test, files=files),
    )
    config = edit(tiny, data={"dir": "<u>'\"&"})
    text = report.page(WORKDIR, finished(config, strange, logits))
    text.encode()  # No lone surrogate.
    page = Page(text)
    assert not set(page.tags) & {"script", "b", "i", "u"}
    assert "\x1b" not in text and "\u202e" not in text
    assert '<script>alert("1")</script>' in page.text
    assert "a&b'$x$" in page.text
    assert "\\udcff\\n\\u202e" in page.text
    assert "folder <i>&amp;:" in page.text
    assert "<u>'\"&" in page.text
    line = "2<b>\\x1b&\\udcff.png: \\udcff\\n\\u202e, predicted " + STRANGE[0] + " (100.0%)"
    assert line in page.text
    assert page.text.index("2<b>") < page.text.index("1<b>"), "the worst mistake is not first"
    assert "3<b>" not in page.text


def test_curves_show_the_metrics(tiny: Config, dataset: ImageDataset, logits: np.ndarray):
    run = finished(tiny, dataset, logits)
    accuracy, loss = dict(report.pictures(run))["learning_curves"].axes
    drawn = {line.get_label(): line for line in loss.lines}
    assert list(drawn) == ["single steps", "train", "validation", "test (once)"]
    np.testing.assert_allclose(drawn["train"].get_xydata(), [[1, 0.75], [2, 0.5]])
    np.testing.assert_allclose(drawn["validation"].get_xydata(), [[1, 1], [2, 1]])
    np.testing.assert_allclose(drawn["test (once)"].get_xydata(), [[2, run.test.loss]])
    assert [line.get_fillstyle() for line in drawn.values()] == ["full", "full", "full", "none"]
    steps = [[1 / 3, 1], [2 / 3, 1 / 2], [1, 1 / 3], [4 / 3, 1 / 4], [2, 1 / 6]]
    np.testing.assert_allclose(drawn["single steps"].get_xydata(), steps)
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [80])


def test_heat_maps_explain_the_predicted_class(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    """Even where the image alone, without the views that are averaged, has another prediction."""
    run = finished(tiny, dataset, logits)
    chosen = figures.explained_images(run)
    images, targets = dataset.test.images[chosen], dataset.test.labels[chosen]
    alone = run.predictor.logits(images, "none")
    assert np.any(alone.argmax(axis=1) != targets)
    axes = figures.heat_maps(run, "block2/conv1").axes
    cams = saliency.grad_cam(run.predictor, images, targets, "block2/conv1")
    for row, image, target, cam in zip(range(3), images, targets.tolist(), cams, strict=True):
        left, middle, right = axes[3 * row : 3 * row + 3]
        assert left.get_ylabel().startswith(f"{dataset.class_names[target]}, ")
        drops = saliency.occlusion(run.predictor, image, target)
        np.testing.assert_allclose(pixels(middle, 1), drops, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pixels(right, 1), cam / (cam.max() or 1), rtol=1e-5, atol=1e-7)
        # Squares of 2 pixels, at every pixel.
        np.testing.assert_array_equal(middle.images[1].get_extent(), (0, 7, 7, 0))


@pytest.mark.parametrize(
    ("model", "conv", "layer"),
    [
        (ModelConfig(name="simple_cnn", blocks=((4,),), dense=()), "conv1", "conv1"),
        (ModelConfig(name="vgg", blocks=((4,), (4, 4)), dense=()), "block2/conv2", "block2/conv2"),
        (
            ModelConfig(name="resnet_small", blocks=((4,), (6, 6)), dense=()),
            "stage2/block2/conv2",
            "stage2",
        ),
    ],
    ids=["simple_cnn", "vgg", "resnet_small"],
)
def test_grad_cam_uses_the_last_maps_of_the_last_convolutions_size(
    tiny: Config,
    dataset: ImageDataset,
    logits: np.ndarray,
    model: ModelConfig,
    conv: str,
    layer: str,
):
    """A pool would make them coarser; in a residual network they include the shortcut."""
    run = finished(replace(tiny, model=model), dataset, logits)
    assert list(report.conv_kernels(run.predictor))[-1] == conv
    assert saliency.last_maps(run.predictor) == layer


@pytest.mark.slow
def test_training_views_are_what_the_network_was_trained_on(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    """Of stored squares of 8 pixels the network sees 6."""
    normalize = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    data = replace(tiny.data, crop=0.75, normalize=normalize)

    def views(**changes: Any) -> tuple[np.ndarray, np.ndarray]:
        config = replace(tiny, data=data, augment=AugmentConfig(**changes))
        return figures.training_views(finished(config, dataset, logits))

    stored, flipped = views(flip="random")
    np.testing.assert_array_equal(stored[[0, 3]], dataset.train.images[[0, 3]])
    assert flipped.shape == (6, 6, 6, 6, 3)
    centre = stored[:, None, 1:7, 1:7]
    same, mirrored = flipped == centre, flipped == centre[:, :, :, ::-1]
    either = same.all(axis=(2, 3, 4)) ^ mirrored.all(axis=(2, 3, 4))
    assert either.all()
    assert 8 < same.all(axis=(2, 3, 4)).sum() < 28
    _, alternated = views(flip="alternate")
    np.testing.assert_array_equal(alternated[:, 0], alternated[:, 2])
    np.testing.assert_array_equal(alternated[:, 0], alternated[:, 1, :, ::-1])
    _, mixed = views(mixup=1.0)
    low = np.minimum(centre, np.roll(centre, 1, axis=0)).astype(int)
    high = np.maximum(centre, np.roll(centre, 1, axis=0)).astype(int)
    assert np.all((mixed >= low - 1) & (mixed <= high + 1))
    assert np.abs(mixed.astype(int) - centre).max() > 20


def test_training_images_are_drawn_class_by_class():
    labels = np.array([2, 2, 0, 2, 1, 0, 2])
    np.testing.assert_array_equal(figures._of_each_class(labels, 2), [2, 4, 0, 5, 1])


@pytest.mark.slow
def test_feature_maps_are_what_layers_return(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray, tmp_path: Path
):
    """Of a residual network, where the layer that is called next often reads something else."""
    model = ModelConfig(name="resnet_small", blocks=((4,), (6,)), dense=())
    run = finished(replace(tiny, model=model), dataset, logits)
    image = dataset.test.images[figures.explained_images(run)[0]]
    maps = figures.feature_maps(run, image)
    assert len(maps) == 8
    normal = np.float32(image[None]) / 255
    model, variables = run.predictor.model, run.predictor.variables
    _, state = model.apply(variables, normal, capture_intermediates=True)
    captured = traverse_util.flatten_dict(state["intermediates"], sep="/")
    assert {"stem", "stage2/block1/norm2"} <= set(maps)
    for name, values in maps.items():
        returned = captured[f"{name}/__call__"][-1][0]
        np.testing.assert_allclose(values, returned, atol=1e-5, err_msg=name)
    assert "figures/feature_maps.png" in " ".join(figures.write_pictures(tmp_path, run))


def test_many_steps_are_averaged(tiny: Config, dataset: ImageDataset, logits: np.ndarray):
    run = finished(tiny, dataset, logits)
    run.metrics[:0] = [{"step": i, "loss": 7.0} for i in range(1, 2001)]
    _, loss = dict(report.pictures(run))["learning_curves"].axes
    assert len(np.asarray(loss.lines[0].get_xdata())) == 200
    np.testing.assert_allclose(np.asarray(loss.lines[0].get_ydata())[:199], 7)


def test_a_run_of_no_step_without_mistakes_has_a_page(tiny: Config, dataset: ImageDataset):
    run = finished(tiny, dataset, np.eye(3, dtype=np.float32)[dataset.test.labels])
    nothing = {"epochs": 0, "steps": 0, "images_per_second": None, "seconds": 0.0}
    nothing_run = replace(run, summary={**run.summary, **nothing}, metrics=[])
    page = Page(report.page(WORKDIR, nothing_run))
    assert list(page.images()) == ["confusion matrix", "filters first"]
    assert "No training step was run." in page.text
    assert "All test images are classified correctly." in page.text


def shell_words(text: str) -> list[str]:
    """Returns the arguments that a shell passes on when the command is pasted."""
    folder, start = text.split("\n")[0], f"{STARTED['python']} -m cnn_jax.main "
    assert folder == "cd /tmp"
    echo = text.replace(start, "printf '%s\\0' ", 1)
    ran = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True)
    return ran.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", ["quickstart", "vgg_dropout", "finetune_gradual"])
def test_the_command_makes_the_same_config(name: str):
    base = configs.get(name)
    changed = replace(
        edit(
            base,
            data={
                "dir": "/my photos/$x",
                "classes": ("a b", "c"),
                "normalize": ((0.5, 0.25, 0.125), (1.0, 1.0, 2.0)),
            },
            model={"blocks": ((3, 4), (5,)), "name": "vgg"},
            optim={"groups": (("head/.*", 1.0), (".*", ((0, None), (3, 0.1))))},
            augment={"flip": "random"},
            train={"epochs": 7},
        ),
        seed=3,
    )
    for config in (base, changed):
        request = command.parse(shell_words(report.command(WORKDIR, config, STARTED)))
        assert request.config == config
        assert request.workdir == WORKDIR.absolute()
    words = shell_words(report.command(Path("/x"), base, STARTED))
    assert words == [f"--config={name}", "--workdir=/x"]


def test_the_command_of_a_config_made_in_python_names_its_file(tiny: Config, tmp_path: Path):
    workdir = tmp_path / "a run"
    workdir.mkdir()
    fields.save(tiny, workdir / "config.json")
    request = command.parse(shell_words(report.command(workdir, tiny, STARTED)))
    assert (request.config, request.workdir) == (tiny, workdir)


@pytest.mark.slow
def test_the_commands_of_a_report_work_where_they_are_pasted(tmp_path: Path):
    """In another folder, without the environment in which the run was started."""
    (tmp_path / "my runs").mkdir()
    (tmp_path / "own.py").write_text(
        "from cnn_jax import losses\ndef loss(logits, labels):\n"
        "    return 2 * losses.cross_entropy(logits, labels)\n"
    )
    finish(
        *SMALL,
        "--workdir=my runs/it's",
        "--train.loss=own.py:loss",
        "--data.classes=1,2",
        cwd=tmp_path,
    )
    page = (tmp_path / "my runs/it's/report.html").read_text()
    commands = [html.unescape(text) for text in re.findall("<pre>(.*?)</pre>", page, re.DOTALL)]
    assert len(commands) == 2
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    for text, expected in zip(commands, ("it's is finished", "params_sha256 matches"), strict=True):
        ran = subprocess.run(["sh", "-c", text], cwd="/", env=kept, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert expected in ran.stdout
    assert "JAX_PLATFORMS=cpu" in commands[0]


def test_fields_that_differ_from_the_named_config_are_highlighted(
    dataset: ImageDataset, logits: np.ndarray
):
    config = edit(configs.get("quickstart"), train={"epochs": 7}, model={"blocks": ((4,),)})
    text = report.page(WORKDIR, finished(config, dataset, logits))
    marked = re.findall(r'<tr class="changed"><th>([^<]*)</th><td>([^<]*)</td>', text)
    assert marked == [("model.blocks", "[[4]]"), ("train.epochs", "7")]


@pytest.mark.slow
def test_a_run_evaluates_once_and_writes_its_report_before_its_summary(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    """So a report that a full disk prevented is written when the command is run again."""
    seen = []
    logits, write_json = Predictor.logits, outcome.write_json

    def remember_logits(self, images, *args):
        seen.append("test" if images is dataset.test.images else "validation")
        return logits(self, images, *args)

    def remember_summary(path, value):
        seen.append((workdir / "report.html").exists())
        write_json(path, value)

    monkeypatch.setattr(Predictor, "logits", remember_logits)
    monkeypatch.setattr(outcome, "write_json", remember_summary)
    train_run(edit(tiny, train={"epochs": 1}), dataset, workdir)
    assert seen[:4] == ["validation", "test", "validation", True]
    assert len(Page((workdir / "report.html").read_text()).images()) >= 3


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> None:
        raise ValueError("no such\ncolour")

    monkeypatch.setattr(report, "page", broken)
    log, warned = quiet(workdir), []
    monkeypatch.setattr(log, "warn", warned.append)
    config = edit(tiny, train={"epochs": 0})
    run = train(config, dataset, workdir, make_log=lambda _: log)
    assert warned == ["report.html was not written: no such colour"]
    assert outcome.read(workdir) == json.loads(json.dumps(dict(run.summary)))
    assert not (workdir / "report.html").exists()


def test_a_disk_that_is_full_is_one_line_and_leaves_what_was_there(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray, tmp_path: Path
):
    run = finished(tiny, dataset, logits)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "report.html").write_text("the previous one")
        fill(disk, 40_000)
        with pytest.raises(UserError, match=r"report.html can't be written: .*No space left"):
            report.write(disk, run)
        assert (disk / "report.html").read_text() == "the previous one"
        with pytest.raises(UserError, match=r"figures/\w+.png can't be written: .*No space left"):
            list(figures.write_pictures(disk, run))
        assert not list(disk.rglob("*.tmp"))


@pytest.mark.slow
def test_figures_are_drawn_for_a_finished_run(tmp_path: Path):
    finish(*SMALL, "--augment.translate=1", "--workdir=run", cwd=tmp_path)
    before = (tmp_path / "run/report.html").read_text()
    (tmp_path / "run/report.html").unlink()
    printed = finish("--mode=figures", "--workdir=run", cwd=tmp_path).stdout
    names = {path.stem for path in (tmp_path / "run/figures").iterdir()}
    expected = {"activation_functions", "architecture", "confusion_matrix", "convolution"}
    expected |= {"feature_maps", "filters_first", "heat_maps", "learning_curves"}
    assert expected | {"samples", "training_views"} <= names
    assert set(re.findall(r"figures/(\w+).png", printed)) == names
    assert (tmp_path / "run/report.html").read_text() == before
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    line = refuse("--mode=figures", "--workdir=run", cwd=tmp_path)
    assert line == "run/metrics.jsonl can't be read: it is not the metrics of a run"
    (tmp_path / "run/summary.json").unlink()
    assert "run is not finished" in refuse("--mode=figures", "--workdir=run", cwd=tmp_path)


@pytest.mark.slow
def test_the_suggested_learning_rate_is_printed_as_a_flag(tmp_path: Path):
    found = finish(*SMALL, "--mode=find_rate", "--workdir=rate", cwd=tmp_path).stdout
    flag = re.search(r"suggested: (--optim.learning_rate=[\d.e-]+)$", found, re.MULTILINE)
    assert flag
    finish(*SMALL, flag[1], "--train.epochs=1", "--workdir=run", cwd=tmp_path)
    assert (tmp_path / "rate/figures/learning_rates.png").exists()
