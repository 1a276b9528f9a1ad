"""Seeds side by side, a device each, are the runs that they would be alone."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import pytest
from test_devices import ONE, on_devices
from test_main import SMALL, command, mistake, start

from cnn_jax import devices
from cnn_jax.side_by_side import call_each
from cnn_jax.stop import Stopped, on_signals

TWO = {"JAX_NUM_CPU_DEVICES": "2"}
THREE_SEEDS = (*SMALL, "--set=seed=3", "--set=train.seeds=3", "--workdir=seeds")
# Which changes no bits and lets a signal come between two steps.
STEP_BY_STEP = "--set=train.segment_steps=1"


def results(*workdirs: Path) -> list[tuple[str, float, list[float]]]:
    found = []
    for workdir in workdirs:
        summary = json.loads((workdir / "summary.json").read_text())
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        found.append((summary["params_sha256"], summary["test_loss"], losses))
        assert summary["device"]["count"] == 1
    return found


def seeds_in(cwd: Path) -> list[Path]:
    return [cwd / f"seeds/seed-{seed}" for seed in (3, 4, 5)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float, list[float]]]:
    """What three seeds come to, each in a command and on a device of its own."""
    cwd = tmp_path_factory.mktemp("alone")
    for seed in (3, 4, 5):
        run = (*SMALL, f"--set=seed={seed}", f"--workdir={seed}")
        result = command(*run, cwd=cwd, **ONE)
        assert result.returncode == 0, result.stderr
    return results(*(cwd / str(seed) for seed in (3, 4, 5)))


def test_each_seed_has_the_bits_of_its_single_run(alone: list, tmp_path: Path):
    result = command(*THREE_SEEDS, cwd=tmp_path, **TWO)
    assert result.returncode == 0, result.stderr
    assert results(*seeds_in(tmp_path)) == alone
    assert len({sha256 for sha256, *_ in alone}) == 3
    assert all(f"seed-{seed}: epoch 2/2  loss" in result.stdout for seed in (3, 4, 5))
    assert "3 seeds: test accuracy" in result.stdout
    result = command("--mode=verify", "--workdir=seeds/seed-4", cwd=tmp_path, **TWO)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_signal_stops_all_seeds_and_they_go_on(alone: list, tmp_path: Path):
    process = start(*THREE_SEEDS, STEP_BY_STEP, cwd=tmp_path, **TWO)
    begun = [path / "metrics.jsonl" for path in seeds_in(tmp_path)[:2]]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in begun):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in errors
    assert errors.count("\n") == 1
    for seed in seeds_in(tmp_path)[:2]:
        assert any((seed / "checkpoints/latest").iterdir())
        assert not (seed / "summary.json").exists()
    assert not seeds_in(tmp_path)[2].exists()
    assert command(*THREE_SEEDS, STEP_BY_STEP, cwd=tmp_path, **TWO).returncode == 0
    assert results(*seeds_in(tmp_path)) == alone


def test_a_seed_that_fails_ends_the_command_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    line = mistake(*THREE_SEEDS, "--set=optim.learning_rate=1e30", cwd=tmp_path)
    assert line.startswith(("seed 3: loss ", "seed 4: loss "))
    assert "no longer finite" in line


COMPILATIONS = """
import sys
from collections import Counter
from pathlib import Path

import jax

from cnn_jax import configs, runs
from cnn_jax.config import with_overrides
from cnn_jax.data import load
from cnn_jax.run_log import RunLog

compiled = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name="", **__: compiled.update([fun_name] * ("backend_comp" in event))
)
small = ["model.blocks=[[4]]", "model.dense=[8]", "data.image_size=8", "train.epochs=1"]
config = with_overrides(configs.get("quickstart"), [*small, "train.seeds=5"])
runs.run_seeds(config, load(config.data), Path(sys.argv[1]), RunLog)
print([n for name, n in compiled.items() if "train_segment" in name])
"""


def test_each_device_compiles_once(tmp_path: Path):
    assert on_devices(COMPILATIONS, str(tmp_path), n=2)[-1] == "[2]"


PLACES = """
import threading

import jax

from cnn_jax import devices
from cnn_jax.side_by_side import call_each

together = threading.Barrier(8, timeout=60)


def where(item):
    together.wait()
    array = devices.replicate(jax.numpy.ones(item))
    return devices.count(), len(array), array.sharding.device_set.pop().id


found = call_each(where, range(8), devices.places())
print({count for count, *_ in found}, [length for _, length, _ in found])
print(sorted(device for *_, device in found))
print(devices.count(), len(devices.places()))
with devices.only(jax.devices()[3]):
    print(devices.count(), devices.places(), jax.numpy.ones(1).devices())
"""


def test_each_has_a_device_and_all_go_on_at_the_same_time():
    assert on_devices(PLACES) == [
        "{1} [0, 1, 2, 3, 4, 5, 6, 7]",
        "[0, 1, 2, 3, 4, 5, 6, 7]",
        "8 8",
        "1 [None] {CpuDevice(id=3)}",
    ]


def test_cores_that_are_devices_of_one_run_are_not_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "local_devices", lambda: [*"abcd"])
    assert devices.places() == [None]
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    assert devices.places() == [*"abcd"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert devices.places() == [None]
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.places() == [None]  # of one
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: [*"ab"])
    assert devices.places() == [*"ab"]


def wait_to_be_stopped() -> None:
    """What a run does: goes on until the request that `on_signals` gives it is made."""
    with on_signals() as stop:
        deadline = time.monotonic() + 60
        while not stop.requested:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        raise Stopped(stop.requested, 7)


def test_what_one_raises_stops_the_others_and_none_begins_after_it():
    called = []

    def function(item: int) -> None:
        called.append(item)
        if item == 1:
            raise ValueError("of one")
        wait_to_be_stopped()

    with pytest.raises(ValueError, match="of one"):
        call_each(function, range(4), [None, None])
    assert sorted(called) == [0, 1]


def test_a_signal_reaches_all():
    both = threading.Barrier(3, timeout=60)
    called = []

    def function(item: int) -> None:
        called.append(item)
        both.wait()
        wait_to_be_stopped()

    def send() -> None:
        both.wait()
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Stopped) as stopped:
        call_each(function, range(4), [None, None])
    sender.join()
    assert stopped.value.exit_code == 130
    assert sorted(called) == [0, 1]


def test_on_one_place_they_are_called_in_turn_by_the_caller():
    caller = threading.current_thread()
    assert call_each(lambda i: (i, threading.current_thread()), range(3), [None]) == [
        (i, caller) for i in range(3)
    ]
