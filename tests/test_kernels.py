"""The kernels for a CPU against XLA's operations, forward and backward, and the switch."""

import re
import threading
from itertools import product
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import colours
from helpers.training import edit, fit, leaves, run
from jax import lax

from cnn_jax import kernels, trees
from cnn_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from cnn_jax.data import ImageDataset
from cnn_jax.kernels import bits
from cnn_jax.models.batch_norm import BatchNorm

NHWC = ("NHWC", "HWIO", "NHWC")

# LLVM takes two thirds of the time of these tests for optimizations that change no result here.
_QUICK = {"xla_backend_optimization_level": 0}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def plain_conv(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def fast_conv(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return kernels.convolve(x, kernel, None, strides, padding)


def value_and_gradients(function, *args: jax.Array) -> tuple[jax.Array, ...]:
    """The function's value, and its gradients for a cotangent that differs everywhere."""
    y = jax.eval_shape(function, *args)
    dy = normal(9, *y.shape).astype(y.dtype)

    def run(dy: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        y, backward = jax.vjp(function, *args)
        return y, *backward(dy)

    return jax.jit(run, compiler_options=_QUICK)(dy, *args)


def assert_laxs(function, plain, *args: jax.Array) -> None:
    """Compares what is traced with XLA's kernels, forward and backward, with what is of lax."""

    def program(function) -> str:
        def run(*args: jax.Array):
            y, backward = jax.vjp(function, *args)
            return y, backward(y)

        return str(jax.make_jaxpr(run)(*args))

    with kernels.use("xla"):
        assert program(function) == program(plain)


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Compares with the largest expected value: sums of large terms that cancel stay inexact."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance * np.abs(np.asarray(expected, np.float64)).max()


# The switch


def choice_of(function) -> str:
    """Returns which kernels the operations of a traced function are."""
    text = str(function)
    assert ("custom_vjp" in text) != ("reduce_window" in text)
    return "cpu" if "custom_vjp" in text else "xla"


def network(x: jax.Array) -> jax.Array:
    kernel = jnp.ones((3, 3, 16, 16))
    x = kernels.convolve(x, kernel, kernel[0, 0, 0], relu=True, pool=True)
    return kernels.max_pool(fast_conv(x, kernel, (1, 1), "SAME"))


def test_auto_is_the_platforms_kernels(monkeypatch):
    assert kernels.active() == "cpu"
    assert choice_of(jax.make_jaxpr(network)(jnp.ones((1, 8, 8, 16)))) == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernels.active() == "xla"
    with kernels.use("cpu"):
        assert kernels.active() == "cpu"


def test_the_choice_ends_with_its_block_and_blocks_nest():
    with kernels.use("xla"):
        with kernels.use("auto"):
            assert kernels.active() == "cpu"
        assert kernels.active() == "xla"
    with pytest.raises(ZeroDivisionError), kernels.use("xla"):
        _ = 1 / 0
    assert kernels.active() == "cpu"


def test_an_unknown_choice_is_refused():
    refused = pytest.raises(ValueError, match="kernels are auto, cpu or xla, not 'gpu'")
    with refused, kernels.use("gpu"):
        pass


@pytest.mark.slow
def test_training_and_evaluation_are_traced_as_the_config_says(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, matmul = set(), kernels.matmul

    def recorded(*args):
        seen.add((kernels.active(), jax.config.jax_default_matmul_precision))
        return matmul(*args)

    monkeypatch.setattr(kernels, "matmul", recorded)
    config = edit(tiny, model={"precision": "highest"}, runtime={"kernels": "xla"})
    result = fit(edit(config, train={"epochs": 1}), dataset, workdir)
    assert ("xla", "highest") in seen
    assert seen <= {("xla", "highest"), ("cpu", None)}  # Shapes are found before, for free.
    seen.clear()
    result.predictor.logits(dataset.test.images)
    jax.clear_caches()
    result.predictor.logits(dataset.test.images)
    assert seen == {("xla", "highest")}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["cpu", "xla"])
def test_on_a_cpu_the_highest_precision_gives_the_same_bits(
    tiny: Config, dataset: ImageDataset, choice: str
):
    found = []
    for precision in ("default", "highest"):
        with kernels.use(choice, precision):
            found.append(trees.sha256(run(tiny, dataset, 3)[0]))
    assert found[0] == found[1]


def test_the_choice_is_that_of_one_thread():
    seen = []
    with kernels.use("xla"):
        thread = threading.Thread(target=lambda: seen.append(kernels.active()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_xlas_kernels_are_the_functions_of_lax():
    with kernels.use("xla"):
        text = str(jax.make_jaxpr(network)(jnp.ones((1, 8, 8, 16))))
    assert choice_of(text) == "xla"
    assert "conv_general_dilated" in text
    with kernels.use("xla"):
        low, wide = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))
        dense = str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(kernels.matmul(low, k))))(wide))
    assert "while" not in dense and "scan" not in dense


