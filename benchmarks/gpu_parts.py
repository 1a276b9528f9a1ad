"""What gpu_check.py has JAX do, each in a process of its own: `python gpu_parts.py NAME ...`.

Every result is a line of JSON on stdout, written as soon as it is known. `--rehearsal` as the last
argument makes everything tiny, for a CPU.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training_images
from carry_cifar import read_parts

from cnn_jax import capacity, configs, kernels, mesh
from cnn_jax.config import (
    AugmentConfig,
    Config,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from cnn_jax.data import ImageDataset, Split
from cnn_jax.models import inspection
from cnn_jax.step import Batch, Setup, init_state, train_segment, train_step
from cnn_jax.tools.train import train

Row = dict[str, Any]
_MOST_STEPS = 50
_SECONDS = 0.4
"""Of one timing."""
PHOTOS = {"resnet50", "efficientnet_lite0"}


def network(name: str, rehearsal: bool) -> ModelConfig:
    """Returns the network of a config, or one for photos by its own name; tiny in a rehearsal."""
    is_config = name not in PHOTOS
    model = configs.get(name).model if is_config else ModelConfig(name=name, blocks=(), dense=())
    if not rehearsal:
        return model
    if name == "efficientnet_lite0":
        return replace(model, blocks=((8,),) * 7)
    blocks = model.blocks or ((4,), (4,))
    return replace(model, blocks=tuple((4,) for _ in blocks), dense=(8,) * len(model.dense))


def step_config(request: Row, rehearsal: bool) -> Config:
    """Returns a config whose step is that of the PyTorch programs: momentum and cross-entropy."""
    model = network(request["network"], rehearsal)
    model = replace(model, dtype=request["dtype"], precision=request["precision"])
    return Config(
        model=model,
        augment=AugmentConfig(),
        optim=OptimConfig(learning_rate=0.001),
        train=TrainConfig(epochs=1000, batch_size=request["batch"]),
        runtime=RuntimeConfig(kernels=_kernels(rehearsal), segment_steps=_MOST_STEPS),
    )


def _kernels(rehearsal: bool) -> Literal["auto", "xla"]:
    """Returns the kernels to use: in a rehearsal those that a GPU would."""
    return "xla" if rehearsal else "auto"


def images_for(name: str, batch: int, rehearsal: bool) -> ImageDataset:
    """Returns four batches of digits, or two of 224x224 squares of photos."""
    if name in PHOTOS:
        return training_images.photos(2 * batch, 64 if rehearsal else 224)
    return training_images.repeated(4 * batch)


class Segment:
    """A compiled segment, with its state on the device."""

    def __init__(self, config: Config, dataset: ImageDataset, impl: str = "threefry2x32") -> None:
        self.batch = config.train.batch_size
        setup = Setup.of(config, dataset)
        self._inputs = mesh.replicate((dataset.train.images, dataset.train.labels))
        self._key = jax.random.key(1, impl=impl)
        with kernels.use(config.runtime.kernels, config.model.precision):
            self._state = init_state(setup, jax.random.key(0))
            shapes = self._state, *self._inputs, self._key, np.int32(1)
            start = time.perf_counter()
            self._program = train_segment.lower(setup, *shapes).compile()
            self.compile_seconds = time.perf_counter() - start
            jax.clear_caches()  # What is compiled again now comes from the cache on the disk.
            start = time.perf_counter()
            train_segment.lower(setup, *shapes).compile()
            self.warm_compile_seconds = time.perf_counter() - start
        used: Any = self._program.memory_analysis()
        outputs = used.output_size_in_bytes - used.alias_size_in_bytes
        self.bytes = used.argument_size_in_bytes + outputs + used.temp_size_in_bytes
        rows = inspection.summarize(setup.model, setup.image_shape)
        self.flops = 3 * self.batch * sum(row.flops for row in rows)
        self._steps = 2

    def seconds(self) -> float:
        """Returns the seconds of a step, from a segment that takes about `_SECONDS`."""
        start = time.perf_counter()
        state, history = self._program(self._state, *self._inputs, self._key, np.int32(self._steps))
        losses = np.asarray(history.sums.loss)[: self._steps]
        taken = (time.perf_counter() - start) / self._steps
        assert np.isfinite(losses).all(), losses
        self._state = state
        self._steps = int(np.clip(_SECONDS / taken, 2, _MOST_STEPS))
        return taken


def serve(rehearsal: bool) -> Iterator[Row]:
    """Times what a line of JSON on stdin asks for: builds it at the first time, then steps it.

    {"forget": true} drops all that was built.
    """
    built: dict[str, Segment] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("forget"):
            built.clear()
            jax.clear_caches()
            yield {}
            continue
        key = json.dumps(request)
        if key not in built:
            dataset = images_for(request["network"], request["batch"], rehearsal)
            built[key] = Segment(step_config(request, rehearsal), dataset)
            built[key].seconds()
        one = built[key]
        yield {
            "seconds": one.seconds(),
            "flops": one.flops,
            "compile_seconds": one.compile_seconds,
            "warm_compile_seconds": one.warm_compile_seconds,
            "memory_mb": one.bytes / 1e6,
        }


def machine(rehearsal: bool) -> Iterator[Row]:
    """Reports the devices, and a whitening convolution of bfloat16 against float32."""
    yield {
        "name": "devices",
        "devices": [device.device_kind for device in jax.devices()],
        "kernels": kernels.active(),
        "free_gb": capacity.free_bytes() / 1e9,
    }
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((16 if rehearsal else 1024, 32, 32, 3), np.float32))
    kernel = jnp.asarray(rng.random((2, 2, 3, 24), np.float32))

    def both(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        y, backward = jax.vjp(lambda x, k: kernels.convolve(x, k, padding="VALID"), x, kernel)
        return y, *backward(jnp.ones_like(y))

    with kernels.use("auto", "highest"):
        exact = jax.jit(both)(x, kernel)
    low = jax.jit(both)(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    errors = [
        float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        for a, b in zip(low, exact, strict=True)
    ]
    yield {
        "name": "whitening convolution, bfloat16",
        "error_over_largest": max(errors),
        "passed": max(errors) < 2**-6,
    }


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each function, timed one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-1, rounds):  # Round -1 compiles.
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}


def pools(rehearsal: bool) -> Iterator[Row]:
    """Times the gradient of max pools: ours, XLA's, and that of the kernels for a CPU."""
    shapes = {"2x2": (512, 32, 32, 64), "3x3 by 2": (256, 112, 112, 64)}
    windows = {"2x2": ((2, 2), (2, 2)), "3x3 by 2": ((3, 3), (2, 2))}
    for kind, shape in shapes.items():
        for dtype in ("float32", "bfloat16"):
            shape = (2, 16, 16, 8) if rehearsal else shape
            x = jax.random.normal(jax.random.key(0), shape, dtype)

            def gradient(x: jax.Array, pool: Callable[..., Any], kind: str = kind) -> jax.Array:
                return jax.grad(lambda x: jnp.sum(pool(x, *windows[kind]).astype(jnp.float32)))(x)

            with kernels.use("xla"):
                ours = jax.jit(partial(gradient, pool=kernels.max_pool)).lower(x).compile()
            with kernels.use("cpu"):
                of_cpu = jax.jit(partial(gradient, pool=kernels.max_pool)).lower(x).compile()
            of_xla = jax.jit(partial(gradient, pool=nn.max_pool)).lower(x).compile()
            programs = {"ours": ours, "XLA's": of_xla, "of the CPU kernels": of_cpu}
            calls = {name: partial(program, x) for name, program in programs.items()}
            found = in_turn(calls, 1 if rehearsal else 20)
            row = {f"{name}, ms": seconds * 1e3 for name, seconds in found.items()}
            yield {"name": f"max pool {kind}, {dtype}, {shape}", **row}


