"""Layers of our own against lax, forward and backward; each runs where XLA's own does."""

import re
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax import cpu_kernels, layers

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def plain_conv(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def fast_conv(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return layers.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def value_and_gradients(function, *args: jax.Array) -> tuple[jax.Array, ...]:
    """The function's value, and its gradients for a cotangent that differs everywhere."""
    y = jax.eval_shape(function, *args)
    dy = normal(9, *y.shape).astype(y.dtype)

    def run(dy: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        y, backward = jax.vjp(function, *args)
        return y, *backward(dy)

    return jax.jit(run)(dy, *args)


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Compares with the largest expected value: sums of large terms that cancel stay inexact."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance * np.abs(np.asarray(expected, np.float64)).max()


CASES = [
    # images, (height, width), in, kernel, out, strides, padding
    (5, (8, 8), 16, (3, 3), 24, (1, 1), "SAME"),
    (3, (7, 10), 17, (3, 3), 16, (1, 1), "SAME"),
    (2, (9, 6), 16, (3, 3), 16, (1, 1), "VALID"),
    (2, (5, 6), 16, (3, 3), 16, (1, 1), ((0, 2), (3, 1))),
    (26, (8, 8), 16, (3, 3), 16, (1, 1), "SAME"),
    (4, (32, 32), 16, (3, 3), 16, (1, 1), "SAME"),  # In two turns.
    (3, (1, 1), 16, (3, 3), 16, (1, 1), "SAME"),
    (3, (9, 8), 3, (3, 3), 16, (1, 1), "SAME"),
    (3, (9, 8), 16, (3, 3), 10, (2, 2), "SAME"),
    (3, (8, 9), 4, (3, 3), 5, (2, 1), "VALID"),
    (3, (8, 7), 3, (2, 2), 6, (1, 1), "VALID"),
    (3, (8, 7), 3, (2, 2), 6, (2, 2), "SAME"),
    (3, (7, 7), 16, (1, 1), 16, (1, 1), "SAME"),
    (3, (7, 8), 5, (1, 1), 6, (2, 2), "VALID"),
    (2, (11, 9), 3, (5, 4), 4, (3, 2), "SAME"),
]


@pytest.mark.parametrize(("n", "size", "n_in", "window", "n_out", "strides", "padding"), CASES)
def test_conv_and_its_gradients_equal_those_of_lax(n, size, n_in, window, n_out, strides, padding):
    x, kernel = normal(0, n, *size, n_in), normal(1, *window, n_in, n_out)
    ours = value_and_gradients(lambda x, k: fast_conv(x, k, strides, padding), x, kernel)
    plain = value_and_gradients(lambda x, k: plain_conv(x, k, strides, padding), x, kernel)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 2e-6)


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


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_tiles_of_transposed_images_are_transposed_tiles(size: tuple[int, int]):
    x, pads = normal(0, 3, *size, 20).astype(jnp.bfloat16), ((1, 1), (1, 1))
    tiles = jax.jit(lambda x: cpu_kernels._input_tiles(x, pads, size))(x)
    found = jax.jit(lambda x: cpu_kernels._transposed_tiles(x, pads, size))(x)
    rows, columns = tiles[0][0].shape[1:3]
    image, row, column = np.ogrid[:3, :rows, :columns]
    pixel = (image * (rows + 1) + row) * (columns + 1) + column
    assert pixel.max() == found[0][0].shape[1] - 1
    for i, j in product(range(4), range(4)):
        tile = np.moveaxis(np.asarray(found[i][j], np.float32)[:, pixel], 0, -1)
        np.testing.assert_array_equal(tile, np.float32(tiles[i][j]))


def test_the_loop_moves_the_bits_of_bfloat16():
    """Or else every turn converts all images, and time grows with the square of the batch."""
    x, kernel = normal(0, 8, 32, 32, 16), normal(1, 3, 3, 16, 16)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    compiled = jax.jit(lambda x, k: fast_conv(x, k, (1, 1), "SAME")).lower(x, kernel).compile()
    program = compiled.as_text()
    assert re.findall(r"(\w+)\[8,32,32,16\]\S* dynamic-update-slice", program) == ["u16"]
    assert "f32[8,32,32,16]" not in program


@pytest.mark.parametrize(
    "changed",
    [
        {"feature_group_count": 2, "groups": 2},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
        {"dimension_numbers": ("NHWC", "OHWI", "NHWC")},
        {"dimension_numbers": None},
    ],
)
def test_other_convolutions_are_those_of_lax(changed):
    kwargs = {"dimension_numbers": NHWC, "padding": "SAME", **changed}
    padding = kwargs.pop("padding")
    groups = kwargs.pop("groups", 1)
    x, kernel = normal(0, 2, 16, 16, 16), normal(1, 3, 3, 16 // groups, 16)
    if kwargs["dimension_numbers"] is None or kwargs["dimension_numbers"][1] == "OHWI":
        kernel = normal(1, 16, 3 if kwargs["dimension_numbers"] else 16, 3, 16)
    ours = value_and_gradients(
        lambda x, k: layers.conv_general_dilated(x, k, (1, 1), padding, **kwargs), x, kernel
    )
    plain = value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), padding, **kwargs), x, kernel
    )
    for actual, expected in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_other_platforms_keep_the_functions_of_lax(monkeypatch):
    x, kernel = normal(0, 1, 8, 8, 16), normal(1, 3, 3, 16, 16)

    def program() -> str:
        def network(x):
            x = layers.conv_relu_pool(x, kernel, kernel[0, 0, 0], relu=True, pool=True)
            return layers.max_pool(fast_conv(x, kernel, (1, 1), "SAME"), (2, 2), (2, 2))

        return str(jax.make_jaxpr(network)(x))

    assert "custom_vjp" in program()
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    assert "custom_vjp" not in program()
    assert "conv_general_dilated" in program()
    assert "reduce_window" in program()


