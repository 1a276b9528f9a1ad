"""Eight virtual devices on one CPU train as one device does, up to the order of sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_main import SMALL, command, mistake

from cnn_jax import devices

ONE = {"JAX_NUM_CPU_DEVICES": "1"}


def virtual(n: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"}


EIGHT = virtual(8)


def losses(workdir: Path) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def test_eight_devices_give_the_losses_of_one(tmp_path: Path):
    """Dropout and augmentation included: random bits do not depend on where they are used.

    The network is large enough for loops over images and for a dense layer that is divided.
    """
    large = ("--set=model.blocks=[[16,16]]", "--set=model.dense=[512]")
    run = (*SMALL, *large, "--set=model.dropout=0.5", "--set=augment.translate=1")
    assert command(*run, "--workdir=one", cwd=tmp_path, **ONE).returncode == 0
    for workdir in ("eight", "again"):
        result = command(*run, f"--workdir={workdir}", cwd=tmp_path, **EIGHT)
        assert result.returncode == 0, result.stderr
    assert (losses(tmp_path / "again") == losses(tmp_path / "eight")).all()
    one, eight = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "eight"))
    assert (one["device"]["count"], eight["device"]["count"]) == (1, 8)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=2e-5)
    np.testing.assert_allclose(eight["test_loss"], one["test_loss"], rtol=1e-4)


def test_a_checkpoint_of_one_device_is_read_by_eight(tmp_path: Path):
    assert command(*SMALL, "--workdir=run", cwd=tmp_path, **ONE).returncode == 0
    result = command("--mode=evaluate", "--workdir=run", cwd=tmp_path, **EIGHT)
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.stdout


def test_a_batch_that_cannot_be_spread_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", EIGHT["XLA_FLAGS"])
    line = mistake(*SMALL, "--set=train.batch_size=60", cwd=tmp_path)
    assert line.startswith("train.batch_size=60 can't be spread over 8 devices")


@pytest.mark.parametrize(
    ("cores", "batch_size", "count"),
    [(1, 64, 1), (2, 64, 2), (2, 33, 1), (6, 64, 4), (4, 6, 3), (128, 1024, 8), (2, 1, 1)],
)
def test_cores_become_devices_that_divide_a_batch(
    cores: int, batch_size: int, count: int, monkeypatch: pytest.MonkeyPatch
):
    wanted = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(devices, "usable_cpus", lambda: cores)
    monkeypatch.setattr(jax.config, "update", wanted.__setitem__)
    devices.use_cores(batch_size)
    assert wanted == {"jax_num_cpu_devices": count}
    for name, value in {**EIGHT, **ONE}.items():
        with monkeypatch.context() as told:
            told.setenv(name, value)
            told.setattr(devices, "usable_cpus", lambda: pytest.fail("the user has decided"))
            devices.use_cores(batch_size)


SHARES = """
import re
from cnn_jax import configs, devices, loop
from cnn_jax.config import with_overrides
from cnn_jax.data import load

blocks, batch = "model.blocks=[[16,16]]", "train.batch_size=24"
config = with_overrides(configs.get("quickstart"), [blocks, batch, "model.dense=[512]"])
trainer = loop.Trainer(config, load(config.data))
state = devices.place(trainer.init())
kernel = state.params["fc1"]["kernel"]
print(kernel.shape, kernel.sharding.shard_shape(kernel.shape))
print(state.params["head"]["kernel"].sharding.is_fully_replicated)
trainer.compile(state)
after, _ = trainer.run_segment(state, 1)
print(after.params["fc1"]["kernel"].sharding == kernel.sharding)
program = trainer.compiled.as_text()
print("f32[24,32,32,16]" in program, "f32[3,32,32,16]" in program)
summed = " ".join(re.findall(r"= (.*) all-reduce[(]", program))
print("f32[16,16]" in summed, "f32[28,16]" in summed, "f32[145,16]" in summed)
"""


def on_devices(program: str, *arguments: str, n: int = 8) -> list[str]:
    """Returns the lines that a program prints that sees n devices."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **virtual(n), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_each_device_computes_its_share_and_no_more():
    """And of a convolution, the gradients of kernel and bias are summed as one array."""
    shares = ["(4096, 512) (512, 512)", "True", "True", "False True", "False True True"]
    assert on_devices(SHARES) == shares


DENSE = """
import jax, jax.numpy as jnp
from cnn_jax import devices, layers

def check(dtype, n_images, n_in, n_out, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (n_in, n_out)).astype(jnp.bfloat16).astype(jnp.float32)
    x, dy = (
        jax.random.normal(key, shape).astype(jnp.bfloat16).astype(dtype)
        for key, shape in zip(keys[1:], [(n_images, n_in), (n_images, n_out)])
    )

    def run(x, kernel, dy):
        y, backward = jax.vjp(layers.dense, x, kernel)
        return y, *backward(dy)

    found = jax.jit(run)(x, devices.place(kernel), dy)
    with layers.portable():
        exact = run(*(a.astype(jnp.float32) for a in (x, kernel, dy)))
    for a, b, limit in zip(found, exact, (tolerance, tolerance, 1e-6)):
        assert float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) < limit
    print(*(array.sharding.shard_shape(array.shape) for array in found))

for sizes in ((16, 600, 512), (16, 600, 10), (16, 602, 512), (6, 600, 512)):
    check(jnp.bfloat16, *sizes, 2**-7)
check(jnp.float32, 16, 600, 512, 1e-6)
for dtype in (jnp.bfloat16, jnp.float32):  # Outside of a compiled function.
    print(layers.dense(jnp.ones((6, 600), dtype), jnp.ones((600, 512)))[0, 0])
"""


def test_dense_layers_are_divided_by_inputs_if_large_or_else_by_images():
    assert on_devices(DENSE) == [
        "(2, 512) (16, 75) (75, 512)",
        "(2, 10) (2, 600) (600, 10)",
        "(2, 512) (2, 602) (602, 512)",
        "(6, 512) (6, 75) (75, 512)",
        "(2, 512) (16, 75) (75, 512)",
        "600",
        "600.0",
    ]


PARTS = """
from cnn_jax import configs, layers, loop
from cnn_jax.config import with_overrides
from cnn_jax.data import load

blocks, batch, parts = "model.blocks=[[16]]", "train.batch_size=32", "train.accumulate=2"
config = with_overrides(configs.get("quickstart"), [blocks, batch, parts])
trainer = loop.Trainer(config, load(config.data))
with layers.portable():
    trainer.compile(trainer.init())
program = trainer.compiled.as_text()
print([n for n in (2, 4, 16, 32) if f"f32[{n},32,32,16]" in program])
"""


def test_parts_of_a_batch_are_spread_over_the_devices():
    """As XLA's own convolutions, of which it would else give every device all."""
    assert on_devices(PARTS) == ["[2]"]
