"""Signals become a request inside the block, and are as before outside it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cnn_jax.runs.stop import Stopped, on_signals


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
        (signal.SIGHUP, 129),
    ],
)
def test_a_signal_is_noted(signum: int, code: int):
    with on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested == signum
    stopped = Stopped(signum, 4)
    assert stopped.exit_code == code
    assert str(stopped) == f"stopped by {signal.Signals(signum).name} after step 4, saved"


def test_a_signal_that_interrupts_another_thread_is_noted_while_the_main_one_waits():
    found, over = [], threading.Event()

    def interrupt_itself() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.001)
        found.append(stop.requested)
        over.set()

    with on_signals() as stop:
        threading.Thread(target=interrupt_itself).start()
        over.wait()
    assert found == [signal.SIGTERM]


TWO_SIGNALS = """
import os, signal, time
from cnn_jax.runs.stop import on_signals
try:
    with on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # as a wrapper script repeats it
        time.sleep(0.1)
        print("one", flush=True)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
finally:
    print("not at once", flush=True)
"""


@pytest.mark.slow
def test_a_repeat_is_one_request_and_a_later_signal_leaves_at_once():
    start = time.monotonic()
    left = subprocess.run([sys.executable, "-c", TWO_SIGNALS], capture_output=True, text=True)
    assert left.returncode == 130
    assert left.stdout == "one\n"
    assert time.monotonic() - start < 15


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threads = threading.active_count()
    with on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < deadline


def test_outside_the_main_thread_nothing_is_caught():
    """Python allows signal handlers in the main thread alone; training goes on without."""
    before, found = signal.getsignal(signal.SIGTERM), []

    def block() -> None:
        with on_signals() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [(0, True)]


def test_a_closed_terminal_is_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


COMPILING = """
import sys
import jax, jax.numpy as jnp
from cnn_jax import command

def main():
    @jax.jit
    def slow(x):  # takes about half a minute to compile
        for i in range(3000):
            x = jnp.sin(x + i) @ x
        return x
    lowered = slow.lower(jnp.ones((3, 3)))
    print("compiling", flush=True)
    lowered.compile()
    print("compiled", flush=True)

command.guarded(main)
"""


@pytest.mark.slow
def test_ctrl_c_while_xla_compiles_ends_at_once_and_in_order():
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert (process.returncode, rest, errors) == (130, "", "interrupted\n")
    assert time.monotonic() - start < 3
