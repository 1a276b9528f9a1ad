"""Signals become a request inside the block, and are as before outside it."""

import os
import signal

import pytest

from cnn_jax.stop import Stopped, on_signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_raised_when_asked(signum: int, code: int):
    with on_signals() as stop:
        stop.raise_if_requested(3)
        os.kill(os.getpid(), signum)
        with pytest.raises(Stopped, match="after step 4") as stopped:
            stop.raise_if_requested(4)
    assert stopped.value.exit_code == code


def test_a_second_signal_leaves_at_once():
    with on_signals(), pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 130


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
