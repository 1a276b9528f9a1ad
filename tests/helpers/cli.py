"""The command, run in processes that are forked from one that has imported everything already.

Such a process starts in a fraction of a second. That `python -m` starts the command too is what
the smoke tests of test_main.py check.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Two epochs of a very small network on a part of the digits: seconds, yet it learns something.
SMALL = (
    "--model.blocks=[[4]]",
    "--model.dense=[16]",
    "--data.image_size=8",
    "--data.images_per_class=40",
    "--train.epochs=2",
    "--optim.learning_rate=0.1",
)
SMALL_STEPS = 2 * 7  # Two epochs of 400 images in batches of 64.

ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1"}

# The process from which the others are forked: it has imported everything but the main module, and
# started nothing.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["cnn_jax.tools.train", "cnn_jax.drawing", "sklearn.datasets", "orbax.checkpoint", "pytest"]
)


def virtual_devices(n: int) -> dict[str, str]:
    """Returns the environment of a process that sees n virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={n}".strip()}


@dataclass
class Command:
    """A process that was started; what it prints is kept in files outside its working directory."""

    process: BaseProcess
    output: Path

    def running(self) -> bool:
        return self.process.is_alive()

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Waits, looking every 0.2 ms, until something happened or the command has ended."""
        deadline = time.monotonic() + seconds
        while not happened() and self.running():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.0002)

    def send(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def kill(self) -> bool:
        """Kills it; returns whether it was still running."""
        self.process.kill()
        return self.end() == -signal.SIGKILL

    def end(self, seconds: float = 120) -> int:
        """Waits for its end and returns the exit code, negative for a signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.stdout}{self.stderr}")
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (self.output / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.output / "stderr").read_text()


def start(*arguments: str, cwd: Path, **env: str) -> Command:
    """Starts `python -m cnn_jax.main ARGUMENTS` in `cwd`, with variables of the environment."""
    return _fork(_main, arguments, cwd, env)


def command(*arguments: str, cwd: Path, **env: str) -> Command:
    """Runs a command to its end, whatever its exit code."""
    started = start(*arguments, cwd=cwd, **env)
    started.end(seconds=300)
    return started


def finish(*arguments: str, cwd: Path, **env: str) -> Command:
    """Runs a command that must end with exit code 0."""
    ended = command(*arguments, cwd=cwd, **env)
    assert ended.returncode == 0, ended.stderr
    return ended


def refuse(*arguments: str, cwd: Path, **env: str) -> str:
    """Runs a command that must end with exit code 2 and one line, and returns that line."""
    ended = command(*arguments, cwd=cwd, **env)
    assert ended.returncode == 2, (ended.returncode, ended.stderr, ended.stdout[-300:])
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: ")
    return ended.stderr.removeprefix("error: ").rstrip()


def on_devices(function: Callable[..., None], *arguments: Any, n: int = 8) -> list[str]:
    """Calls a function of a test module in a process that sees n devices; returns what it prints.

    Returns:
        The lines.
    """
    called = _fork(function, arguments, Path.cwd(), virtual_devices(n))
    assert called.end(seconds=300) == 0, called.stderr
    return called.stdout.splitlines()


def _fork(
    function: Callable[..., Any], arguments: tuple[Any, ...], cwd: Path, env: dict[str, str]
) -> Command:
    output = Path(tempfile.mkdtemp(prefix="output-", dir=_outputs()))
    for name in ("stdout", "stderr"):
        (output / name).touch()
    environment = {**os.environ, **env}
    process = _FORKS.Process(
        target=_child, args=(function, arguments, str(cwd), environment, str(output))
    )
    process.start()
    return Command(process, output)


_OUTPUTS: list[tempfile.TemporaryDirectory] = []


def _outputs() -> str:
    if not _OUTPUTS:
        _OUTPUTS.append(tempfile.TemporaryDirectory(prefix="cnn_jax_output_"))
    return _OUTPUTS[0].name


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    cwd: str,
    environment: dict[str, str],
    output: str,
) -> None:
    os.chdir(cwd)
    _redirect(output, environment.get("PYTHONIOENCODING", ""))
    _set_environment(environment)
    with _at_exit():
        function(*arguments)


def _main(*arguments: str) -> None:
    sys.argv = ["cnn_jax", *arguments]
    runpy.run_module("cnn_jax.main", run_name="__main__", alter_sys=True)


def _redirect(output: str, encoding: str) -> None:
    """Sends what Python and C code print to files; the encoding is that of PYTHONIOENCODING."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
        stream = getattr(sys, name)
        if encoding and isinstance(stream, io.TextIOWrapper):
            codec, _, errors = encoding.partition(":")
            stream.reconfigure(encoding=codec or None, errors=errors or None)


def _set_environment(environment: dict[str, str]) -> None:
    """Sets the variables, and the options that JAX has read from them when it was imported."""
    import jax

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for name, value in environment.items():
        option = name.lower()
        if name.startswith("JAX_") and before.get(name) != value and hasattr(jax.config, option):
            kind = type(getattr(jax.config, option))
            jax.config.update(option, int(value) if kind in (int, bool) else value)


@contextmanager
def _at_exit() -> Iterator[None]:
    """Calls what is registered with atexit, which multiprocessing leaves out."""
    try:
        yield
    finally:
        atexit._run_exitfuncs()
