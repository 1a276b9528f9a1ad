"""The commands as the shell starts them; other tests fork them from a process that is warm."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("program", ["cnn_jax.main", "experiments.run"])
def test_a_module_is_a_command(program: str):
    ended = subprocess.run(
        [sys.executable, "-m", program, "--confg=x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


def test_the_installed_script_is_the_command():
    script = Path(sys.executable).with_name("cnn_jax")
    ended = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "quickstart" in ended.stdout
