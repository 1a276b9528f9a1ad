"""SIGTERM and Ctrl-C as a request that training honours between two segments."""

import contextlib
import os
import signal
import socket
import threading
import types
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    """Catches SIGTERM and SIGINT inside the block and restores the handlers after it.

    The first signal is recorded. A second one ends the process at once, without saving, which a
    checkpoint survives as it survives a kill. Python runs no handler while the main thread waits
    for the device, or while a signal interrupts another thread. So a thread of its own records the
    signals as well, through the file descriptor that the interpreter's own handler writes to.

    Signal handlers belong to the main thread; in any other thread nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_watch, args=(reader, request), daemon=True).start()
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    previous = {s: signal.signal(s, request.note) for s in _SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        writer.close()


def _watch(reader: socket.socket, request: StopRequest) -> None:
    """Records signals until the other end is closed, and ends the process at the second."""
    seen: list[int] = []
    with reader:
        while signums := reader.recv(16):
            seen += [signum for signum in signums if signum in _SIGNALS]
            if seen:
                request.note(seen[0], None)
            if len(seen) > 1:
                from rich.console import Console  # Slow to import, and needed in a run alone.

                Console().show_cursor()  # which a progress bar has hidden
                os._exit(128 + seen[1])
