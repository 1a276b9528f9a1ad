"""Kills quickstart again and again, resumes it, and compares the result bit for bit.

python benchmarks/soak.py [--kills=200] [--seed=N]

A run is started, killed with SIGKILL after a random time, started again, and so on until it ends by
itself; then another run begins, until all kills are spent. Each run must end with the parameters of
one that was never killed, and leave the same files. The seed of the random times is printed.
"""

import json
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]

_KILLS = flags.DEFINE_integer("kills", 200, "How often a run is killed.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Determines the times. Default: a new one.")


def start(workdir: Path) -> subprocess.Popen[bytes]:
    """Starts or resumes a run."""
    command = [sys.executable, "-m", "cnn_jax.main", f"--workdir={workdir}"]
    command += ["--runtime.segment_steps=5", "--runtime.checkpoint_seconds=0.2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of a run, which must be a success."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {errors.decode()}")


def result(workdir: Path) -> tuple[str, list[str]]:
    """Returns the hash of a finished run's parameters, and the kinds of its files.

    Numbers of steps, orbax's random names and the time in TensorBoard's stand for all of their
    kind.
    """
    found = json.loads((workdir / "summary.json").read_text())["params_sha256"]
    names = [str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()]
    names = [re.sub(r"[0-9a-f]{32}|\d+(?=/)", "*", name) for name in names]
    return found, sorted({"tfevents" if "tfevents" in name else name for name in names})


def main(_: list[str]) -> None:
    """Runs the soak."""
    seed = _SEED.value if _SEED.value is not None else secrets.randbits(32)
    print(f"--seed={seed}", flush=True)
    times = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        finish(start(Path(folder, "never")))
        longest = time.monotonic() - begin
        expected = result(Path(folder, "never"))
        kills, runs = 0, 0
        while kills < _KILLS.value:
            workdir = Path(folder, f"run{runs}")
            while True:
                process = start(workdir)
                try:
                    process.wait(times.uniform(0, longest) if kills < _KILLS.value else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    continue
                finish(process)
                break
            if result(workdir) != expected:
                raise SystemExit(f"run {runs} differs: {result(workdir)}, not {expected}")
            runs += 1
            print(f"{kills} kills, {runs} runs ended with the same bits and files", flush=True)


if __name__ == "__main__":
    app.run(main)
