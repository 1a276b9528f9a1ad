"""Damage done to checkpoints, and what is read from them."""

import shutil
from pathlib import Path


def everything(name: str) -> bool:
    """Chooses every array of a checkpoint."""
    return True


def largest_file(folder: Path) -> Path:
    """Returns the file of a checkpoint that holds the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def empty(folder: Path) -> None:
    """Removes all that a checkpoint's folder holds."""
    shutil.rmtree(folder)
    folder.mkdir()