@pytest.fixture
def traced() -> list[str]:
    """The kernels that were active whenever a function of the test was traced."""
    return []


def test_a_compiled_function_is_traced_for_each_choice(traced: list[str]):
    @jax.jit
    def function(x):
        traced.append(kernels.active())
        return x + len(traced)

    for choice in ("cpu", "xla", "cpu", "xla"):
        with kernels.use(choice):
            assert function(0) == ["cpu", "xla"].index(choice) + 1
    assert traced == ["cpu", "xla"]


def test_functions_inside_a_compiled_one_are_traced_for_each_choice(traced: list[str]):
    """JAX keeps the traces of what scan, checkpoint and an inner jit are given, by function."""

    def body(x, _):
        traced.append(kernels.active())
        return x, None

    inner, again = jax.jit(lambda x: body(x, None)[0]), jax.checkpoint(lambda x: body(x, None)[0])

    def function(x):
        return again(inner(lax.scan(body, x, length=2)[0]))

    for choice in ("cpu", "xla"):
        with kernels.use(choice):
            jax.eval_shape(function, 0.0)
            jax.jit(jax.grad(function))(0.0)
    assert set(traced[: len(traced) // 2]) == {"cpu"}
    assert set(traced[len(traced) // 2 :]) == {"xla"}


def test_a_function_compiled_ahead_of_time_keeps_the_choice_of_its_lowering():
    x, programs = normal(0, 1, 8, 8, 16), {}
    function = jax.jit(jax.grad(lambda x: jnp.sum(network(x))))
    for choice in ("cpu", "xla", "auto"):
        with kernels.use(choice):
            programs[choice] = function.lower(x)
    assert "convolution" in programs["xla"].as_text()
    assert "convolution" not in programs["cpu"].as_text()
    assert programs["auto"].as_text() == programs["cpu"].as_text()
    compiled = {choice: program.compile() for choice, program in programs.items()}
    with kernels.use("cpu"):
        found = compiled["xla"](x)
    with kernels.use("xla"):
        np.testing.assert_array_equal(found, function(x))
        assert_close(compiled["cpu"](x), found, 2e-6)


@pytest.mark.parametrize("choice", ["cpu", "xla"])
def test_a_norm_is_returned_where_that_is_wanted(choice: str):
    tree = {"a": jnp.array([3.0]), "b": jnp.full((2, 2), 2.0)}
    with kernels.use(choice):
        norm = jax.jit(kernels.norm_if)
        assert (norm(jnp.array(True), tree), norm(jnp.array(False), tree)) == (5.0, -1.0)


@pytest.mark.parametrize("choice", ["cpu", "xla"])
def test_a_state_is_updated_where_that_is_wanted(choice: str):
    state = {"a": jnp.arange(3.0), "key": jax.random.key(0), "b": jnp.ones(2), "none": None}

    def update(state):
        return {**state, "a": state["a"] / 0, "key": jax.random.fold_in(state["key"], 1)}

    with kernels.use(choice):
        function = jax.jit(lambda wanted, state: kernels.update_if(wanted, update, state))
        for wanted, expected in ((False, state), (True, update(state))):
            found = function(wanted, state)
            found["key"], key = map(jax.random.key_data, (found["key"], expected["key"]))
            jax.tree.map(np.testing.assert_array_equal, found, {**expected, "key": key})


# Convolutions

CASES = [
    # images, (height, width), in, kernel, out, strides, padding
    (5, (8, 8), 16, (3, 3), 24, (1, 1), "SAME"),
    (3, (7, 10), 17, (3, 3), 16, (1, 1), "SAME"),
    (2, (9, 6), 16, (3, 3), 16, (1, 1), "VALID"),
    (2, (5, 6), 16, (3, 3), 16, (1, 1), ((0, 2), (3, 1))),
    (26, (8, 8), 16, (3, 3), 16, (1, 1), "SAME"),
    (4, (32, 32), 16, (3, 3), 16, (1, 1), "SAME"),  # In several chunks.
    (3, (1, 1), 16, (3, 3), 16, (1, 1), "SAME"),
    (3, (9, 8), 3, (3, 3), 16, (1, 1), "SAME"),
    (3, (9, 8), 16, (3, 3), 10, (2, 2), "SAME"),
    (3, (8, 9), 4, (3, 3), 5, (2, 1), "VALID"),
    (3, (8, 7), 3, (2, 2), 6, (1, 1), "VALID"),
    (3, (8, 7), 3, (2, 2), 6, (2, 2), "SAME"),
    (3, (7, 7), 16, (1, 1), 16, (1, 1), "SAME"),
    (3, (7, 8), 5, (1, 1), 6, (2, 2), "VALID"),
    (3, (7, 8), 16, (1, 1), 32, (2, 2), "SAME"),
    (2, (7, 8), 16, (1, 1), 32, (3, 2), "SAME"),
    (3, (1, 1), 16, (1, 1), 16, (2, 2), "VALID"),
    (2, (11, 9), 3, (5, 4), 4, (3, 2), "SAME"),
]


@pytest.mark.parametrize(("n", "size", "n_in", "window", "n_out", "strides", "padding"), CASES)
def test_conv_and_its_gradients_equal_those_of_lax(n, size, n_in, window, n_out, strides, padding):
    arrays = normal(0, n, *size, n_in), normal(1, *window, n_in, n_out)
    fast, plain = (
        lambda x, kernel, conv=conv: conv(x, kernel, strides, padding)
        for conv in (fast_conv, plain_conv)
    )
    ours, laxs = value_and_gradients(fast, *arrays), value_and_gradients(plain, *arrays)
    for actual, expected in zip(ours, laxs, strict=True):
        assert_close(actual, expected, 2e-6)
    assert_laxs(fast, plain, *arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "n_in", "padding"),
    [
        ((8, 8), 3, "SAME"),
        ((8, 8), 16, "SAME"),
        ((32, 32), 16, "SAME"),  # Images are transposed from here on, and before it tiles.
        ((33, 36), 20, "SAME"),
        ((34, 35), 80, "VALID"),
        ((33, 33), 16, ((0, 2), (3, 1))),
    ],
)
def test_conv_of_bfloat16_is_as_exact_as_its_format(size, n_in, padding):
    x, kernel = normal(0, 6, *size, n_in), normal(1, 3, 3, n_in, 16)
    low = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    exact = [a.astype(jnp.float32) for a in low]
    ours = value_and_gradients(lambda x, k: fast_conv(x, k, (1, 1), padding), *low)
    plain = value_and_gradients(lambda x, k: plain_conv(x, k, (1, 1), padding), *exact)
    for actual, expected in zip(ours, plain, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (32, 32), (33, 36)])
def test_gradients_of_bfloat16_kernels_are_exact_where_its_numbers_are(size: tuple[int, int]):
    """Tiles are transposed, or the images that they are cut from: to the same bits."""
    x, dy = (jnp.sign(normal(seed, 3, *size, 20)) for seed in (0, 1))
    kernel = normal(2, 3, 3, 20, 20)
    exact = jax.vjp(lambda k: plain_conv(x, k, (1, 1), "SAME"), kernel)[1](dy)[0]
    low = [a.astype(jnp.bfloat16) for a in (x, dy, kernel)]

    @jax.jit
    def gradient(x, dy, kernel):
        return jax.vjp(lambda k: fast_conv(x, k, (1, 1), "SAME"), kernel)[1](dy)[0]

    np.testing.assert_array_equal(gradient(*low), exact.astype(jnp.bfloat16))


@pytest.mark.xla
def test_the_loop_moves_the_bits_of_bfloat16():
    """Or else every chunk converts all images, and time grows with the square of the batch."""
    x, kernel = normal(0, 8, 32, 32, 16), normal(1, 3, 3, 16, 16)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    compiled = jax.jit(lambda x, k: fast_conv(x, k, (1, 1), "SAME")).lower(x, kernel).compile()
    program = compiled.as_text()
    assert re.findall(r"(\w+)\[8,32,32,16\]\S* dynamic-update-slice", program) == ["u16"]
    assert "f32[8,32,32,16]" not in program


def test_a_convolution_of_another_type_is_laxs():
    x, kernel = normal(0, 2, 8, 8, 16), normal(1, 3, 3, 16, 16)
    half = [array.astype(jnp.float16) for array in (x, kernel)]
    found = kernels.convolve(*half, relu=True)
    np.testing.assert_array_equal(found, nn.relu(plain_conv(*half, (1, 1), "SAME")))
    with pytest.raises(TypeError):
        kernels.convolve(x, kernel.astype(jnp.bfloat16))


@pytest.mark.xla
def test_bias_of_bfloat16_has_a_gradient_summed_in_float32():
    """By a reduction, not by XLA's reduce-window for bfloat16, which runs on one core."""
    x, bias, dy = (normal(i, 64, 32, 32, 16).astype(jnp.bfloat16) for i in range(3))
    bias, kernel = bias[0, 0, 0], jnp.eye(16, dtype=jnp.bfloat16)[None, None]
    y, pullback = jax.vjp(lambda x, b: kernels.convolve(x, kernel, b), x, bias)
    np.testing.assert_array_equal(y, x + bias.reshape(1, 1, 1, -1))
    dx, gradient = pullback(dy)
    np.testing.assert_array_equal(dx, dy)
    assert gradient.dtype == jnp.bfloat16
    exact = np.asarray(dy, np.float64).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(np.asarray(gradient, np.float64), exact, rtol=2**-8, atol=0.01)
    program = jax.jit(pullback).lower(dy).compile().as_text()
    assert "reduce" in program and "reduce-window" not in program


def separate_layers(x, kernel, bias, relu: bool, pool: bool) -> jax.Array:
    y = plain_conv(x, kernel, (1, 1), "SAME")
    y = y if bias is None else y + bias.reshape(1, 1, 1, -1)
    y = nn.relu(y) if relu else y
    return nn.max_pool(y, (2, 2), (2, 2)) if pool else y


@pytest.mark.parametrize(("relu", "pool"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("n", "size", "n_in", "n_out"),
    [
        (5, (8, 8), 16, 24),
        (3, (7, 10), 17, 18),
        (4, (32, 32), 16, 16),  # In several chunks.
        (10, (32, 32), 3, 16),
        (3, (9, 8), 3, 10),
    ],
)
def test_conv_with_relu_and_pool_is_what_the_operations_are_one_by_one(
    n, size, n_in, n_out, relu, pool
):
    x, kernel, bias = normal(0, n, *size, n_in), normal(1, 3, 3, n_in, n_out), normal(2, n_out)
    # Of whole numbers, which both compute exactly, so that windows hold the same ties.
    whole = [jnp.round(array) for array in (x, kernel, bias)]

    def fused(*args: jax.Array) -> jax.Array:
        return kernels.convolve(*args, relu=relu, pool=pool)

    def separate(*args: jax.Array) -> jax.Array:
        return separate_layers(*args, relu, pool)

    ours, plain = value_and_gradients(fused, *whole), value_and_gradients(separate, *whole)
    np.testing.assert_array_equal(ours[0], plain[0])
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 2e-6)

    def rectified(*args: jax.Array) -> jax.Array:
        return kernels.rectify(separate_layers(*args, relu=False, pool=False))

    if not pool:
        assert_laxs(fused, rectified, *whole)
    with kernels.use("xla"):  # Whose pools and ReLU have gradients of their own.
        others = value_and_gradients(fused, *whole)
    for actual, expected in zip(others, plain, strict=True):
        assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize(
    ("size", "strides"), [((3, 3), (1, 1)), ((2, 2), (1, 1)), ((3, 3), (2, 2))]
)
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))])
def test_a_product_of_patches_is_the_convolution(size, strides, padding):
    """What a GPU computes of images in bfloat16, which have few channels."""
    x, kernel, bias = normal(0, 3, 9, 8, 3), normal(1, *size, 3, 16), normal(2, 16)
    low = [array.astype(jnp.bfloat16) for array in (x, kernel, bias)]

    def patches(*args: jax.Array) -> jax.Array:
        return kernels.convolve(*args, strides, padding)

    def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return plain_conv(x, kernel, strides, padding) + bias.reshape(1, 1, 1, -1)

    with kernels.use("xla"):
        assert "conv_general_dilated" not in str(jax.make_jaxpr(patches)(*low))
        found = value_and_gradients(patches, *low)
    exact = value_and_gradients(plain, *(array.astype(jnp.float32) for array in low))
    for actual, expected in zip(found, exact, strict=True):
        assert_close(actual.astype(jnp.float32), expected, 2**-6)


