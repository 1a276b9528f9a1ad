"""The processes that a benchmark times in turn, and what the timings were made by."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

from cnn_jax.kernels import cores
from cnn_jax.runs import outcome

HERE = Path(__file__).resolve().parent


def made_by(torch_python: str | None) -> dict[str, str]:
    """Returns the command, commit, hardware and versions of timings, as a table names them."""
    arguments = [one for one in sys.argv[1:] if not one.startswith(("--torch_python", "--out"))]
    if torch_python:
        arguments.insert(0, "--torch_python=PATH")
    versions = [f"jax {version('jax')}"]
    if torch_python:
        command = [torch_python, "-c", "import torch; print(torch.__version__)"]
        versions.append(f"PyTorch {subprocess.check_output(command, text=True).strip()}")
    return {
        "command": f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(arguments)}`",
        "commit": outcome.commit() or "unknown",
        "hardware": f"{cores.usable_cpus()} cores of {platform.machine()}",
        "versions": ", ".join(versions),
    }


def ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """Returns the median and the quartiles over rounds of a competitor's time over this one's."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {"time_over_ours": middle, "quartiles": [low, high]}


class Competitor:
    """A worker process."""

    def __init__(self, python: str, script: str, *args: str, **environment: str) -> None:
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [python, str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    def wait(self) -> None:
        """Waits for a process that ends by itself."""
        if self._process.wait():
            raise SystemExit(f"{self._process.args} failed")

    def run(self, n_steps: int) -> dict[str, Any]:
        """Runs steps; returns seconds, losses and peak memory, or nothing if the process died."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{n_steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # It has died, and said why on stderr.
            self._process.stdin.close()
        self._process.wait()
