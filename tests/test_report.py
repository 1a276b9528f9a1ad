"""report.html: all of it inside the page, strangers' words escaped, and of any run."""

import base64
import json
import re
import shlex
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, refuse
from test_faults import fill, mounted
from test_figures import pixels
from test_main import SMALL
from test_train import edit, quiet

from cnn_jax import config as configuration
from cnn_jax import configs, evaluate, loop, losses, models, report, runs, saliency
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
STRANGE = ('<script>alert("1")</script>', "a&b'$x$", "\udcff\n\u202e")


class Page(HTMLParser):
    """What a page holds: tags, attributes, and text outside of the style."""

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
        """Returns the PNG files in it by what they show."""
        alts = [value for name, value in self.attributes if name == "alt"]
        sources = [value for name, value in self.attributes if name == "src"]
        head = "data:image/png;base64,"
        assert all(str(source).startswith(head) for source in sources)
        content = [base64.b64decode(str(source).removeprefix(head)) for source in sources]
        return dict(zip(map(str, alts), content, strict=True))


def ended(config: Config, dataset: ImageDataset, logits: np.ndarray) -> report.Run:
    """Returns a run of two epochs of three steps that gave these logits on the test images."""
    model = models.build(config.model, len(dataset.class_names))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 7)
    ]
    lines[2] |= {"epoch": 1, "train_loss": 0.75, "train_accuracy": 0.25}
    lines[4] |= {"loss": None, "skipped": True}
    lines[5] |= {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.5}
    for line in (lines[2], lines[5]):
        line |= {"validation_loss": 1.0, "validation_accuracy": 0.375}
    summary = {
        "config": configuration.to_dict(config),
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
    test = evaluate.score(logits, dataset.test.labels, losses.from_config(config.train))
    return report.Run(summary, lines, dataset, model, variables, test)


@pytest.fixture
def logits(dataset: ImageDataset) -> np.ndarray:
    """Right about all test images but the second and the third."""
    found = 5 * np.eye(3, dtype=np.float32)[dataset.test.labels]
    found[1], found[2] = (3, 0, 0), (9, 0, 0)
    return found


def test_the_page_says_what_was_run_and_asks_for_nothing(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    text = report.page(ended(tiny, dataset, logits))
    page = Page(text)
    assert list(page.images()) == ["learning curves", "confusion", "mistakes", "filters first"]
    for image in page.images().values():
        assert struct.unpack(">I", image[16:20])[0] == 960
    assert not set(page.tags) & {"script", "iframe", "object", "embed", "a", "form"}
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert all(str(value).startswith("data:") for value in addresses)
    assert "://" not in re.sub(r"base64,[^\"]*", "", text)
    assert "url(" not in text and "@import" not in text
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    for said in ("43.21%", "1.2345", "1,234,567", "12.3 s", "568 images/s", "9.8.7", "made in a"):
        assert said in page.text
    for said in ("4 x H<100> (gpu), 2 CPU cores", "22 train, 9 validation, 10 test images, 3 cl"):
        assert said in page.text
    for said in ("beef", "f00d", "optim.learning_rate", "blue", "66.7%", "red (1)"):
        assert said in page.text


# Decodes each picture of the page, and says how wide it is where the browser says what it blocks.
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


@pytest.mark.skipif(not CHROMIUM, reason="the system has no Chromium")
def test_a_browser_shows_every_picture_and_blocks_nothing(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray, tmp_path: Path
):
    report.write(tmp_path, ended(tiny, dataset, logits))
    (tmp_path / "viewer.html").write_text(VIEWER)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --enable-logging=stderr "
    flags += "--allow-file-access-from-files --virtual-time-budget=10000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "viewer.html").as_uri())
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = re.findall(r'CONSOLE.*?\] "(.*)", source: ', ran.stderr)
    shown = ("learning curves", "confusion", "mistakes", "filters first")
    assert told == [", ".join(f"{name}: 960" for name in shown)]


def test_strangers_words_do_nothing(tiny: Config, dataset: ImageDataset, logits: np.ndarray):
    files = tuple(f"{i}<b>\x1b&\udcff.png" for i in range(10))
    strange = replace(
        dataset,
        class_names=STRANGE,
        source="folder <i>&amp;",
        test=replace(dataset.test, files=files),
    )
    config = edit(tiny, data={"dir": "<u>'\"&"})
    text = report.page(ended(config, strange, logits))
    text.encode()  # No lone surrogate.
    page = Page(text)
    assert not set(page.tags) & {"script", "b", "i", "u"}
    assert "\x1b" not in text and "\u202e" not in text
    assert '<script>alert("1")</script>' in page.text
    assert "a&b'$x$" in page.text
    assert "\\udcff\\n\\u202e" in page.text
    assert "folder <i>&amp;:" in page.text
    assert "<u>'\"&" in page.text
    line = "2<b>\\x1b&\\udcff.png: \\udcff\\n\\u202e, taken for " + STRANGE[0] + " (100.0%)"
    assert line in page.text
    assert page.text.index("2<b>") < page.text.index("1<b>"), "the most wrong stands first"
    assert "3<b>" not in page.text


def test_curves_are_those_of_the_metrics(tiny: Config, dataset: ImageDataset, logits: np.ndarray):
    run = ended(tiny, dataset, logits)
    accuracy, loss = dict(report.pictures(run))["learning_curves"].axes
    drawn = {line.get_label(): line for line in loss.lines}
    assert list(drawn) == ["single steps", "train", "validation", "test, once"]
    np.testing.assert_allclose(drawn["train"].get_xydata(), [[1, 0.75], [2, 0.5]])
    np.testing.assert_allclose(drawn["validation"].get_xydata(), [[1, 1], [2, 1]])
    np.testing.assert_allclose(drawn["test, once"].get_xydata(), [[2, run.test.loss]])
    assert [line.get_fillstyle() for line in drawn.values()] == ["full", "full", "full", "none"]
    steps = [[1 / 3, 1], [2 / 3, 1 / 2], [1, 1 / 3], [4 / 3, 1 / 4], [2, 1 / 6]]
    np.testing.assert_allclose(drawn["single steps"].get_xydata(), steps)
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [80])


def test_heat_maps_explain_the_class_that_they_name(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray
):
    """Also where the image alone, without the views that are averaged, is another class."""
    run = ended(tiny, dataset, logits)
    images = dataset.test.images[run.explained]
    alone = evaluate.logits(run.model, run.variables, images, **run.scaling, test_time="none")
    targets = dataset.test.labels[run.explained]
    assert np.any(alone.argmax(axis=1) != targets)
    axes = report.heat_maps(run).axes
    cams = saliency.grad_cam(
        run.model, run.variables, images, targets, "block2/pool", **run.scaling
    )
    for row, image, target, cam in zip(range(3), images, targets.tolist(), cams, strict=True):
        left, middle, right = axes[3 * row : 3 * row + 3]
        assert left.get_ylabel().startswith(f"{dataset.class_names[target]}, ")
        drops = saliency.occlusion(run.model, run.variables, image, target, **run.scaling)
        np.testing.assert_allclose(pixels(middle, 1), drops, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pixels(right, 1), cam / (cam.max() or 1), rtol=1e-5, atol=1e-7)
        # Squares of 2 pixels, at every pixel.
        np.testing.assert_array_equal(middle.images[1].get_extent(), (0, 7, 7, 0))


def test_many_steps_are_averaged(tiny: Config, dataset: ImageDataset, logits: np.ndarray):
    run = ended(tiny, dataset, logits)
    run.metrics[:0] = [{"step": i, "loss": 7.0} for i in range(1, 2001)]
    _, loss = dict(report.pictures(run))["learning_curves"].axes
    assert len(np.asarray(loss.lines[0].get_xdata())) == 200
    np.testing.assert_allclose(np.asarray(loss.lines[0].get_ydata())[:199], 7)


def test_a_run_of_no_step_without_mistakes_has_a_page(tiny: Config, dataset: ImageDataset):
    run = ended(tiny, dataset, np.eye(3, dtype=np.float32)[dataset.test.labels])
    nothing = {"epochs": 0, "steps": 0, "images_per_second": None, "seconds": 0.0}
    page = Page(report.page(replace(run, summary={**run.summary, **nothing}, metrics=[])))
    assert list(page.images()) == ["confusion", "filters first"]
    assert "No step of training was run." in page.text
    assert "No test image is taken for another class." in page.text


@pytest.mark.parametrize("name", ["quickstart", "vgg_dropout", "finetune_gradual"])
def test_the_command_makes_the_same_config(name: str):
    base = configs.get(name)
    changed = replace(
        edit(
            base,
            data={"dir": "/my photos/$x", "classes": ("a b", "c"), "mean": (0.5, 0.25, 0.125)},
            model={"blocks": ((3, 4), (5,)), "name": "vgg"},
            optim={"groups": (("head/.*", 1.0), (".*", None)), "phases": ()},
            augment={"flip": True},
            train={"epochs": 7},
        ),
        seed=3,
    )
    for config in (base, changed):
        python, dash, module, named, *sets = shlex.split(report.command(config).replace("\\\n", ""))
        assert (python, dash, module) == ("python", "-m", "cnn_jax.main")
        assert named == f"--config={name}"
        overrides = [word.removeprefix("--set=") for word in sets]
        assert configuration.with_overrides(base, overrides) == config
    assert report.command(base) == f"python -m cnn_jax.main --config={name}"
    assert report.command(replace(base, name="custom")) == ""


def test_marked_is_what_differs_from_the_named_config(dataset: ImageDataset, logits: np.ndarray):
    config = edit(configs.get("quickstart"), train={"epochs": 7}, model={"blocks": ((4,),)})
    text = report.page(ended(config, dataset, logits))
    marked = re.findall(r'<tr class="changed"><th>([^<]*)</th><td>([^<]*)</td>', text)
    assert marked == [("model.blocks", "[[4]]"), ("train.epochs", "7")]


def test_a_run_evaluates_once_and_writes_its_report_before_its_summary(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    """So what a full disk keeps from being written is written when the command is given again."""
    seen = []
    logits = evaluate.logits
    monkeypatch.setattr(
        evaluate,
        "logits",
        lambda *a, **k: seen.append(a[2] is dataset.test.images) or logits(*a, **k),
    )
    monkeypatch.setattr(
        runs, "write_json", lambda path, _: seen.append((workdir / "report.html").exists())
    )
    runs.run(loop.Trainer(edit(tiny, train={"epochs": 1}), dataset), workdir, quiet)
    assert seen == [False, True, True]  # Validation, test, and the summary after the report.
    assert len(Page((workdir / "report.html").read_text()).images()) >= 3


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch
):
    def broken(*_: Any) -> None:
        raise ValueError("no such\ncolour")

    monkeypatch.setattr(report, "page", broken)
    log, warned = quiet(workdir), []
    monkeypatch.setattr(log, "warn", warned.append)
    config = edit(tiny, train={"epochs": 0})
    summary = runs.run(loop.Trainer(config, dataset), workdir, lambda _: log)
    assert warned == ["report.html was not written: no such colour"]
    assert runs.finished(workdir) == json.loads(json.dumps(summary))
    assert not (workdir / "report.html").exists()


def test_a_disk_that_is_full_is_one_line_and_leaves_what_was_there(
    tiny: Config, dataset: ImageDataset, logits: np.ndarray, tmp_path: Path
):
    run = ended(tiny, dataset, logits)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "report.html").write_text("the one before")
        fill(disk, 40_000)
        with pytest.raises(UserError, match=r"report.html can't be written: .*No space left"):
            report.write(disk, run)
        assert (disk / "report.html").read_text() == "the one before"
        with pytest.raises(UserError, match=r"figures/\w+.png can't be written: .*No space left"):
            list(report.write_pictures(disk, run))
        assert not list(disk.rglob("*.tmp"))