def test_few_channels_in_float32_and_many_are_left_to_xla():
    many = normal(0, 2, 8, 8, 16), normal(1, 3, 3, 16, 4)
    large = normal(0, 2, 8, 8, 3), normal(1, 7, 7, 3, 4)
    few = normal(0, 2, 8, 8, 3), normal(1, 3, 3, 3, 4)
    with kernels.use("xla"):
        for arrays in (many, large, few):
            low = [array.astype(jnp.bfloat16) for array in arrays]
            for one in (arrays, low) if arrays is not few else (arrays,):
                assert "conv_general_dilated" in str(jax.make_jaxpr(kernels.convolve)(*one))


@pytest.mark.parametrize("choice", ["cpu", "xla"])
def test_relu_is_zero_for_negative_numbers_and_so_is_its_derivative(choice: str):
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    with kernels.use(choice):
        np.testing.assert_array_equal(kernels.rectify(x), [0, 0, 0, 3])
        derivative = jax.vmap(jax.grad(kernels.rectify))
        np.testing.assert_array_equal(derivative(x), [0, 0, 0, 1])
        np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(kernels.rectify)))(x), 0)


def test_xla_reads_the_derivative_of_relu_off_its_result():
    """Else its input had to be kept as well, and cuDNN could not take ReLU into a convolution."""

    def compared(rectify) -> set[str]:
        def run(x: jax.Array, dy: jax.Array):
            y, backward = jax.vjp(rectify, x)
            return jnp.sin(y), backward(dy)

        x = jnp.ones((8, 128))
        text = jax.jit(run).lower(x, x).compile().as_text()
        return set(re.findall(r"compare\(%(max|param)", text))

    with kernels.use("xla"):
        assert compared(kernels.rectify) == {"max"}
    assert compared(nn.relu) == {"param"}