def test_linen_s_own_layer_takes_the_convolution():
    x = normal(0, 2, 8, 8, 3)
    plain = nn.Conv(16, (3, 3))
    ours = nn.Conv(16, (3, 3), conv_general_dilated=layers.conv_general_dilated)
    variables = plain.init(jax.random.key(1), x)
    same = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert_close(ours.apply(variables, x), plain.apply(variables, x), 1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_conv_layer_has_the_parameters_and_outputs_of_linen(use_bias: bool):
    x = normal(0, 2, 8, 8, 3)
    settings = {"use_bias": use_bias, "bias_init": nn.initializers.normal()}
    ours = layers.Conv(16, (3, 2), (2, 1), **settings)
    linen = nn.Conv(16, (3, 2), (2, 1), **settings)
    y, variables = ours.init_with_output(jax.random.key(0), x)
    expected, of_linen = linen.init_with_output(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, of_linen)
    assert_close(y, expected, 1e-6)


def test_bias_of_bfloat16_has_a_gradient_summed_in_float32():
    """By a reduction, not by XLA's reduce-window for bfloat16, which runs on one core."""
    x, bias, dy = (normal(i, 64, 32, 32, 16).astype(jnp.bfloat16) for i in range(3))
    y, pullback = jax.vjp(layers.add_bias, x, bias[0, 0, 0])
    np.testing.assert_array_equal(y, x + bias[:1, :1, :1])
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
        (4, (32, 32), 16, 16),  # In several turns.
        (10, (32, 32), 3, 16),
        (3, (9, 8), 3, 10),
    ],
)
def test_conv_with_relu_and_pool_is_what_the_layers_are_one_by_one(
    n, size, n_in, n_out, relu, pool
):
    x, kernel, bias = normal(0, n, *size, n_in), normal(1, 3, 3, n_in, n_out), normal(2, n_out)
    # Of whole numbers, which both compute exactly, so that windows hold the same ties.
    whole = [jnp.round(array) for array in (x, kernel, bias)]
    ours = value_and_gradients(
        lambda *args: layers.conv_relu_pool(*args, relu=relu, pool=pool), *whole
    )
    plain = value_and_gradients(lambda *args: separate_layers(*args, relu, pool), *whole)
    np.testing.assert_array_equal(ours[0], plain[0])
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize(("n_in", "pool"), [(16, True), (3, False)])
def test_conv_with_relu_and_pool_needs_no_bias(n_in: int, pool: bool):
    x, kernel = normal(0, 3, 6, 8, n_in), normal(1, 3, 3, n_in, 16)
    ours = value_and_gradients(
        lambda *args: layers.conv_relu_pool(*args, relu=True, pool=pool), x, kernel
    )
    plain = value_and_gradients(lambda *args: separate_layers(*args, None, True, pool), x, kernel)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("side", [8, 33])
