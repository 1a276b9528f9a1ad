"""What is set before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from cnn_jax import backend, fields
from cnn_jax.config import Config
backend._DETERMINISTIC = backend._DETERMINISTIC + sys.argv[2]
backend.set_up(fields.with_values(Config(), {"runtime.deterministic": sys.argv[1]}))
import jax
print(os.environ["XLA_FLAGS"], float(jax.numpy.ones(3).sum()))
"""


def set_up(deterministic: str, suffix: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Sets JAX up in a new process, with `suffix` appended to the flag, and uses it."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, deterministic, suffix],
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "XLA_FLAGS": "--xla_gpu_deterministic_ops=false",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("deterministic", "flags"),
    [
        ("true", "--xla_gpu_deterministic_ops=false --xla_gpu_deterministic_ops=true"),
        ("false", "--xla_gpu_deterministic_ops=false"),
    ],
)
def test_deterministic_sets_the_flag_of_xla(deterministic: str, flags: str, tmp_path: Path):
    result = set_up(deterministic, "", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{flags} 3.0\n"


def test_the_flag_is_set_early_enough_for_xla_to_read_it(tmp_path: Path):
    """A flag that XLA does not know stops it, so it has read the one that is set."""
    result = set_up("true", "x --xla_no_such_flag=1", tmp_path)
    assert result.returncode != 0
    assert "--xla_no_such_flag=1" in result.stderr
