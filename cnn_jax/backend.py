"""Settings that JAX reads once, before its first array, and the devices that it then finds."""

import hashlib
import importlib.util
import logging as standard_logging
import os
import platform
from pathlib import Path

import jax
from absl import logging

from cnn_jax.config import Config
from cnn_jax.data import cache
from cnn_jax.errors import UserError
from cnn_jax.kernels import cores

# Of two contradicting flags the last one counts, so this one is put after the user's own.
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_CACHE_BYTES = 2 * 2**30
"""Size of the cache of compiled programs, from which those that were not used for longest go."""


def set_up(config: Config, one_of_several: bool = False) -> None:
    """Sets what a command needs; must be called before JAX looks for its devices.

    The compilation cache is $JAX_COMPILATION_CACHE_DIR or, without it, beside the decoded images,
    one for each kind of processor, whose instructions the programs use.
    With the CPU kernels each core becomes a device of its own (see `kernels.cores`), unless this
    process is one of several that train together.
    """
    if config.runtime.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    logging.set_verbosity(logging.WARNING)  # orbax logs every save at INFO
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache.cache_folder(config.runtime.cache_dir) / f"xla-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.runtime.kernels != "xla" and not one_of_several:
        cores.use_cores(config.train.batch_size)


def check_devices() -> None:
    """Lets JAX look for its devices, and warns if it leaves a GPU alone.

    Raises:
        UserError: JAX_PLATFORMS asks for devices that are not there.
    """
    # JAX logs a traceback if it is installed for a GPU and there is none.
    log = standard_logging.getLogger("jax._src.xla_bridge")
    log.addFilter(_is_no_plugin_error)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError):
        names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
        asked = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise UserError(f"JAX finds no device here with {asked}; leave that out") from None
    finally:
        log.removeFilter(_is_no_plugin_error)
    if found != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return
    has_gpu, for_gpu = _has_gpu(), _is_for_gpu()
    if has_gpu and for_gpu:
        logging.warning(
            "there is an NVIDIA GPU that JAX can't use, so this runs on the CPU; see "
            "nvidia-smi, and docs/devices.md"
        )
    elif has_gpu:
        logging.warning(
            "there is an NVIDIA GPU, but JAX is installed for a CPU; ./launch.sh --cuda "
            "installs it for the GPU"
        )


def _is_no_plugin_error(record: standard_logging.LogRecord) -> bool:
    return "plugin configuration error" not in record.getMessage()


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _is_for_gpu() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return any(importlib.util.find_spec(name) for name in names)


def _processor() -> str:
    """Returns 8 hex digits that stand for the instructions of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    kinds = {line for line in text.splitlines() if line.startswith(("flags", "Features"))}
    return hashlib.sha256("".join([platform.machine(), *sorted(kinds)]).encode()).hexdigest()[:8]
