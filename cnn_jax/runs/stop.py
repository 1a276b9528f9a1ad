"""Signals: a request that training honours between two segments, elsewhere the end."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence

# Ctrl-C, and what schedulers of clusters send before they end a job; the last is a closed terminal.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_REPEAT_SECONDS = 2.0
"""Signals that come within so many seconds are one request: Ctrl-C also reaches a wrapper script,
which may pass it on."""


class Stopped(Exception):
    """Training was asked to stop, and its state is saved. `exit_code` is 128 + the signal."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved")
        self.exit_code = 128 + signum


class StopRequest:
    """Whether a signal has come: `requested` is its number, or 0."""

    def __init__(self) -> None:
        self.requested = 0

    def note(self, signum: int, _frame: types.FrameType | None) -> None:
        """Records the first signal."""
        self.requested = self.requested or signum


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Catches signals inside the block and restores the handlers after it.

    The first signal is recorded. Another one, two seconds later or more, ends the process at once,
    without saving, which a checkpoint survives as it survives a kill. SIGHUP is not caught where it
    is ignored, as under nohup.
    """
    request = StopRequest()
    first: list[float] = []

    def notice(signum: int) -> None:
        now = time.monotonic()
        if first and now - first[0] >= _REPEAT_SECONDS:
            _end(signum)
        first[:] = first or [now]
        request.note(signum, None)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [s for s in _SIGNALS if s != signal.SIGHUP or not ignored]
    with _watching(signals, request.note, notice):
        yield request


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Ctrl-C inside the block ends the process at once, with exit code 130.

    KeyboardInterrupt would wait until XLA has compiled, and then end the interpreter while XLA's
    threads still run, which is a segmentation fault more often than not.
    """

    def end(signum: int) -> None:
        os.write(2, b"interrupted\n")
        _end(signum)

    with _watching([signal.SIGINT], lambda signum, frame: None, end):
        yield


@contextlib.contextmanager
def _watching(
    signals: Sequence[signal.Signals],
    handle: Callable[[int, types.FrameType | None], None],
    notice: Callable[[int], None],
) -> Iterator[None]:
    """Inside the block, `handle` handles signals in the main thread and `notice` in one of its own.

    Python runs no handler while the main thread waits for the device, or while a signal interrupts
    another thread. The thread learns of signals through the file descriptor that the interpreter's
    own handler writes to. Signal handlers belong to the main thread; in any other thread nothing is
    caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_watch, args=(reader, signals, notice), daemon=True).start()
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    previous = {s: signal.signal(s, handle) for s in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        writer.close()


def _watch(
    reader: socket.socket, signals: Sequence[signal.Signals], notice: Callable[[int], None]
) -> None:
    """Notices signals until the other end is closed."""
    with reader:
        while signums := reader.recv(16):
            for signum in signums:
                if signum in signals:
                    notice(signum)


def _end(signum: int) -> None:
    if "rich" in sys.modules:
        from rich.console import Console  # Slow to import, and needed in a run alone.

        Console().show_cursor()  # which a progress bar has hidden
    os._exit(128 + signum)
