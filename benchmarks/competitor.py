"""The processes that a benchmark times in turn."""

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


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
