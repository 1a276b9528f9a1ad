"""Signals become a request inside the block, and are as before outside it."""

import os
import signal

import pytest

from cnn_jax.stop import Stopped, on_signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted(signum: int, code: int):
    with on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested == signum
    stopped = Stopped(signum, 4)
    assert stopped.exit_code == code
    assert str(stopped) == f"stopped by {signal.Signals(signum).name} after step 4, saved"


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
