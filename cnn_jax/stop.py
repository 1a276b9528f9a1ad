"""SIGTERM and Ctrl-C as a request that training honours between two segments."""

import contextlib
import signal
import types
from collections.abc import Iterator


class Stopped(Exception):
    """Training was asked to stop, and its state is saved. `exit_code` is 128 + the signal."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, saved")
        self.exit_code = 128 + signum


class StopRequest:
    """Whether a signal has come: `requested` is its number, or 0."""

    def __init__(self) -> None:
        self.requested = 0

    def handle(self, signum: int, _frame: types.FrameType | None) -> None:
        """Notes a signal; a second one leaves at once, without saving."""
        if self.requested:
            raise SystemExit(128 + signum)
        self.requested = signum


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the block and restores the handlers after it."""
    request = StopRequest()
    previous = {s: signal.signal(s, request.handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