def test_the_modes_draw_a_run_and_find_a_rate(tmp_path: Path):
    finish(*SMALL, "--workdir=run", cwd=tmp_path)
    before = (tmp_path / "run/report.html").read_text()
    (tmp_path / "run/report.html").unlink()
    drawn = finish("--mode=figures", "--workdir=run", cwd=tmp_path).stdout
    names = {path.stem for path in (tmp_path / "run/figures").iterdir()}
    expected = {"activation_functions", "architecture", "confusion", "convolution"}
    expected |= {"feature_maps", "filters_first", "heat_maps", "learning_curves"}
    assert expected | {"samples"} <= names
    assert set(re.findall(r"figures/(\w+).png", drawn)) == names
    assert (tmp_path / "run/report.html").read_text() == before
    found = finish(*SMALL, "--mode=find_rate", "--workdir=rate", cwd=tmp_path)
    assert re.search(r"optim.learning_rate=[\d.e-]+ is suggested", found.stdout)
    assert (tmp_path / "rate/figures/learning_rates.png").exists()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    said = refuse("--mode=figures", "--workdir=run", cwd=tmp_path)
    assert said == "run/metrics.jsonl can't be read: it is not what a run has written"
    (tmp_path / "run/summary.json").unlink()
    assert "run is not finished" in refuse("--mode=figures", "--workdir=run", cwd=tmp_path)
