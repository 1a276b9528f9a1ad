"""Eight virtual devices on one CPU train as one device does, up to the order of sums."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli import ONE_DEVICE, SMALL, command, on_devices, refuse, virtual_devices
from helpers.results import losses

from cnn_jax import configs, fields, kernels, mesh
from cnn_jax.config import Config
from cnn_jax.data import load
from cnn_jax.kernels import cores
from cnn_jax.step import Setup, init_state, train_segment

EIGHT = virtual_devices(8)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path: Path):
    """Dropout and augmentation included: random bits do not depend on where they are used.

    The network is large enough for loops over images and for a dense layer that is divided.
    """
    large = ("--model.blocks=[[16,16]]", "--model.dense=[512]")
    run = (*SMALL, *large, "--model.dropout=0.5", "--augment.translate=1")
    assert command(*run, "--workdir=one", cwd=tmp_path, **ONE_DEVICE).returncode == 0
    for workdir in ("eight", "again"):
        result = command(*run, f"--workdir={workdir}", cwd=tmp_path, **EIGHT)
        assert result.returncode == 0, result.stderr
    assert (losses(tmp_path / "again") == losses(tmp_path / "eight")).all()
    one, eight = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "eight"))
    assert (one["device"]["count"], eight["device"]["count"]) == (1, 8)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=2e-5)
    np.testing.assert_allclose(eight["test_loss"], one["test_loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_one_device_is_read_by_eight(tmp_path: Path):
    assert command(*SMALL, "--workdir=run", cwd=tmp_path, **ONE_DEVICE).returncode == 0
    result = command("--mode=evaluate", "--workdir=run", cwd=tmp_path, **EIGHT)
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.stdout


def test_a_batch_that_cannot_be_divided_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", EIGHT["XLA_FLAGS"])
    line = refuse(*SMALL, "--train.batch_size=60", cwd=tmp_path)
    assert line.startswith("train.batch_size=60 can't be divided among 8 devices")


@pytest.mark.parametrize(
    ("n_cores", "batch_size", "count"),
    [(1, 64, 1), (2, 64, 2), (2, 33, 1), (6, 64, 4), (4, 6, 3), (128, 1024, 8), (2, 1, 1)],
)
def test_cores_become_devices_that_divide_a_batch(
    n_cores: int, batch_size: int, count: int, monkeypatch: pytest.MonkeyPatch
):
    wanted = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(cores, "usable_cpus", lambda: n_cores)
    monkeypatch.setattr(jax.config, "update", wanted.__setitem__)
    cores.use_cores(batch_size)
    assert wanted == {"jax_num_cpu_devices": count}
    for name, value in {**EIGHT, **ONE_DEVICE}.items():
        with monkeypatch.context() as told:
            told.setenv(name, value)
            told.setattr(cores, "usable_cpus", lambda: pytest.fail("the user has decided"))
            cores.use_cores(batch_size)


def compiled(**values: str):
    """Returns the compiled segment of the quickstart with fields changed, and a state for it."""
    config: Config = fields.with_values(configs.get("quickstart"), values)
    dataset = load(config.data)
    setup = Setup.of(config, dataset)
    state = mesh.place(init_state(setup, jax.random.key(0)))
    data = dataset.train.images, dataset.train.labels, jax.random.key(1), np.int32(1)
    inputs = [mesh.replicate(array) for array in data]
    return train_segment.lower(setup, state, *inputs).compile(), state, inputs


def shares() -> None:
    values = {"model.blocks": "[[16,16]]", "train.batch_size": "24", "model.dense": "[512]"}
    program, state, inputs = compiled(**values)
    kernel = state.params["fc1"]["kernel"]
    print(kernel.shape, kernel.sharding.shard_shape(kernel.shape))
    print(state.params["head"]["kernel"].sharding.is_fully_replicated)
    sharding = kernel.sharding
    after, _ = program(state, *inputs)
    print(after.params["fc1"]["kernel"].sharding == sharding)
    text = program.as_text()
    print("f32[24,32,32,16]" in text, "f32[3,32,32,16]" in text)
    summed = " ".join(re.findall(r"= (.*) all-reduce[(]", text))
    print("f32[16,16]" in summed, "f32[28,16]" in summed, "f32[145,16]" in summed)


@pytest.mark.slow
@pytest.mark.xla
def test_each_device_computes_its_share_and_no_more():
    """And of a convolution, the gradients of kernel and bias are summed as one array."""
    lines = ["(4096, 512) (512, 512)", "True", "True", "False True", "False True True"]
    assert on_devices(shares) == lines


def dense() -> None:
    def check(dtype, n_images, n_in, n_out, tolerance):
        keys = jax.random.split(jax.random.key(0), 3)
        kernel = jax.random.normal(keys[0], (n_in, n_out)).astype(jnp.bfloat16).astype(jnp.float32)
        x, dy = (
            jax.random.normal(key, shape).astype(jnp.bfloat16).astype(dtype)
            for key, shape in zip(keys[1:], [(n_images, n_in), (n_images, n_out)], strict=True)
        )

        def run(x, kernel, dy):
            y, backward = jax.vjp(kernels.matmul, x, kernel)
            return y, *backward(dy)

        found = jax.jit(run)(x, mesh.place(kernel), dy)
        with kernels.use("xla"):
            exact = run(*(a.astype(jnp.float32) for a in (x, kernel, dy)))
        for a, b, limit in zip(found, exact, (tolerance, tolerance, 1e-6), strict=True):
            assert float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) < limit
        print(*(array.sharding.shard_shape(array.shape) for array in found))

    for sizes in ((16, 600, 512), (16, 600, 10), (16, 602, 512), (6, 600, 512)):
        check(jnp.bfloat16, *sizes, 2**-7)
    check(jnp.float32, 16, 600, 512, 1e-6)
    for dtype in (jnp.bfloat16, jnp.float32):  # Outside of a compiled function.
        print(kernels.matmul(jnp.ones((6, 600), dtype), jnp.ones((600, 512)))[0, 0])


@pytest.mark.slow
def test_dense_layers_are_divided_by_inputs_if_large_or_else_by_images():
    assert on_devices(dense) == [
        "(2, 512) (16, 75) (75, 512)",
        "(2, 10) (2, 600) (600, 10)",
        "(2, 512) (2, 602) (602, 512)",
        "(6, 512) (6, 75) (75, 512)",
        "(2, 512) (16, 75) (75, 512)",
        "600",
        "600.0",
    ]


def parts() -> None:
    values = {"model.blocks": "[[16]]", "train.batch_size": "32", "train.accumulate": "2"}
    with kernels.use("xla"):
        text = compiled(**values)[0].as_text()
    print([n for n in (2, 4, 16, 32) if f"f32[{n},32,32,16]" in text])


@pytest.mark.slow
@pytest.mark.xla
def test_parts_of_a_batch_are_spread_over_the_devices():
    """As XLA's own convolutions, of which it would else give every device all."""
    assert on_devices(parts) == ["[2]"]