@pytest.mark.parametrize(("n_in", "pool"), [(16, True), (3, False)])
def test_conv_with_relu_and_pool_needs_no_bias(n_in: int, pool: bool):
    x, kernel = normal(0, 3, 6, 8, n_in), normal(1, 3, 3, n_in, 16)
    ours = value_and_gradients(
        lambda *args: kernels.convolve(*args, relu=True, pool=pool), x, kernel
    )
    plain = value_and_gradients(lambda *args: separate_layers(*args, None, True, pool), x, kernel)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("relu", [True, False])
def test_a_pool_follows_any_convolution(relu: bool):
    """A 2x2 kernel, pads of one's own, and strides."""
    x, kernel, bias = normal(0, 3, 9, 8, 16), normal(1, 2, 2, 16, 16), normal(2, 16)
    x, kernel, bias = (jnp.round(array) for array in (x, kernel, bias))
    pads = ((1, 0), (2, 1))
    found = kernels.convolve(x, kernel, bias, (2, 1), pads, relu=relu, pool=True)
    y = plain_conv(x, kernel, (2, 1), pads) + bias.reshape(1, 1, 1, -1)
    expected = nn.max_pool(nn.relu(y) if relu else y, (2, 2), (2, 2))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("side", [8, 33])
def test_conv_with_relu_and_pool_of_bfloat16_is_as_exact_as_its_format(side: int, pool: bool):
    arrays = normal(0, 6, side, side, 16), normal(1, 3, 3, 16, 16), normal(2, 16)
    # Whole numbers, else sums near 0 or near each other would end on other sides.
    whole = [jnp.round(array) for array in arrays]
    ours = value_and_gradients(
        lambda *args: kernels.convolve(*args, relu=True, pool=pool),
        *(array.astype(jnp.bfloat16) for array in whole),
    )
    y, backward = jax.vjp(lambda *args: separate_layers(*args, True, pool), *whole)
    dy = normal(9, *y.shape).astype(jnp.bfloat16).astype(jnp.float32)
    for actual, expected in zip(ours, (y, *backward(dy)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-6)


def test_conv_with_relu_of_bfloat16_and_few_channels_rounds_its_results_alone():
    low = [normal(0, 6, 8, 8, 3), normal(1, 3, 3, 3, 16), normal(2, 16)]
    low = [a.astype(jnp.bfloat16) for a in low]
    ours = value_and_gradients(lambda *args: kernels.convolve(*args, relu=True), *low)
    exact = [a.astype(jnp.float32) for a in low]
    y, backward = jax.vjp(lambda *args: separate_layers(*args, True, False), *exact)
    dy = normal(9, *y.shape).astype(jnp.bfloat16).astype(jnp.float32)
    for actual, expected in zip(ours, (y, *backward(dy)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-7)


@pytest.mark.slow
@pytest.mark.xla
@pytest.mark.parametrize(("side", "n_transposed"), [(32, 4), (30, 16)])
def test_the_loops_with_relu_and_pool_move_the_bits_of_bfloat16_and_multiply_what_is_needed(
    side: int, n_transposed: int
):
    x, kernel, bias = normal(0, 8, side, side, 16), normal(1, 3, 3, 16, 16), normal(2, 16)
    x, kernel, bias = (array.astype(jnp.bfloat16) for array in (x, kernel, bias))

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(kernels.convolve(*args, relu=True, pool=True).astype(jnp.float32))

    def program(argnums: int | tuple[int, ...]) -> str:
        return jax.jit(jax.grad(loss, argnums)).lower(x, kernel, bias).compile().as_text()

    both = program((0, 1, 2))
    shapes = [f"8,{n},{n},16" for n in (side, side // 2)]
    assert re.findall(rf"(\w+)\[{shapes[0]}\]\S* dynamic-update-slice", both) == ["u16"]
    assert not any(f"f32[{shape}]" in both for shape in shapes)
    assert len(re.findall(r" dot\(", both)) == 3 * 16 + n_transposed
    # The loop leaves out what nobody reads.
    for alone, n in ((0, 2 * 16), (1, 2 * 16 + n_transposed)):
        assert len(re.findall(r" dot\(", program(alone))) == n


@pytest.mark.parametrize(("n_in", "n_out", "strides"), [(24, 96, (1, 1)), (96, 24, (2, 2))])
def test_1x1_conv_of_bfloat16_rounds_its_results_alone(n_in: int, n_out: int, strides):
    x, kernel = normal(0, 3, 9, 10, n_in), normal(1, 1, 1, n_in, n_out)
    low = [array.astype(jnp.bfloat16) for array in (x, kernel)]
    ours = value_and_gradients(lambda *args: fast_conv(*args, strides, "SAME"), *low)
    exact = [array.astype(jnp.float32) for array in low]
    y, backward = jax.vjp(lambda *args: plain_conv(*args, strides, "SAME"), *exact)
    dy = normal(9, *y.shape).astype(jnp.bfloat16).astype(jnp.float32)
    for actual, expected in zip(ours, (y, *backward(dy)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-8)


# Depthwise convolutions


def plain_depthwise(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        feature_group_count=x.shape[-1],
    )


DEPTHWISE = list(
    product(
        [(8, 8), (7, 10)],
        [((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 1)), ((5, 5), (2, 2)), ((2, 3), (1, 2))],
        ["SAME", "VALID", ((1, 0), (2, 1))],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "window", "padding"), DEPTHWISE)
def test_depthwise_convolutions_and_their_gradients_equal_those_of_lax(size, window, padding):
    shape, strides = window
    x, kernel = normal(0, 4, *size, 18), normal(1, *shape, 1, 18)
    ours, plain = (
        lambda x, kernel, conv=conv: conv(x, kernel, strides, padding)
        for conv in (kernels.convolve_depthwise, plain_depthwise)
    )
    exact = value_and_gradients(plain, x, kernel)
    for actual, expected in zip(value_and_gradients(ours, x, kernel), exact, strict=True):
        assert_close(actual, expected, 2e-6)
    low = [array.astype(jnp.bfloat16) for array in (x, kernel)]
    y, backward = jax.vjp(plain, *[array.astype(jnp.float32) for array in low])
    dy = normal(9, *y.shape).astype(jnp.bfloat16).astype(jnp.float32)
    for actual, expected in zip(value_and_gradients(ours, *low), (y, *backward(dy)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-7)
    assert_laxs(ours, plain, x, kernel)


# Batch normalization


def value_and_all_gradients(norm: BatchNorm, variables, x: jax.Array, dy: jax.Array, train: bool):
    """The norm's value, new statistics, and gradients, for a cotangent that differs everywhere."""

    def apply(params, x):
        return norm.apply({**variables, "params": params}, x, not train, mutable=["batch_stats"])

    def run(params, x):
        y, backward, statistics = jax.vjp(apply, params, x, has_aux=True)
        return y, statistics, backward(dy.astype(y.dtype))

    return jax.jit(run, compiler_options=_QUICK)(variables["params"], x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "gelu"])
@pytest.mark.parametrize("shape", [(6, 9, 7, 20), (8, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_and_its_gradients_equal_those_of_linen(dtype, shape, activation, train: bool):
    norm = BatchNorm(momentum=0.75, activation=activation, dtype=dtype)
    x, dy = 3 * normal(0, *shape) + 1, normal(1, *shape)
    variables = norm.init(jax.random.key(0), x, False)
    variables = jax.tree.map(lambda leaf: 2 + normal(2, *leaf.shape), variables)
    variables["batch_stats"]["var"] = jnp.abs(variables["batch_stats"]["var"])
    low, dy = (array.astype(dtype).astype(jnp.float32) for array in (x, dy))
    ours = value_and_all_gradients(norm, variables, low.astype(dtype), dy, train)
    exact = BatchNorm(momentum=0.75, activation=activation)
    with kernels.use("xla"):
        expected = value_and_all_gradients(exact, variables, low, dy, train)
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for actual, plain in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_close(actual.astype(jnp.float32), plain, tolerance)
    assert ours[0].dtype == dtype
    if train:
        assert (ours[1]["batch_stats"]["mean"] != variables["batch_stats"]["mean"]).all()


def test_batch_norm_without_scale_or_bias_has_no_such_parameters():
    norm, x = BatchNorm(use_scale=False), normal(0, 8, 4, 4, 5)
    variables = norm.init(jax.random.key(0), x, False)
    assert list(variables["params"]) == ["bias"]
    y, _ = norm.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)


# Max pools

POOLS = list(
    product(
        [(8, 8), (7, 10)],
        [((2, 2), (2, 2)), ((2, 3), (2, 3)), ((3, 3), (2, 2)), ((2, 3), (1, 2)), ((2, 2), (3, 3))],
        ["VALID", "SAME", ((1, 0), (0, 1))],
    )
)


@pytest.mark.parametrize(("size", "window", "padding"), POOLS)
def test_pool_and_its_gradient_equal_those_of_linen(size, window, padding):
    shape, strides = window
    # Few distinct values: most windows hold ties, so the choice among equals is compared as well.
    x = jnp.round(normal(0, 3, *size, 5))
    ours, plain = (
        lambda x, pool=pool: pool(x, shape, strides, padding)
        for pool in (kernels.max_pool, nn.max_pool)
    )
    expected, gradient = value_and_gradients(plain, x)
    for choice in ("cpu", "xla"):
        with kernels.use(choice):
            y, dx = value_and_gradients(ours, x)
        np.testing.assert_array_equal(y, expected)
        assert_close(dx, gradient, 1e-6)


@pytest.mark.slow
def test_pool_of_xla_is_one_operation_without_a_gradient_and_has_forward_derivatives():
    """So it can be exported, and differentiated in both directions."""
    x, dx = normal(0, 2, 5, 6, 3), normal(1, 2, 5, 6, 3)

    def pool(x: jax.Array) -> jax.Array:
        return kernels.max_pool(x, (3, 3), (2, 2), "SAME")

    with kernels.use("xla"):
        assert "reduce_window" in str(jax.make_jaxpr(pool)(x))
        _, moved = jax.jvp(pool, (x,), (dx,))
        y, backward = jax.vjp(pool, x)
        np.testing.assert_allclose(jnp.vdot(moved, y), jnp.vdot(dx, *backward(y)), rtol=1e-5)
        twice = jax.jvp(jax.grad(lambda x: jnp.sum(pool(x) ** 2)), (x,), (dx,))[1]
    np.testing.assert_allclose(twice, 2 * backward(moved)[0], rtol=1e-5)


@pytest.mark.parametrize("choice", ["cpu", "xla"])
@pytest.mark.parametrize("strides", [(2, 2), (1, 1)])
def test_pool_of_bfloat16_has_the_gradient_of_float32(strides, choice: str):
    x = jnp.round(normal(0, 3, 6, 7, 5))
    exact = value_and_gradients(lambda x: kernels.max_pool(x, (2, 2), strides), x)
    with kernels.use(choice):
        ours = value_and_gradients(
            lambda x: kernels.max_pool(x, (2, 2), strides), x.astype(jnp.bfloat16)
        )
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-7)


@pytest.mark.parametrize("choice", ["cpu", "xla"])
def test_pool_gives_a_tie_to_the_first_in_row_major_order(choice: str):
    image = jnp.array([[1.0, 3.0, 5.0, 5.0], [3.0, 3.0, 5.0, 5.0]]).reshape(1, 2, 4, 1)
    with kernels.use(choice):
        gradient = jax.grad(lambda x: jnp.sum(kernels.max_pool(x)))(image)
    assert gradient.reshape(2, 4).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_pool_keeps_the_type_and_passes_nan_on():
    x = normal(0, 1, 4, 4, 1).at[0, 3, 0, 0].set(jnp.nan).astype(jnp.bfloat16)
    ours = value_and_gradients(kernels.max_pool, x)
    plain = nn.max_pool(x, (2, 2), (2, 2))
    assert {array.dtype for array in ours} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(ours[0], np.float32), np.asarray(plain, np.float32))


# Dense products


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (6, 80), (6, 1100)])
def test_dense_products_of_bfloat16_have_the_gradients_of_float32(shape: tuple[int, ...]):
    """That of the kernel is not even rounded."""
    x, kernel = normal(0, *shape).astype(jnp.bfloat16), normal(1, shape[-1], 4)
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    y, dx, dkernel = value_and_gradients(kernels.matmul, x, kernel)
    expected = value_and_gradients(jnp.matmul, x.astype(jnp.float32), kernel)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for actual, exact in zip((y, dx, dkernel), expected, strict=True):
        assert_close(actual.astype(jnp.float32), exact, 2**-7)
    dy = jax.grad(lambda y: jnp.sum(jnp.sin(y)))(y)
    exact = jax.vjp(jnp.matmul, x.astype(jnp.float32), kernel)[1](dy.astype(jnp.float32))[1]
    found = jax.vjp(kernels.matmul, x, kernel)[1](dy)[1]
    assert_close(found, exact, 1e-6)


@pytest.mark.xla
def test_no_dense_kernel_is_rounded_in_one_piece():
    x, kernel = normal(0, 8, 1024).astype(jnp.bfloat16), normal(1, 1024, 96)
    step = jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.sin(kernels.matmul(x, k))), (0, 1)))
    program = step.lower(kernel, x).compile().as_text()
    assert re.search(r"(bf16|u16)\[512,96\]", program)
    assert not re.search(r"(bf16|u16)\[1024,96\]", program)


