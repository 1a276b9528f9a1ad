"""Downloads files whose size and SHA-256 are known, continuing after broken connections."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import progress
from rich.console import Console

from cnn_jax.errors import UserError, one_line

_CONNECTIONS = 10
_TIMEOUT = 30.0  # Seconds without a byte after which a connection counts as broken.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Archive:
    """A file to download: its address, size in bytes and SHA-256 as hex."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def download(archives: Sequence[Archive], folder: Path, pause: float = 1.0) -> None:
    """Downloads archives to `folder` under their names, and shows their progress on stderr.

    Files that are already there are completed, or kept if they are complete.

    Args:
        archives: what to download.
        folder: an existing folder.
        pause: seconds before another connection to the same server.

    Raises:
        UserError: the server refuses, the connection breaks again and again, or the checksum is
            wrong; incomplete files stay in the folder, files with a wrong checksum do not.
        OSError: a file can't be written.
    """
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=10),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        for archive in archives:
            task = bar.add_task(archive.name, total=archive.size)

            def report(size: int, task: progress.TaskID = task) -> None:
                bar.update(task, completed=size)

            _download(archive, folder / archive.name, pause, report)


def _download(archive: Archive, path: Path, pause: float, report: Callable[[int], None]) -> None:
    found = ""
    for _ in range(2):  # A file that was completed and is damaged is downloaded once more.
        path.touch()
        _complete(archive, path, pause, report)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == archive.sha256:
            return
        path.unlink()
    raise UserError(
        f"{archive.url} is not the file that is expected: its SHA-256 is {found}, not "
        f"{archive.sha256}"
    )


def _complete(archive: Archive, path: Path, pause: float, report: Callable[[int], None]) -> None:
    """Connects until the file has the size of the archive, or too often."""
    connections, reason = 0, ""
    while (received := path.stat().st_size) < archive.size:
        if connections == _CONNECTIONS:
            raise UserError(
                f"{archive.url}: {connections} connections broke, the last one with: {reason}; the "
                f"next call continues after {received:,} of {archive.size:,} bytes"
            )
        time.sleep(pause if connections else 0)
        connections += 1
        try:
            _receive(archive.url, path, report)
            reason = "the server sent too few bytes"
        except _ConnectionBroken as error:
            reason = str(error)
    report(received)


def _receive(url: str, path: Path, report: Callable[[int], None]) -> None:
    """Appends what one connection sends; replaces the file if the server starts at the beginning.

    Raises:
        _ConnectionBroken: what was received until then is in the file.
        UserError: the server refuses the request.
        OSError: the file can't be written.
    """
    with path.open("r+b") as file:
        for position, block in _blocks(url, file.seek(0, os.SEEK_END)):
            file.seek(position)
            file.truncate()
            file.write(block)
            report(file.tell())


class _ConnectionBroken(Exception):
    """Another connection may succeed."""


def _blocks(url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """Yields (position, bytes) from byte `start` on, or from 0 if the server can't do that."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            position = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            while block := response.read(_BLOCK):
                yield position, block
                position += len(block)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            yield 0, b""  # The file is longer than what the server has: start at the beginning.
        elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UserError(f"{url}: {answer}") from None
        raise _ConnectionBroken(answer) from None
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionBroken(one_line(error)) from None
