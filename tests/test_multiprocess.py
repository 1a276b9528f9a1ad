"""Two processes on loopback train as one, are stopped, and resume; only the main one writes."""

import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import SMALL, Command, start
from helpers.results import losses, summary

RUN = (*SMALL, "--model.dropout=0.5", "--train.epochs=3", "--workdir=run")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(folder: Path, *arguments: str) -> list[Command]:
    """Starts two processes, each in a folder of its own: nothing needs a shared disk."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    shared = (*arguments, "--distributed", coordinator, "--num_processes=2")
    for i in range(2):
        (folder / str(i)).mkdir(exist_ok=True)
    return [start(*shared, f"--process_id={i}", cwd=folder / str(i)) for i in range(2)]


def wait(processes: list[Command]) -> list[tuple[int, str, str]]:
    return [(process.end(), process.stdout, process.stderr) for process in processes]


@pytest.mark.slow
def test_two_processes_are_stopped_resume_and_agree_with_one(tmp_path: Path):
    one = start(*RUN, cwd=tmp_path, JAX_NUM_CPU_DEVICES="1")
    assert wait([one])[0][0] == 0
    metrics = tmp_path / "0/run/metrics.jsonl"
    processes = launch(tmp_path, *RUN, "--runtime.segment_steps=1")
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert processes[0].running(), processes[0].stderr
        time.sleep(0.01)
    processes[1].send(signal.SIGTERM)  # Not the main one: it must take the other along.
    for code, _, errors in wait(processes):
        assert code == 143, errors
        assert "the same command resumes" in errors
    assert len(metrics.read_text().splitlines()) < len(losses(tmp_path / "run"))
    (code, output, errors), (other_code, other_output, _) = wait(
        launch(tmp_path, *RUN, "--runtime.segment_steps=1")
    )
    assert (code, other_code) == (0, 0), errors
    assert "resuming after step" in output
    assert "epoch" not in other_output
    assert (tmp_path / "0/run/report.html").exists()
    assert list((tmp_path / "1").iterdir()) == []
    np.testing.assert_allclose(losses(tmp_path / "0/run"), losses(tmp_path / "run"), rtol=2e-5)
    together, alone = summary(tmp_path / "0/run"), summary(tmp_path / "run")
    assert (together["device"]["count"], alone["device"]["count"]) == (2, 1)
    np.testing.assert_allclose(together["test_loss"], alone["test_loss"], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_start_from_another_run(tmp_path: Path):
    """The main process alone reads the checkpoint; the other one has none."""
    assert wait([start(*RUN, cwd=tmp_path)])[0][0] == 0
    source = tmp_path / "run"
    shutil.copytree(source, tmp_path / "1/source")
    shutil.rmtree(tmp_path / "1/source/checkpoints")
    shutil.copytree(source, tmp_path / "0/source")
    tuned = (*RUN, "--init.checkpoint=source", "--train.epochs=1")
    alone = start(*tuned, cwd=tmp_path / "0", JAX_NUM_CPU_DEVICES="1")
    assert wait([alone])[0][0] == 0
    (tmp_path / "0/run").rename(tmp_path / "alone")
    (code, output, errors), (other_code, _, other_errors) = wait(launch(tmp_path, *tuned))
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "parameter arrays from source" in output
    np.testing.assert_allclose(losses(tmp_path / "0/run"), losses(tmp_path / "alone"), rtol=2e-5)


def test_a_mistake_of_the_main_process_ends_both_in_one_line(tmp_path: Path):
    (tmp_path / "0/run").mkdir(parents=True)
    (tmp_path / "0/run/notes.txt").write_text("mine")
    for code, _, errors in wait(launch(tmp_path, *RUN)):
        assert code == 2
        assert "error: run holds other files and no config.json; choose a --workdir" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--coordinator=127.0.0.1:1234",),
        ("--coordinator=nonsense", "--num_processes=2", "--process_id=0"),
        ("--coordinator=127.0.0.1:1234", "--num_processes=2", "--process_id=2"),
    ],
)
def test_processes_that_nothing_names_are_one_line(tmp_path: Path, arguments: tuple[str, ...]):
    ((code, _, errors),) = wait([start(*RUN, "--distributed", *arguments, cwd=tmp_path)])
    assert code == 2, errors
    assert errors.startswith("error: --distributed: ")
    assert len(errors.splitlines()) == 1
