"""The cores and the memory of a CPU, for JAX: how many cores become devices, and a smaller heap."""

import contextlib
import ctypes
import os
from pathlib import Path

import jax

from cnn_jax import cgroups

# The largest number of cores that has been measured.
_MAX_CORES = 8


def use_cores(batch_size: int) -> None:
    """Makes each core of a CPU a JAX device; must be called before JAX looks for its devices.

    On one device XLA splits every operation among all cores, which wait for each other at its end:
    for a third of vgg3's time on two cores. As devices, cores wait only where they exchange data.
    The number of devices always divides `batch_size`. The environment variable JAX_NUM_CPU_DEVICES
    takes precedence, and so does a number of devices in XLA_FLAGS.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    limit = min(usable_cpus(), _MAX_CORES)
    count = next(n for n in range(limit, 0, -1) if batch_size % n == 0)
    jax.config.update("jax_num_cpu_devices", count)


def usable_cpus(root: Path = Path("/")) -> int:
    """Returns the number of cores this process may use at a time.

    taskset or a job can restrict the cores, and a container the time on them: 1.5 cores count as 2.
    `root` is the folder in which /proc and /sys are looked up.
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts = [len(os.sched_getaffinity(0))]
    for version, folder in cgroups.folders("cpu", root):
        if version == "v2":
            words = " ".join(cgroups.lines(folder / "cpu.max")).split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [word for name in files for word in cgroups.lines(folder / name)]
        if len(words) == 2 and words[0].isdigit():  # Without a limit it is "max", or -1 in v1.
            counts.append(max(-(-int(words[0]) // int(words[1])), 1))
    return min(counts)


def trim_heap() -> None:
    """Returns the memory that compilation freed to the system; glibc would keep about 150 MB."""
    with contextlib.suppress(OSError, AttributeError):  # Not Linux, or another C library.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
