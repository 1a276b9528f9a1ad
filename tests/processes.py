"""The command in processes of its own that start in a fraction of a second and can be killed."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

# A process that has imported everything and started nothing, from which each run is forked.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["cnn_jax.main", "cnn_jax.modes", "cnn_jax.figures", "sklearn.datasets"]
)


@dataclass
class Command:
    """A command that was started; what it prints lies in files beside its working directory."""

    process: BaseProcess
    cwd: Path

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
        """Kills it; says whether it was still running."""
        self.process.kill()
        return self.end() == -signal.SIGKILL

    def end(self, seconds: float = 120) -> int:
        """Waits for its end and returns the exit code, negative for a signal that killed it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s")
        return code

    @property
    def stdout(self) -> str:
        return (self.cwd / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.cwd / "stderr").read_text()


def start(*arguments: str, cwd: Path) -> Command:
    """Starts `python -m cnn_jax.main ARGUMENTS` in `cwd`."""
    process = _FORKS.Process(target=_child, args=(arguments, str(cwd)))
    process.start()
    return Command(process, cwd)


def finish(*arguments: str, cwd: Path) -> Command:
    """Runs a command to its end, which must be a good one."""
    command = start(*arguments, cwd=cwd)
    code = command.end()
    assert code == 0, command.stderr
    return command


def refuse(*arguments: str, cwd: Path) -> str:
    """Runs a command that must end with exit code 2 and one line, and returns that line."""
    command = start(*arguments, cwd=cwd)
    code = command.end()
    assert code == 2, (code, command.stderr, command.stdout[-300:])
    assert command.stderr.count("\n") == 1, command.stderr
    assert command.stderr.startswith("error: ")
    return command.stderr.removeprefix("error: ").rstrip()


def _child(arguments: tuple[str, ...], cwd: str) -> None:
    os.chdir(cwd)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["cnn_jax", *arguments]
    from cnn_jax import main

    main.run()
