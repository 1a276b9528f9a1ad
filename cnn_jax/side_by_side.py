"""Runs side by side in one process: a thread and a device each."""

import contextvars
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

from cnn_jax import devices
from cnn_jax.stop import Stopped, on_signals

T = TypeVar("T")
R = TypeVar("R")


def call_each(
    function: Callable[[T], R], items: Sequence[T], places: Sequence[devices.Place]
) -> list[R]:
    """Returns function(item) of each item, computed on a place of its own, as many at a time.

    A signal stops all of them as it stops one, and so does whatever one of them raises, which is
    then raised here; what has not begun is left.
    """
    if len(places) == 1:
        with devices.only(places[0]):
            return [function(item) for item in items]
    free: SimpleQueue[devices.Place] = SimpleQueue()
    for place in places:
        free.put(place)
    with on_signals() as stop, ThreadPoolExecutor(len(places)) as pool:

        def call(item: T) -> R:
            if stop.requested:
                raise Stopped(stop.requested, 0)
            place = free.get()
            try:
                with devices.only(place):
                    return function(item)
            except BaseException:
                stop.note(signal.SIGTERM, None)
                raise
            finally:
                free.put(place)

        # In the context of this thread, where they find who it is that a signal is noted by.
        begun = [pool.submit(contextvars.copy_context().run, call, item) for item in items]
        wait(begun, return_when=FIRST_EXCEPTION)
    problems = [error for future in begun if (error := future.exception())]
    for error in sorted(problems, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in begun]
