"""What only a GPU can show: CNN_JAX_GPU=1 pytest -m gpu -n 0 tests/test_gpu.py."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import colours
from helpers.training import edit, fit, initial, keys, leaves, run

from cnn_jax import capacity, configs, kernels, trees
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.fit import compile_segment
from cnn_jax.step import Setup

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> jax.Device:
    return jax.devices("gpu")[0]


def test_its_kernels_are_xlas(gpu: jax.Device):
    assert kernels.active() == "xla"
    assert gpu.memory_stats()["bytes_limit"] >= capacity.free_bytes() > 10**9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "strides"), [((2, 2), (2, 2)), ((3, 3), (2, 2))])
def test_the_gradient_of_a_pool_is_that_of_a_cpu(dtype: str, window, strides):
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (8, 16, 16, 8)), dtype)

    def gradient(x: jax.Array, pool=kernels.max_pool) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(pool(x, window, strides)))(x)

    found = np.asarray(jax.jit(gradient)(x))
    with jax.default_device(jax.devices("cpu")[0]):
        expected = np.asarray(jax.jit(lambda x: gradient(x, nn.max_pool))(np.asarray(x)))
    np.testing.assert_array_equal(found, expected)


def test_a_whitening_convolution_of_bfloat16_is_that_of_float32():
    """2x2, from 3 channels to 24: the shape at which cuDNN has had faults."""
    rng = np.random.default_rng(0)
    x, kernel = rng.random((64, 32, 32, 3), np.float32), rng.random((2, 2, 3, 24), np.float32)
    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)

    def run(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        y, backward = jax.vjp(lambda x, k: kernels.convolve(x, k, padding="VALID"), x, kernel)
        return y, *backward(jnp.ones_like(y))

    low = jax.jit(run)(x, kernel)
    with kernels.use("xla", "highest"):
        exact = jax.jit(run)(x.astype(jnp.float32), kernel.astype(jnp.float32))
    for found, expected in zip(low, exact, strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float32), expected, rtol=0, atol=2**-7 * scale
        )


def test_training_gives_the_losses_of_a_cpu(tiny: Config):
    dataset = colours(22, 9, 10)
    with kernels.use("xla", "highest"):
        on_gpu = run(tiny, dataset, 4)
        with jax.default_device(jax.devices("cpu")[0]):
            on_cpu = run(tiny, dataset, 4)
    np.testing.assert_allclose(on_gpu[1], on_cpu[1], rtol=1e-4)
    for name, array in leaves(on_cpu[0].params).items():
        np.testing.assert_allclose(leaves(on_gpu[0].params)[name], array, rtol=0, atol=1e-4)


def test_blocks_that_are_computed_again_take_less_memory(monkeypatch: pytest.MonkeyPatch):
    config = edit(configs.get("resnet_small"), train={"batch_size": 128})
    dataset, used = colours(128, 9, 10, 32), []
    monkeypatch.setattr(
        capacity,
        "check_program",
        lambda program, _: used.append(program.memory_analysis().temp_size_in_bytes),
    )
    for remat in (False, True):
        one = edit(config, train={"remat": remat})
        setup, state = Setup.of(one, dataset), initial(one, dataset)
        compile_segment(one, setup, dataset, state, keys(one)[1])
    assert used[1] < 0.8 * used[0]


def test_what_does_not_fit_is_refused_in_one_line(tiny: Config, workdir: Path):
    huge = edit(tiny, model={"dense": (10**9,)})
    with pytest.raises(UserError, match=r"of memory .* are free; lower .*train\.remat"):
        fit(huge, colours(22, 9, 10), workdir)


def test_a_run_is_repeated_bit_for_bit_in_one_process(tiny: Config):
    dataset = colours(22, 9, 10)
    assert trees.sha256(run(tiny, dataset, 4)[0]) == trees.sha256(run(tiny, dataset, 4)[0])
