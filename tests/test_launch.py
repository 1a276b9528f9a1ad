"""launch.sh: what it installs and how it starts the command, with stand-ins for pip and Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
if [[ $1 == -m && $2 == venv ]]; then mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; fi
if [[ $1 == -m && $2 == pip && $3 == --version ]]; then exit $(( ! ${HAS_PIP:-0} )); fi
echo "$@" >>"$CALLS"
"""


def launch(folder: Path, *arguments: str, driver: str = "") -> tuple[list[str], str]:
    """Returns how launch.sh called Python, and what it printed on stderr."""
    project, programs, calls = folder / "project", folder / "bin", folder / "calls"
    project.mkdir(exist_ok=True)
    programs.mkdir(exist_ok=True)
    for name in ("launch.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    (programs / "python").write_text(PYTHON)
    (programs / "nvidia-smi").write_text(f"#!/bin/bash\necho {driver}\n" if driver else "exit 1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment["PYTHON"] = str(programs / "python")
    result = subprocess.run(
        [project / "launch.sh", *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return calls.read_text().splitlines(), result.stderr


@pytest.mark.parametrize(
    ("arguments", "driver", "extra"),
    [
        ([], "", ""),
        ([], "580.65.06", "[cuda13]"),
        ([], "570.124.06", "[cuda12]"),
        (["--cuda"], "", "[cuda13]"),
        (["--cuda"], "535.1", "[cuda12]"),
    ],
)
def test_jax_is_installed_for_the_driver(
    arguments: list[str], driver: str, extra: str, tmp_path: Path
):
    calls, errors = launch(tmp_path, *arguments, driver=driver)
    installed = [line.split("project", 1)[1] for line in calls if " install " in line]
    assert installed == [""] + [extra] * bool(extra)
    assert calls[-1] == "-P -m cnn_jax.main"
    if driver:
        assert f"(once, for the NVIDIA driver {driver})" in errors


def test_it_installs_only_once_and_names_a_config(tmp_path: Path):
    launch(tmp_path)
    calls, errors = launch(tmp_path, "vgg3", "--train.epochs=1")
    assert sum(" install " in line for line in calls) == 1
    assert calls[-1] == "-P -m cnn_jax.main --config=vgg3 --train.epochs=1"
    assert errors == ""


def test_modules_in_the_current_folder_do_not_stand_in_for_pythons(tmp_path: Path):
    for name in ("random.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')\n")
    started = (ROOT / "launch.sh").read_text().splitlines()[-1]
    assert started.startswith('exec "$venv/bin/python" -P -m cnn_jax.main')
    for flag, code in (("-P", 0), ("-B", 1)):
        command = [sys.executable, flag, "-m", "cnn_jax.main", "--version"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert result.returncode == code, flag
