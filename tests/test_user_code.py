"""Objects in files of the user's own."""

import hashlib
import pickle
from pathlib import Path

import pytest

from cnn_jax import user_code
from cnn_jax.errors import UserError


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        user_code.load(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_executed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("made = []\nother = made\n")
    monkeypatch.chdir(tmp_path)
    made = user_code.load("mine.py:made")
    assert user_code.load(f"{tmp_path}/mine.py:made") is made
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert user_code.load("../mine.py:other") is made
    assert not (tmp_path / "__pycache__").exists()


def test_files_of_one_name_are_two_modules(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"value = {name!r}\n")
    assert [user_code.load(f"{tmp_path}/{name}/mine.py:value") for name in "ab"] == ["a", "b"]


def test_classes_work_as_in_any_module(tmp_path: Path):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Point:\n    x: int = 1\n"
    )
    (tmp_path / "mine.py").write_text(source)
    point = user_code.load(f"{tmp_path}/mine.py:Point")(3)
    assert pickle.loads(pickle.dumps(point)) == point


def test_hashes_are_of_what_was_executed(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    user_code.load(f"{file}:x")
    expected = hashlib.sha256(b"x = 1\n").hexdigest()
    file.write_text("x = 2\n")
    assert user_code.hashes()[str(file)] == expected
    assert user_code.load(f"{file}:x") == 1


@pytest.mark.parametrize("text", ["mine", "mine.py", "mine.txt:x", "mine.py:x y", "mine.py:", ":x"])
def test_other_text_is_refused(text: str):
    assert refusal(text) == f"{text}: expected FILE.py:NAME"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("narrow = 1\n", "narow", "has no narow (did you mean narrow?)"),
        ("narrow = 1\n", "zzz", "has no zzz"),
        ("x = 1\ny = (\n", "x", "line 2: SyntaxError: '(' was never closed (mine.py, line 2)"),
        ("def f():\n    return 1 / 0\n\nx = f()\n", "x", "line 2: ZeroDivisionError: division by"),
        ("import no_such_module\n", "x", "line 1: ModuleNotFoundError: No module named 'no_such_"),
        ("x = 1\nopen('gone')\n", "x", "line 2: FileNotFoundError: [Errno 2] No such file"),
        ("import sys\nsys.exit('enough')\n", "x", "line 2: SystemExit: enough"),
        ("raise ValueError('two\\nlines')\n", "x", "line 1: ValueError: two lines"),
        ("x = 1\0\n", "x", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_mistake_is_one_line(source: str, name: str, message: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(source)
    text = f"{tmp_path}/mine.py:{name}"
    assert message in refusal(text)
    assert refusal(text).startswith(f"{text}: ")
    # After a correction the same process loads it, as in a notebook.
    if "has no" not in message:
        (tmp_path / "mine.py").write_text("x = 3\n")
        assert user_code.load(f"{tmp_path}/mine.py:x") == 3


def test_a_missing_file_is_one_line(tmp_path: Path):
    assert (
        refusal(f"{tmp_path}/gone.py:x")
        == f"{tmp_path}/gone.py:x: {tmp_path}/gone.py does not exist"
    )
    (tmp_path / "folder.py").mkdir()
    assert "folder.py does not exist" in refusal(f"{tmp_path}/folder.py:x")
