"""Prints, for every config, what this project's compiled segment reaches on this device.

python benchmarks/throughput.py [--configs=vgg1,vgg3] [--batch_size=1024] [--dtype=bfloat16]
python benchmarks/throughput.py --configs=vgg_dropout,airbench --batch_size=0 --dtype=float32

One process, one device or all of a machine. Images are scikit-learn's digits, scaled to 32x32 and
repeated; after a first segment, which also compiles, several are timed, those of the configs in
turn, with one wait for the device each. FLOPs are three times the forward pass' of the summary.
Their share is that of --peak_tflops, the data sheet's figure for the devices used, or without it of
the rate at which the device multiplies large matrices of the same dtype.
"""

import math
import time
from dataclasses import replace
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import training_images
from absl import app, flags

from cnn_jax import configs
from cnn_jax.data import ImageDataset
from cnn_jax.fit import compile_segment
from cnn_jax.kernels import cores
from cnn_jax.models import inspection
from cnn_jax.step import Setup, init_state

_CONFIGS = flags.DEFINE_list(
    "configs",
    ["quickstart", "simple_cnn", "vgg1", "vgg2", "vgg3", "vgg_dropout", "airbench", "resnet_small"],
    "Configs to time.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 1024, "Images a step; 0: as each config trains.", lower_bound=0
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the computation.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps a segment.", lower_bound=1)
_SEGMENTS = flags.DEFINE_integer("segments", 5, "Segments timed.", lower_bound=1)
_PEAK = flags.DEFINE_float("peak_tflops", None, "Peak of all devices together, in TFLOP/s.")


def matmul_rate(dtype: str, size: int) -> float:
    """Returns FLOP/s of a matrix product of size cubed, on all devices as if alike.

    Its result is float32, as sums are; a CPU takes twice as long for one of bfloat16.
    On a CPU, whose devices are its cores, any one's product is computed by all of them.
    """
    a = jnp.ones((size, size), dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    n_products = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return n_products * 2 * size**3 / median(seconds)


class Timed:
    """A config's training, and the seconds of its steps."""

    def __init__(self, name: str, dataset: ImageDataset) -> None:
        config = configs.get(name)
        config = replace(
            config,
            train=replace(config.train, batch_size=batch_size(name)),
            model=replace(config.model, dtype=_DTYPE.value),
            runtime=replace(config.runtime, segment_steps=_STEPS.value),
        )
        self.name, self.seconds = name, []
        setup = Setup.of(config, dataset)
        self._state = init_state(setup, jax.random.key(0))
        key = jax.random.key(1)
        self._segment = compile_segment(config, setup, dataset, self._state, key)
        rows = inspection.summarize(setup.model, dataset.image_shape)
        self.flops = 3 * sum(row.flops for row in rows)

    def run(self) -> None:
        """Runs a segment."""
        start = time.perf_counter()
        self._state, _ = self._segment(self._state, _STEPS.value)
        self.seconds.append((time.perf_counter() - start) / _STEPS.value)


def batch_size(name: str) -> int:
    """Returns the images of a step of a config."""
    return _BATCH_SIZE.value or configs.get(name).train.batch_size


def main(_: list[str]) -> None:
    """Prints the table."""
    sizes = [batch_size(name) for name in _CONFIGS.value]
    cores.use_cores(math.gcd(*sizes))
    size = 2048 if jax.default_backend() == "cpu" else 8192
    peak = _PEAK.value * 1e12 if _PEAK.value else matmul_rate(_DTYPE.value, size)
    source = "data sheet" if _PEAK.value else f"{_DTYPE.value} products of {size} cubed"
    kind = jax.devices()[0].device_kind
    print(f"{jax.device_count()} x {kind}, peak {peak / 1e12:.2f} TFLOP/s ({source})")
    dataset = training_images.repeated(max(sizes) * _STEPS.value)
    timed = [Timed(name, dataset) for name in _CONFIGS.value]
    for _segment in range(_SEGMENTS.value + 1):
        for one in timed:
            one.run()
    print("| config | batch | dtype | images/s | TFLOP/s | share of peak |")
    print("|---|---|---|---|---|---|")
    for one, n in zip(timed, sizes, strict=True):
        seconds = median(one.seconds[1:])
        rate = one.flops * n / seconds
        print(
            f"| {one.name} | {n} | {_DTYPE.value} "
            f"| {n / seconds:,.0f} | {rate / 1e12:.3f} | {rate / peak:.0%} |"
        )


if __name__ == "__main__":
    app.run(main)
