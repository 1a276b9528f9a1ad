"""What is set before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnn_jax import backend

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_flag_is_set_early_enough_for_xla_to_read_it(tmp_path: Path):
    """A flag that XLA does not know stops it, so it has read the one that is set."""
    result = set_up("true", "x --xla_no_such_flag=1", tmp_path)
    assert result.returncode != 0
    assert "--xla_no_such_flag=1" in result.stderr


MAIN = [sys.executable, "-m", "cnn_jax.main", "--mode=summary"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("JAX_PLATFORMS=cuda", "JAX finds no device here with JAX_PLATFORMS=cuda; leave that out"),
        ("JAX_PLATFORMS=no", "JAX finds no device here with JAX_PLATFORMS=no; leave that out"),
        ("JAX_NUM_CPU_DEVICES=x", 'JAX can\'t be imported: Invalid value "x" for JAX flag'),
        ("JAX_ENABLE_X64=maybe", "JAX can't be imported: "),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(variable: str, message: str, tmp_path: Path):
    name, value = variable.split("=")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), name: value}
    result = subprocess.run(MAIN, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("has_gpu", "for_gpu", "line"),
    [
        (True, True, "there is an NVIDIA GPU that JAX can't use"),
        (True, False, "there is an NVIDIA GPU, but JAX is installed for a CPU"),
        (False, True, ""),
        (False, False, ""),
    ],
)
def test_a_gpu_that_is_left_alone_is_a_warning(
    has_gpu: bool,
    for_gpu: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    warned: list[str],
):
    monkeypatch.setattr(backend, "_has_gpu", lambda: has_gpu)
    monkeypatch.setattr(backend, "_is_for_gpu", lambda: for_gpu)
    backend.check_devices()
    assert warned == []  # JAX_PLATFORMS=cpu asks for it.
    monkeypatch.delenv("JAX_PLATFORMS")
    backend.check_devices()
    assert [text[: len(line)] for text in warned] == ([line] if line else [])


@pytest.mark.slow
def test_jax_for_a_gpu_prints_no_traceback_where_there_is_none(tmp_path: Path):
    """A plugin that can't start, as that of jax[cuda] on a machine without a GPU."""
    plugin = tmp_path / "jax_plugins" / "xla_cuda12"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text('def initialize():\n    raise RuntimeError("no GPU")\n')
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = f"{tmp_path}:{Path(__file__).parents[1]}"
    result = subprocess.run(MAIN, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    plain = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "no GPU" in plain.stderr  # so that the test can fail


@pytest.mark.slow
def test_the_cache_of_programs_is_bounded_and_one_for_each_kind_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = """
import jax
from cnn_jax import backend
from cnn_jax.config import Config, RuntimeConfig
backend._processor = lambda: "other"
backend.set_up(Config(runtime=RuntimeConfig(cache_dir="CACHE")))
assert 0 < jax.config.jax_compilation_cache_max_size <= 2 * 2**30
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_compilation_cache_max_size", 20_000)
for n in range(2, 30):
    jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(n))
"""
    script = script.replace("CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", script], check=True)
    sizes = [path.stat().st_size for path in (tmp_path / "xla-other").iterdir()]
    assert 0 < sum(sizes) <= 20_000
    assert backend._processor() == backend._processor() != "other"