def test_conv_with_relu_and_pool_of_bfloat16_is_as_exact_as_its_format(side: int, pool: bool):
    arrays = normal(0, 6, side, side, 16), normal(1, 3, 3, 16, 16), normal(2, 16)
    # Whole numbers, else sums near 0 or near each other would end on other sides.
    whole = [jnp.round(array) for array in arrays]
    ours = value_and_gradients(
        lambda *args: layers.conv_relu_pool(*args, relu=True, pool=pool),
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
    ours = value_and_gradients(lambda *args: layers.conv_relu_pool(*args, relu=True), *low)
    exact = [a.astype(jnp.float32) for a in low]
    y, backward = jax.vjp(lambda *args: separate_layers(*args, True, False), *exact)
    dy = normal(9, *y.shape).astype(jnp.bfloat16).astype(jnp.float32)
    for actual, expected in zip(ours, (y, *backward(dy)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-7)


def test_bits_become_bfloat16_and_float32_as_by_a_conversion():
    every = lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    wide = np.asarray(jax.jit(cpu_kernels._widen)(every))
    np.testing.assert_array_equal(wide, np.asarray(every).astype(np.float32))
    # The numbers themselves, and what lies a little above, halfway to the next, and a little below.
    bits = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) + np.uint32([0, 1, 2**15, 2**16 - 1])
    exact = bits.view(np.float32)
    rounded = jax.jit(cpu_kernels._round, static_argnums=1)(exact, jnp.bfloat16)
    with np.errstate(invalid="ignore"):
        expected = exact.astype(jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(rounded), np.float32(expected))
    assert (np.signbit(rounded) == np.signbit(expected))[~np.isnan(exact)].all()


@pytest.mark.parametrize(("side", "n_transposed"), [(32, 4), (30, 16)])
def test_the_loops_with_relu_and_pool_move_the_bits_of_bfloat16_and_multiply_what_is_needed(
    side: int, n_transposed: int
):
    x, kernel, bias = normal(0, 8, side, side, 16), normal(1, 3, 3, 16, 16), normal(2, 16)
    x, kernel, bias = (array.astype(jnp.bfloat16) for array in (x, kernel, bias))

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(layers.conv_relu_pool(*args, relu=True, pool=True).astype(jnp.float32))

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
    ours = value_and_gradients(lambda x: layers.max_pool(x, shape, strides, padding), x)
    plain = value_and_gradients(lambda x: nn.max_pool(x, shape, strides, padding), x)
    np.testing.assert_array_equal(ours[0], plain[0])
    assert_close(ours[1], plain[1], 1e-6)


@pytest.mark.parametrize("strides", [(2, 2), (1, 1)])
def test_pool_of_bfloat16_has_the_gradient_of_float32(strides):
    x = jnp.round(normal(0, 3, 6, 7, 5))
    exact = value_and_gradients(lambda x: layers.max_pool(x, (2, 2), strides), x)
    ours = value_and_gradients(
        lambda x: layers.max_pool(x, (2, 2), strides), x.astype(jnp.bfloat16)
    )
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual.astype(jnp.float32), expected, 2**-7)


def test_pool_gives_a_tie_to_the_first_in_row_major_order():
    image = jnp.array([[1.0, 3.0, 5.0, 5.0], [3.0, 3.0, 5.0, 5.0]]).reshape(1, 2, 4, 1)
    gradient = jax.grad(lambda x: jnp.sum(layers.max_pool(x, (2, 2), (2, 2))))(image)
    assert gradient.reshape(2, 4).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_pool_keeps_the_type_and_passes_nan_on():
    x = normal(0, 1, 4, 4, 1).at[0, 3, 0, 0].set(jnp.nan).astype(jnp.bfloat16)
    ours = value_and_gradients(lambda x: layers.max_pool(x, (2, 2), (2, 2)), x)
    plain = nn.max_pool(x, (2, 2), (2, 2))
    assert {array.dtype for array in ours} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(ours[0], np.float32), np.asarray(plain, np.float32))


def test_pool_layer_is_2x2_by_default_and_has_no_parameters():
    x = normal(0, 2, 7, 8, 3)
    y, variables = layers.MaxPool().init_with_output(jax.random.key(0), x)
    assert variables == {}
    np.testing.assert_array_equal(y, nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_average_pool_and_its_gradient_equal_those_of_linen(size: tuple[int, int]):
    x = normal(0, 3, *size, 5)
    ours = value_and_gradients(lambda x: layers.average_pool(x, 2), x)
    plain = value_and_gradients(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), x)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 1e-6)


def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
    y = layers.conv_relu_pool(x, kernel, kernel[0, 0, 0], relu=True, pool=True)
    return jnp.sum(layers.max_pool(fast_conv(y, kernel, (1, 1), "SAME"), (2, 2), (2, 2)) ** 2)


