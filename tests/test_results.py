"""What a run says of its result: figures, intervals, temperature, and what to know about them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.cli import SMALL, finish, refuse
from helpers.data import noise
from helpers.training import edit, no_dropout, quiet, train_run
from PIL import Image
from rich.console import Console

from cnn_jax import fit as fitting
from cnn_jax import metrics, optim
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.runs import outcome
from cnn_jax.tools.train import _print_result, train


def printed(found: dict) -> list[str]:
    """Returns the lines that a run of this summary ends with."""
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    _print_result(console, found)
    return console.file.getvalue().splitlines()  # pyright: ignore


@pytest.mark.slow
def test_the_summary_has_every_figure_and_the_terminal_says_them(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    found = train_run(no_dropout(edit(tiny, train={"epochs": 6})), dataset, workdir)
    predictor = outcome.load_predictor(workdir, tiny)
    test = fitting.evaluate(predictor, dataset.test)
    figures = metrics.figures(test, dataset.class_names, found["temperature"])
    expected = json.loads(json.dumps({f"test_{name}": value for name, value in figures.items()}))
    assert expected.items() <= found.items()
    first, intervals, others, *warnings = printed(found)
    assert first.startswith(f"test accuracy {test.accuracy:.2%}, test loss {test.loss:.4f} after 6")
    low, high = found["test_macro_f1_interval"]
    assert f"macro-F1 {found['test_macro_f1']:.1%} ({low:.1%} to {high:.1%})" in intervals
    assert others.endswith(f"temperature {found['temperature']:.2f}")
    assert warnings[-2:] == [
        "warning: fewer than 10 training images: red (8), green (7), blue (7)",
        "warning: fewer than 5 test images: red (4), green (3), blue (3)",
    ]


def test_the_temperature_is_fitted_on_validation_and_used(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    found = train_run(tiny, dataset, workdir)
    predictor = outcome.load_predictor(workdir, tiny)
    assert dataset.validation is not None
    logits = predictor.logits(dataset.validation.images)
    fitted = metrics.fit_temperature(logits, dataset.validation.labels)
    assert found["temperature"] == predictor.temperature == pytest.approx(fitted) != 1.0
    shares = predictor.probabilities(dataset.test.images)
    expected = metrics.softmax(predictor.logits(dataset.test.images), fitted)
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


def test_without_a_validation_part_the_temperature_is_1(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    found = train_run(tiny, replace(dataset, validation=None), workdir)
    assert found["temperature"] == outcome.load_predictor(workdir, tiny).temperature == 1.0


@pytest.fixture
def averaging(tiny: Config) -> Config:
    """A short run that learns the colours, with an average that would need thousands of steps."""
    train = {"epochs": 15, "ema_decay": 0.9999}
    return no_dropout(edit(tiny, train=train, optim={"name": "adam", "learning_rate": 0.01}))


@pytest.mark.slow
def test_the_average_of_a_short_run_is_not_its_start(
    averaging: Config, dataset: ImageDataset, workdir: Path
):
    found = train_run(averaging, dataset, workdir)
    assert found["test_accuracy"] == found["test_accuracy_plain"] == 1.0
    assert not any("ema_decay" in line for line in found["warnings"])


@pytest.mark.slow
def test_an_average_that_lags_behind_is_a_warning(
    averaging: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    """The plain accuracy is that of the last parameters."""
    monkeypatch.setattr(optim, "make_average_decay", lambda *_: lambda t: 0.9999)
    jax.clear_caches()
    try:
        run = train(averaging, dataset, workdir, make_log=quiet)
    finally:
        jax.clear_caches()
    accuracy, plain = run.summary["test_accuracy"], run.summary["test_accuracy_plain"]
    assert accuracy < 0.7 < 1.0 == plain
    line = f"the averaged parameters reach {accuracy:.1%} and the last ones 100.0%: train.ema_decay"
    assert any(warning.startswith(line) for warning in run.summary["warnings"])
    assert any(shown.startswith(f"warning: {line}") for shown in printed(dict(run.summary)))
    assert line in (workdir / "report.html").read_text()


DIVERGING = ("--optim.learning_rate=1e18", "--train.skip_nonfinite=true", "--workdir=run")


@pytest.mark.slow
def test_a_result_that_is_not_finite_is_an_error(tmp_path: Path):
    """After the first step the parameters are finite and too large; all others are skipped."""
    for _ in range(2):  # The same command again says the same.
        line = refuse(*SMALL, *DIVERGING, "--train.epochs=1", cwd=tmp_path)
        assert line.startswith(
            "test loss nan after 7 steps, of which 6 were skipped: the network's"
        )
        assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_skipped_steps_are_part_of_the_result(tmp_path: Path):
    """A loss of one's own that is not finite on every second batch or so."""
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp\nfrom cnn_jax import losses\n"
        "def often(logits, labels):\n"
        "    bad = jnp.where(labels[0] % 2 == 0, jnp.nan, 1.0) if len(labels) == 64 else 1.0\n"
        "    return losses.cross_entropy(logits, labels) * bad\n"
    )
    flags = ("--train.loss=own.py:often", "--train.skip_nonfinite=true", "--workdir=run")
    out = finish(*SMALL, *flags, cwd=tmp_path).stdout
    found = json.loads((tmp_path / "run/summary.json").read_text())
    skipped = found["skipped_steps"]
    assert 2 <= skipped <= 12
    assert f"; {skipped} of 14 steps skipped, as not finite\n" in out
    assert f"warning: {skipped} of 14 steps were skipped because their loss or gradient" in out


@pytest.mark.slow
def test_few_skipped_steps_are_no_warning(tiny: Config, dataset: ImageDataset, workdir: Path):
    found = train_run(tiny, dataset, workdir)
    line, *_ = printed({**found, "skipped_steps": 1})
    assert line.endswith("; 1 of 6 steps skipped, as not finite")
    assert not any("skipped" in warning for warning in found["warnings"])


def test_the_result_of_an_older_version_is_one_line(
    tiny: Config, dataset: ImageDataset, workdir: Path
):
    found = train_run(tiny, dataset, workdir)
    old = {k: v for k, v in found.items() if k != "warnings"}
    assert len(printed(old)) == 1
    several = printed({"runs": [found, found], "test_accuracy_mean": 0.5, "test_accuracy_std": 0.1})
    assert all(line.startswith("seed 0: ") for line in several[:-1])
    assert several[-1] == "2 seeds: test accuracy 50.00%, standard deviation 10.00%"


@pytest.mark.slow
def test_a_network_that_is_not_finite_answers_nothing(tmp_path: Path):
    """As a run that an older version reported on may be: its class would be the first one."""
    small = (*SMALL, "--train.epochs=1")
    finish(*small, "--workdir=run", cwd=tmp_path)
    refuse(*SMALL, *DIVERGING[:2], "--train.epochs=1", "--workdir=bad", cwd=tmp_path)
    Image.fromarray(noise(9, 9, 3)).save(tmp_path / "a.png")
    for mode, paths in (("evaluate", ()), ("predict", ("a.png",))):
        finish(f"--mode={mode}", "--workdir=run", *paths, cwd=tmp_path)
        line = refuse(f"--mode={mode}", "--workdir=bad", *paths, cwd=tmp_path)
        assert line.startswith(
            "the network's outputs are not finite; train it with a lower optim.l"
        )
