"""A progress bar on a terminal, and nothing elsewhere."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnn_jax.data import progress


class Terminal(io.StringIO):
    """Text that says of itself to be a terminal."""

    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Returns what stderr is from now on."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_bar_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with progress.bar("reading photos", 500) as done, ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: done(), range(500)):
            pass
    assert "reading photos" in terminal.getvalue()
    assert "500/500" in terminal.getvalue()


def test_no_bar_for_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with progress.bar("reading photos", 100) as done:
        done()
    assert terminal.getvalue() == ""


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar("reading photos", 1000) as done:
        done()
    assert sys.stderr.getvalue() == ""  # pyright: ignore
