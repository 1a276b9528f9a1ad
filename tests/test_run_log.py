"""metrics.jsonl across restarts, events, and what a terminal and a file each see."""

import io
import json
from pathlib import Path

import pytest
from helpers.results import line, lines
from rich.console import Console

from cnn_jax.errors import UserError
from cnn_jax.runs.log import RunLog


def log_to(workdir: Path, terminal: bool = False) -> tuple[RunLog, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    return RunLog(workdir, console), output


def test_every_step_is_a_line(workdir: Path):
    log, _ = log_to(workdir)
    with log.running(0, total_steps=4, steps_per_epoch=2):
        log.segment([line(1), line(2, train_loss=0.7, train_accuracy=0.4, epoch=1)], 12.34)
    assert lines(workdir) == [
        line(1),
        line(2, train_loss=0.7, train_accuracy=0.4, epoch=1, images_per_second=12.3),
    ]


def test_a_rerun_drops_what_it_will_write_again_and_a_cut_line(workdir: Path):
    log, _ = log_to(workdir)
    with log.running(0, 4, 2):
        log.segment([line(1), line(2), line(3)], 1)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with log.running(2, 4, 2):
        log.segment([line(3), line(4)], 1)
    assert [entry["step"] for entry in lines(workdir)] == [1, 2, 3, 4]


def test_a_line_that_is_no_text_is_named(workdir: Path):
    log, _ = log_to(workdir)
    (workdir / "metrics.jsonl").write_bytes(json.dumps(line(1)).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"), log.running(2, 4, 2):
        pass


def test_plain_output_has_a_line_an_epoch_and_no_control_codes(workdir: Path):
    log, output = log_to(workdir)
    with log.running(0, 4, 2):
        log.segment([line(1)], 1)
        log.segment([line(2, epoch=1, train_loss=0.7, train_accuracy=0.425)], 1234)
    assert output.getvalue() == "epoch 1/2  loss 0.7000  accuracy 42.50%  1,234 images/s\n"


def test_a_terminal_shows_a_bar_with_the_figures_of_the_segment(workdir: Path):
    log, output = log_to(workdir, terminal=True)
    with log.running(0, 4, 2):
        log.segment([line(1)], 567)
    shown = output.getvalue()
    assert "epoch 1/2" in shown
    assert "25%  loss 1.0000  accuracy 50.00%  567 images/s" in shown


def test_events_hold_the_scalars_of_each_segment(workdir: Path):
    log, _ = log_to(workdir)
    with log.running(0, 4, 2):
        log.segment([line(1), line(2, epoch=1, validation_accuracy=0.25)], 1)
    content = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    for name in (b"loss", b"accuracy", b"learning_rate", b"validation_accuracy"):
        assert name in content


def test_resuming_is_said(workdir: Path):
    log, output = log_to(workdir)
    with log.running(3, 4, 2):
        pass
    assert output.getvalue() == "resuming after step 3 of 4\n"