def test_gradients_inside_scan_are_those_outside():
    kernel, batches = normal(0, 3, 3, 16, 16), normal(1, 3, 2, 8, 8, 16)
    _, scanned = jax.jit(lambda k, xs: lax.scan(lambda k, x: (k, jax.grad(loss)(k, x)), k, xs))(
        kernel, batches
    )
    for x, gradient in zip(batches, scanned, strict=True):
        assert_close(gradient, jax.jit(jax.grad(loss))(kernel, x), 1e-6)


def test_second_derivatives_of_float32_are_those_of_lax():
    kernel, x, direction = normal(0, 3, 3, 16, 16), normal(1, 2, 8, 8, 16), normal(2, 3, 3, 16, 16)

    def curvature(kernel: jax.Array) -> jax.Array:
        return jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k, x), direction))(kernel)

    found = jax.jit(curvature)(kernel)
    with layers.portable():
        expected = jax.jit(lambda kernel: curvature(kernel))(kernel)
    assert_close(found, expected, 5e-6)


def test_gradients_under_vmap_are_those_of_each():
    kernels, batches = normal(0, 3, 3, 3, 16, 16), normal(1, 3, 2, 8, 8, 16)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(kernels, batches)
    for gradient, kernel, x in zip(mapped, kernels, batches, strict=True):
        assert_close(gradient, jax.jit(jax.grad(loss))(kernel, x), 1e-6)


def test_the_same_inputs_give_the_same_bits():
    kernel, x = normal(0, 3, 3, 32, 32), normal(1, 8, 32, 32, 32)
    gradient = jax.jit(jax.grad(loss))
    first = gradient(kernel, x)
    for _ in range(3):
        np.testing.assert_array_equal(gradient(kernel, x), first)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (6, 80), (6, 1100)])
def test_dense_of_bfloat16_has_the_gradients_of_float32(shape: tuple[int, ...]):
    """That of the kernel is not even rounded."""
    x, kernel = normal(0, *shape).astype(jnp.bfloat16), normal(1, shape[-1], 4)
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    y, dx, dkernel = value_and_gradients(layers.dense, x, kernel)
    expected = value_and_gradients(jnp.matmul, x.astype(jnp.float32), kernel)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for actual, exact in zip((y, dx, dkernel), expected, strict=True):
        assert_close(actual.astype(jnp.float32), exact, 2**-7)
    dy = jax.grad(lambda y: jnp.sum(jnp.sin(y)))(y)
    exact = jax.vjp(jnp.matmul, x.astype(jnp.float32), kernel)[1](dy.astype(jnp.float32))[1]
    found = jax.vjp(layers.dense, x, kernel)[1](dy)[1]
    assert_close(found, exact, 1e-6)


def test_no_dense_kernel_is_rounded_as_a_whole():
    x, kernel = normal(0, 8, 1024).astype(jnp.bfloat16), normal(1, 1024, 96)
    step = jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.sin(layers.dense(x, k))), (0, 1)))
    program = step.lower(kernel, x).compile().as_text()
    assert re.search(r"(bf16|u16)\[512,96\]", program)
    assert not re.search(r"(bf16|u16)\[1024,96\]", program)


def test_dense_of_float32_is_flax_own():
    x = normal(0, 5, 7)
    ours, theirs = layers.Dense(4), nn.Dense(4)
    variables = theirs.init(jax.random.key(0), x)
    for a, b in zip(
        jax.tree.leaves(ours.init(jax.random.key(0), x)), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    gradients = [
        jax.value_and_grad(lambda v, layer=layer: jnp.sum(jnp.sin(layer.apply(v, x))))(variables)
        for layer in (ours, theirs)
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 160])
def test_products_with_the_identity_transpose_every_bit(columns: int):
    x = normal(0, 50, columns).astype(jnp.bfloat16)
    found = jax.jit(cpu_kernels._transposed)(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), x.T.astype(jnp.float32))


def test_what_is_no_convolution_of_one_float_type_is_laxs():
    x, kernel = normal(0, 2, 8, 8, 16), normal(1, 3, 3, 16, 16)
    whole = [jnp.round(4 * array).astype(jnp.int32) for array in (x, kernel)]
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected = lax.conv_general_dilated(*whole, (1, 1), "SAME", **numbers)
    ours = layers.conv_general_dilated(*whole, (1, 1), "SAME", **numbers)
    np.testing.assert_array_equal(ours, expected)
    with pytest.raises(TypeError):
        layers.conv_general_dilated(x, kernel.astype(jnp.bfloat16), (1, 1), "SAME", **numbers)


def test_whole_numbers_are_pooled_as_by_flax():
    x = jnp.round(4 * normal(0, 2, 6, 6, 3)).astype(jnp.int32)
    expected = nn.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(layers.max_pool(x, (2, 2), (2, 2)), expected)
