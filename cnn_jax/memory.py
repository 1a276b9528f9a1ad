"""Free memory of this machine, with the limits of containers, and arrays that devices can share."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cnn_jax import cgroups

# Of cgroup v1 and v2: limit, use, and the line of memory.stat with what the kernel can take back.
_FILES = {
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}
_ALIGNMENT = 64
REMEDIES = (
    "data.image_size, train.batch_size or the network's width, set train.accumulate or train.remat"
)
"""The fields that lower what training needs, as a message ends; storage only for what is held."""


def free_bytes(root: Path = Path("/")) -> int:
    """Returns how many bytes this process can still allocate without swapping.

    It is the least of what the kernel says is available and what each limit of the process's cgroup
    and of the cgroups above it leaves; the files that the kernel keeps in memory count as free.
    Where there is no /proc, as on a Mac, it is half of the installed memory.

    Args:
        root: the folder in which /proc and /sys are looked up.
    """
    left = [*_available(root), *_left_by_limits(root)]
    if left:
        return max(min(left), 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def empty_images(*shape: int) -> np.ndarray:
    """Returns a new array, uint8, whose memory the devices of a CPU can read as it is.

    XLA copies arrays that do not start at a multiple of 64 bytes.
    """
    size = math.prod(shape)
    array = np.empty(size + _ALIGNMENT, np.uint8)
    start = -array.ctypes.data % _ALIGNMENT
    return array[start : start + size].reshape(shape)


def describe_devices() -> str:
    """Returns what there is of memory: that of the first GPU if JAX uses one, else the machine's.

    A GPU's is what JAX may use of it, three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
    """
    jax = sys.modules.get("jax")
    stats = jax.local_devices()[0].memory_stats() if jax else None
    if not stats or "bytes_limit" not in stats:
        return f"{format_bytes(free_bytes())} of memory are free"
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    return f"{format_bytes(limit - used)} of the {format_bytes(limit)} of the GPU are free"


def format_bytes(n: float) -> str:
    """Returns a number of bytes in MB or GB, as "1.9 GB"."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _available(root: Path) -> Iterator[int]:
    for line in cgroups.lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_by_limits(root: Path) -> Iterator[int]:
    """Yields what each cgroup that the process is in leaves; those without a limit leave a lot."""
    for version, folder in cgroups.folders("memory", root):
        limit_file, usage_file, reclaimable = _FILES[version]
        limit = "".join(cgroups.lines(folder / limit_file))
        if limit.isdigit():
            used = int("".join(cgroups.lines(folder / usage_file)) or 0)
            stat = dict(line.split() for line in cgroups.lines(folder / "memory.stat"))
            yield int(limit) - used + int(stat.get(reclaimable, 0))
