"""A progress bar on stderr while files are read, if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FEW = 200
"""Up to so many steps there is no bar."""


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar while the block runs, and gives it the function to call after each step.

    The function may be called from several threads.
    """
    if total <= _FEW or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), Remaining())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