def steps(rehearsal: bool) -> Iterator[Row]:
    """Times a segment against a loop of steps, threefry against rbg, and the gradient's norm."""
    timed = (("quickstart", 64), ("vgg_dropout", 512))
    for name, batch in (("quickstart", 8),) if rehearsal else timed:
        request = {"network": name, "dtype": "bfloat16", "precision": "default", "batch": batch}
        config, dataset = step_config(request, rehearsal), images_for(name, batch, rehearsal)
        segment, rbg = Segment(config, dataset), Segment(config, dataset, "rbg")
        always, kernels.norm_if = kernels.norm_if, conditional_norm
        conditional = Segment(config, dataset)
        kernels.norm_if = always
        loop = step_loop(config, dataset)
        found: dict[str, list[float]] = {}
        for _ in range(1 if rehearsal else 5):
            for kind, seconds in {
                "segment, threefry": segment.seconds,
                "segment, rbg": rbg.seconds,
                "segment, conditional norm": conditional.seconds,
                "loop of steps, threefry": loop,
            }.items():
                found.setdefault(kind, []).append(seconds())
        row = {f"{kind}, ms a step": median(taken) * 1e3 for kind, taken in found.items()}
        yield {"name": f"{name}, bfloat16, batch {batch}", **row}


def conditional_norm(wanted: jax.Array, tree: Any) -> jax.Array:
    """Returns what `kernels.norm_if` does, on every device by a conditional."""
    return jax.lax.cond(wanted, optax.tree.norm, lambda _: -jnp.ones(()), tree)