# The bits of bfloat16


def test_bits_become_bfloat16_and_float32_as_by_a_conversion():
    every = lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    wide = np.asarray(jax.jit(bits.widen)(every))
    np.testing.assert_array_equal(wide, np.asarray(every).astype(np.float32))
    # The numbers themselves, and what lies a little above, halfway to the next, and a little below.
    words = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) + np.uint32([0, 1, 2**15, 2**16 - 1])
    exact = words.view(np.float32)
    rounded = jax.jit(bits.round_to, static_argnums=1)(exact, jnp.bfloat16)
    with np.errstate(invalid="ignore"):
        expected = exact.astype(jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(rounded), np.float32(expected))
    assert (np.signbit(rounded) == np.signbit(expected))[~np.isnan(exact)].all()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 160])
def test_products_with_the_identity_transpose_every_bit(columns: int):
    x = normal(0, 50, columns).astype(jnp.bfloat16)
    found = jax.jit(bits.transpose)(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), x.T.astype(jnp.float32))


# Derivatives in loops, of derivatives, and of mapped functions


def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
    y = kernels.convolve(x, kernel, kernel[0, 0, 0], relu=True, pool=True)
    return jnp.sum(kernels.max_pool(fast_conv(y, kernel, (1, 1), "SAME")) ** 2)


