"""Files that are there as a whole or not at all, and locks."""

import fcntl
import os
from pathlib import Path
from typing import IO

from absl import logging

from cnn_jax.errors import one_line


def lock(file: IO[str], wait: bool = False) -> None:
    """Locks an open file until it is closed, against other processes that lock it.

    Some file systems of networks have no locks: there a warning is all.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        logging.warning(
            "%s can't be locked (%s): make sure that no other process uses its folder",
            file.name,
            one_line(error),
        )


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in place of what stood there; what fails leaves that alone.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
