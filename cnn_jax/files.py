"""Files that are there as a whole or not at all."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in place of what stood there; what fails leaves that alone.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
