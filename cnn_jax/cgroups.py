"""The limits that a container or a job puts on this process: Linux's control groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal


def folders(
    controller: Literal["cpu", "memory"], root: Path
) -> Iterator[tuple[Literal["v1", "v2"], Path]]:
    """Yields the version and the folder of each group that this process is in, inner ones first.

    Args:
        controller: which limits are looked for.
        root: the folder in which /proc and /sys are looked up.
    """
    for line in lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            version, mount = "v1", root / "sys/fs/cgroup" / controller
        elif number == "0" and not controllers:
            version, mount = "v2", root / "sys/fs/cgroup"
        else:
            continue
        # In a container the path may be that of the host, and only the mount itself be there.
        group = Path(path.strip("/"))
        yield version, mount / group
        for parent in group.parents:
            yield version, mount / parent


def lines(path: Path) -> list[str]:
    """Returns the lines of a file, or none if it can't be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