def step_loop(config: Config, dataset: ImageDataset) -> Callable[[], float]:
    """Returns a function that runs a Python loop of steps and returns the seconds of one."""
    setup = Setup.of(config, dataset)
    state, key = init_state(setup, jax.random.key(0)), jax.random.key(1)
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    rng, n_steps = np.random.default_rng(0), 4

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, index: jax.Array) -> Any:
        batch = Batch(images[index], labels[index], jnp.ones(len(index)))
        step_key = jax.random.fold_in(key, state.step)
        return train_step(setup, state, batch, step_key, with_norm=False)[:2]

    def run() -> float:
        nonlocal state
        start, totals = time.perf_counter(), None
        for _ in range(n_steps):
            index = rng.integers(0, len(labels), config.train.batch_size)
            state, totals = step(state, index)
        jax.block_until_ready(totals)
        return (time.perf_counter() - start) / n_steps

    def run_traced_alike() -> float:
        with kernels.use(config.runtime.kernels):
            return run()

    run_traced_alike()
    n_steps = 4 if jax.default_backend() == "cpu" else _MOST_STEPS
    return run_traced_alike


def accuracy(
    name: str, dtype: str, first: str, end: str, parts: str, beside: str, rehearsal: bool
) -> Iterator[Row]:
    """Trains a config on CIFAR-10 from carried parts, seeds from `first` to before `end`.

    `beside` says what else is on the device meanwhile.
    """
    config = configs.get(name)
    if rehearsal:
        model = network(name, rehearsal)
        config = replace(config, model=model, train=replace(config.train, epochs=1, batch_size=16))
    images, labels, test_images, test_labels, names = read_parts(Path(parts))
    test = Split(test_images, test_labels)
    dataset = ImageDataset("cifar10", "parts", names, Split(images, labels), None, test, ())
    config = replace(
        config,
        model=replace(config.model, dtype=dtype),
        data=replace(config.data, validation=0.0),
        runtime=replace(config.runtime, kernels=_kernels(rehearsal)),
    )
    for seed in range(int(first), int(end)):
        workdir = Path(parts) / "runs" / f"{name}-{dtype}-{seed}"
        start = time.perf_counter()
        found = train(replace(config, seed=seed), dataset, workdir).summary
        yield {
            "name": f"{name}, {dtype}",
            "seed": seed,
            "beside": beside,
            "test_accuracy": found["test_accuracy"],
            "training_seconds": found["seconds"],
            "seconds_with_compilation": time.perf_counter() - start,
            "images_per_second": found["images_per_second"],
        }


def exported(folder: str, rehearsal: bool) -> Iterator[Row]:
    """Runs, here, the function that was exported on a CPU, on the photo whose result it knows."""
    del rehearsal
    from PIL import Image

    path = Path(folder)
    expected = json.loads((path / "predictor.json").read_text())["golden"]["output"]
    with Image.open(path / "golden.png") as image:
        pixels = np.asarray(image)[None]
    program = jax.export.deserialize(bytearray((path / "predictor.jax").read_bytes()))
    difference = np.abs(np.asarray(program.call(pixels))[0] - expected).max()
    yield {
        "name": f"exported on a CPU, run on {jax.devices()[0].device_kind}",
        "largest_difference_of_probabilities": float(difference),
        "passed": bool(difference < 1e-2),
    }


def main(name: str, *arguments: str) -> None:
    """Runs a part and prints its rows."""
    rehearsal = arguments[-1:] == ("--rehearsal",)
    arguments = arguments[:-1] if rehearsal else arguments
    parts: dict[str, Callable[..., Iterator[Row]]] = {
        "machine": machine,
        "serve": serve,
        "pools": pools,
        "steps": steps,
        "accuracy": accuracy,
        "exported": exported,
    }
    for row in parts[name](*arguments, rehearsal=rehearsal):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