@pytest.mark.slow
def test_gradients_inside_scan_are_those_outside():
    kernel, batches = normal(0, 3, 3, 16, 16), normal(1, 3, 2, 8, 8, 16)
    _, scanned = jax.jit(lambda k, xs: lax.scan(lambda k, x: (k, jax.grad(loss)(k, x)), k, xs))(
        kernel, batches
    )
    for x, gradient in zip(batches, scanned, strict=True):
        assert_close(gradient, jax.jit(jax.grad(loss))(kernel, x), 1e-6)


@pytest.mark.slow
def test_second_derivatives_of_float32_are_those_of_lax():
    kernel, x, direction = normal(0, 3, 3, 16, 16), normal(1, 2, 8, 8, 16), normal(2, 3, 3, 16, 16)

    def curvature(kernel: jax.Array) -> jax.Array:
        return jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k, x), direction))(kernel)

    found = jax.jit(curvature)(kernel)
    with kernels.use("xla"):
        expected = jax.jit(curvature)(kernel)
        hessian = jax.jvp(jax.grad(loss), (kernel, x), (direction, jnp.zeros_like(x)))[1]
    assert_close(found, expected, 5e-6)
    assert_close(hessian, expected, 5e-6)


def test_forward_mode_is_left_to_xlas_kernels():
    kernel, x = normal(0, 3, 3, 16, 16), normal(1, 2, 8, 8, 16)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (kernel, x), (kernel, x))


