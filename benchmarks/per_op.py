"""Prints where a training step's time goes on this machine, by layer, pass and operation.

python benchmarks/per_op.py --config=vgg3 [--batch_size=128] [--dtype=float32]

Profiles steps of the compiled segment with jax.profiler. Times are those that XLA's CPU threads
spend inside an operation, without what it calls; operations of one layer that XLA runs at the same
time add up, so the total is thread time, to be compared with the step's time by the number of
cores. What no row names, threads spent waiting for each other. A max pool that runs in the loop of
the convolution before it counts as that convolution's.
"""

import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

HERE = Path(__file__).resolve().parent

_CONFIG = flags.DEFINE_string("config", "vgg3", "The config to profile.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images of a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the arithmetic.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps profiled.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 30, "Rows printed; the rest is summed up.", lower_bound=1)


def sources(hlo: str) -> dict[str, str]:
    """Returns what each instruction of a compiled program was traced from, by its name."""
    pattern = r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"'
    return dict(re.findall(pattern, hlo, re.MULTILINE))


def describe(op_name: str, layers: list[str]) -> str:
    """Returns "pass layer operation" of an instruction's op_name, as far as it tells."""
    direction = "backward" if "transpose(" in op_name else "forward"
    layer = next((layer for layer in layers if f"/{layer}/" in op_name), None)
    operation = op_name.rsplit("/", 1)[-1]
    return f"{direction:9} {layer} {operation}" if layer else f"{'':9} - {operation}"


def self_times(trace: Any) -> Counter[str]:
    """Returns nanoseconds by instruction, of all XLA's threads, without those of what it calls."""
    times: Counter[str] = Counter()
    lines = [line for plane in trace.planes for line in plane.lines]
    for line in lines:
        if not line.name.startswith("tf_XLA"):
            continue
        running: list[tuple[float, str]] = []
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            while running and running[-1][0] <= event.start_ns:
                running.pop()
            if running:
                times[running[-1][1]] -= event.duration_ns
            times[event.name] += event.duration_ns
            running.append((event.start_ns + event.duration_ns, event.name))
    return times


def main(_: list[str]) -> None:
    """Profiles and prints."""
    import jax
    import numpy as np
    import training_images

    from cnn_jax import configs, mesh
    from cnn_jax.kernels import cores
    from cnn_jax.models import inspection
    from cnn_jax.step import Setup, init_state, train_segment

    cores.use_cores(_BATCH_SIZE.value)
    config = configs.get(_CONFIG.value)
    config = replace(
        config,
        train=replace(config.train, batch_size=_BATCH_SIZE.value),
        model=replace(config.model, dtype=_DTYPE.value),
        runtime=replace(config.runtime, segment_steps=_STEPS.value),
    )
    dataset = training_images.repeated(_BATCH_SIZE.value * _STEPS.value)
    setup = Setup.of(config, dataset)
    state = init_state(setup, jax.random.key(0))
    data = dataset.train.images, dataset.train.labels, jax.random.key(1), np.int32(_STEPS.value)
    inputs = tuple(map(mesh.replicate, data))
    compiled = train_segment.lower(setup, state, *inputs).compile()
    state, _ = compiled(state, *inputs)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(compiled(state, *inputs))
            step_ms = (time.perf_counter() - start) / _STEPS.value * 1e3
        (path,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
    hlo = compiled.as_text()
    assert hlo
    found = sources(hlo)
    layers = [row.name for row in inspection.summarize(setup.model, (32, 32, 3))]
    totals: Counter[str] = Counter()
    for name, nanoseconds in self_times(trace).items():
        if name in found:
            totals[describe(found[name], layers)] += nanoseconds
    whole = sum(totals.values())
    print(f"{config.name}, batch {_BATCH_SIZE.value}, {_DTYPE.value}: {step_ms:.0f} ms a step")
    cores = cores.usable_cpus()
    print(f"{whole / _STEPS.value / 1e6:.0f} ms of thread time on {cores} cores, of which")
    print("| pass, layer, operation | ms a step | share |\n|---|---|---|")
    rows: list[tuple[str, float]] = [*totals.most_common(_ROWS.value)]
    rows.append(("the rest", whole - sum(nanoseconds for _, nanoseconds in rows)))
    for name, nanoseconds in rows:
        print(f"| {name} | {nanoseconds / _STEPS.value / 1e6:.1f} | {nanoseconds / whole:.1%} |")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
