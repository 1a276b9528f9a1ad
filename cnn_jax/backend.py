"""Settings that JAX reads once, before its first array."""

import os

import jax
from absl import logging

from cnn_jax.config import Config
from cnn_jax.data import cache
from cnn_jax.kernels import cores

# Of two contradicting flags the last one counts, so this one is put after the user's own.
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def set_up(config: Config, one_of_several: bool = False) -> None:
    """Sets what a command needs; must be called before JAX looks for its devices.

    The compilation cache is $JAX_COMPILATION_CACHE_DIR or, without it, beside the decoded images.
    With the CPU kernels each core becomes a device of its own (see `kernels.cores`), unless this
    process is one of several that train together.
    """
    if config.runtime.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    logging.set_verbosity(logging.WARNING)  # orbax logs every save at INFO
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache.cache_folder(config.runtime.cache_dir) / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.runtime.kernels != "xla" and not one_of_several:
        cores.use_cores(config.train.batch_size)