@pytest.mark.slow
def test_gradients_under_vmap_are_those_of_each():
    stacked, batches = normal(0, 3, 3, 3, 16, 16), normal(1, 3, 2, 8, 8, 16)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(stacked, batches)
    for gradient, kernel, x in zip(mapped, stacked, batches, strict=True):
        assert_close(gradient, jax.jit(jax.grad(loss))(kernel, x), 1e-6)


def test_the_same_inputs_give_the_same_bits():
    kernel, x = normal(0, 3, 3, 32, 32), normal(1, 8, 32, 32, 32)
    gradient = jax.jit(jax.grad(loss))
    first = gradient(kernel, x)
    for _ in range(3):
        np.testing.assert_array_equal(gradient(kernel, x), first)


# Training

FAMILIES = [
    pytest.param(ModelConfig(name="simple_cnn", blocks=((16, 16),), dense=(16,), dropout=0.25)),
    pytest.param(
        ModelConfig(name="vgg", blocks=((16, 16), (16,)), dense=(16,), dropout=0.25),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ModelConfig(name="airbench", blocks=((16, 16),), dense=(), activation="gelu"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ModelConfig(name="resnet_small", blocks=((16,), (32,)), dense=()), marks=pytest.mark.slow
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.name)
def test_a_network_trains_with_either_kernels(model: ModelConfig):
    """To the same losses and parameters, over 20 steps in which the loss falls by 40% or more.

    Measured: losses differ by 5e-7 at most, parameters by 6e-7 of the largest of their array.
    """
    config = Config(
        name="either",
        model=model,
        train=TrainConfig(epochs=7, batch_size=8),
        optim=OptimConfig(learning_rate=0.05),
    )
    found = {}
    for choice in ("cpu", "xla"):
        with kernels.use(choice):
            state, losses = run(config, colours(22, 9, 10), 20)
        found[choice] = losses, leaves({"params": state.params, "statistics": state.batch_stats})
    (losses, ours), (expected, laxs) = found.values()
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)
    for name, array in laxs.items():
        assert_close(ours[name], array, 5e-6)
    assert any((ours[name] != array).any() for name, array in laxs.items())
