"""The layers: parameters and values as flax's, with activation and dropout inside."""

from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import kernels, layers


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Compares with the largest expected value: sums of large terms that cancel stay inexact."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance * np.abs(np.asarray(expected, np.float64)).max()


def value_and_gradients(function, *args: Any) -> list[jax.Array]:
    """The function's value, and its gradients for a cotangent that differs everywhere."""

    def run(*args: Any) -> Any:
        y, backward = jax.vjp(function, *args)
        return y, backward(normal(9, *y.shape).astype(y.dtype))

    # LLVM takes most of the time of these tests for optimizations that change no result here.
    quick = {"xla_backend_optimization_level": 0}
    return jax.tree.leaves(jax.jit(run, compiler_options=quick)(*args))


CONVS = [
    # in, out, kernel, strides, padding, bias, kernels
    (3, 16, (3, 2), (2, 1), "SAME", True, "cpu"),
    (3, 16, (3, 2), (2, 1), "SAME", True, "xla"),
    (3, 16, (3, 3), (1, 1), "SAME", False, "cpu"),
    (16, 16, (3, 3), (1, 1), "SAME", True, "cpu"),
    (16, 16, (3, 3), (1, 1), "SAME", False, "xla"),
    (3, 16, (3, 3), (1, 1), "VALID", True, "cpu"),
    (16, 32, (1, 1), (2, 2), "SAME", False, "cpu"),
    (16, 32, (1, 1), (2, 2), "VALID", True, "xla"),
]


@pytest.mark.parametrize(
    ("n_in", "n_out", "window", "strides", "padding", "use_bias", "choice"), CONVS
)
def test_conv_has_the_parameters_values_and_gradients_of_linen(
    n_in, n_out, window, strides, padding, use_bias: bool, choice: str
):
    x = normal(0, 2, 9, 8, n_in)
    settings = {"padding": padding, "use_bias": use_bias, "bias_init": nn.initializers.normal()}
    ours = layers.Conv(n_out, window, strides, activation="relu", **settings)
    linen = nn.Conv(n_out, window, strides, **settings)
    variables = linen.init(jax.random.key(0), x)
    with kernels.use(choice):
        same = ours.init(jax.random.key(0), x)
        found = value_and_gradients(ours.apply, variables, x)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    expected = value_and_gradients(lambda v, x: nn.relu(linen.apply(v, x)), variables, x)
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact, 2e-6)


@pytest.mark.parametrize(
    ("channels", "window", "strides", "padding", "choice"),
    [
        (5, (3, 3), (1, 1), "SAME", "cpu"),
        (5, (3, 3), (2, 2), "SAME", "cpu"),
        (16, (5, 5), (2, 2), ((1, 2), (2, 1)), "cpu"),
        (16, (5, 5), (1, 1), "SAME", "xla"),
    ],
)
def test_depthwise_conv_has_the_parameters_values_and_gradients_of_linen(
    channels, window, strides, padding, choice: str
):
    x = normal(0, 2, 9, 8, channels)
    ours = layers.DepthwiseConv(window, strides, padding)
    linen = nn.Conv(
        channels, window, strides, padding, feature_group_count=channels, use_bias=False
    )
    variables = linen.init(jax.random.key(0), x)
    with kernels.use(choice):
        same = ours.init(jax.random.key(0), x)
        found = value_and_gradients(ours.apply, variables, x)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    expected = value_and_gradients(linen.apply, variables, x)
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact, 2e-6)


@pytest.mark.parametrize("activation", [None, *layers.ACTIVATIONS])
def test_layers_return_what_follows_their_activation(activation: str | None):
    functions = {
        None: lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "tanh": np.tanh,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) / 2,
    }
    images, rows = 4 * normal(0, 2, 4, 4, 4), 4 * normal(0, 2, 5)
    for linear, layer, x in (
        (nn.Conv(4, (3, 3)), layers.Conv(4, activation=activation), images),
        (nn.Dense(4), layers.Dense(4, activation=activation), rows),
    ):
        variables = linear.init(jax.random.key(1), x)
        expected = functions[activation](np.asarray(linear.apply(variables, x)))
        np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_compute_in_their_type_and_keep_parameters_of_float32(dtype: Any):
    for layer, x in (
        (layers.Conv(4, activation="gelu", dtype=dtype), normal(0, 2, 4, 4, 3)),
        (layers.DepthwiseConv(dtype=dtype), normal(0, 2, 4, 4, 3)),
        (layers.Dense(4, activation="gelu", dropout=0.5, dtype=dtype), normal(0, 2, 5)),
    ):
        y, variables = layer.init_with_output(jax.random.key(0), x)
        assert y.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_dense_of_float32_is_flax_own():
    x = normal(0, 5, 7)
    ours, theirs = layers.Dense(4), nn.Dense(4)
    variables = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
    gradients = [
        jax.value_and_grad(lambda v, layer=layer: jnp.sum(jnp.sin(layer.apply(v, x))))(variables)
        for layer in (ours, theirs)
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_dense_without_bias_has_a_kernel_alone():
    x = normal(0, 2, 3, 7)
    y, variables = layers.Dense(4, use_bias=False).init_with_output(jax.random.key(0), x)
    assert list(variables["params"]) == ["kernel"]
    np.testing.assert_array_equal(y, x @ variables["params"]["kernel"])


def test_dropout_is_a_part_of_dense_and_acts_in_training_alone():
    x = normal(0, 50, 7)
    layer, plain = layers.Dense(40, activation="relu", dropout=0.25), layers.Dense(40, True, "relu")
    variables = layer.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), x))
    whole = np.asarray(plain.apply(variables, x))
    np.testing.assert_array_equal(layer.apply(variables, x), whole)
    found = np.asarray(layer.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)}))
    kept = found != 0
    np.testing.assert_allclose(found[kept], (whole / 0.75)[kept], rtol=1e-6)
    assert 0.7 < kept[whole > 0].mean() < 0.8


def calls(function) -> dict[str, Any]:
    """Returns what each module returns while `function` runs, by name, and what dropout is told."""
    returned: dict[str, Any] = {}

    def record(next_fun, args, kwargs, context):
        value = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            returned["/".join(context.module.path)] = value
            if isinstance(context.module, nn.Dropout):
                returned["deterministic"] = kwargs["deterministic"]
        return value

    with nn.intercept_methods(record):
        function()
    return returned


@pytest.mark.parametrize("train", [True, False])
def test_dropout_is_a_module_that_is_told_at_the_call(train: bool):
    """So that a frozen layer's dropout can be put into evaluation mode from outside."""
    x, layer = normal(0, 50, 7), layers.Dense(40, dropout=0.25, name="fc1")
    variables = nn.Dense(40).init(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)}
    found = calls(lambda: layer.apply(variables, x, train, rngs=rngs))
    assert set(found) == {"", "dropout", "deterministic"}
    assert found["deterministic"] is not train
    np.testing.assert_array_equal(found[""], found["dropout"])


class Block(nn.Module):
    """A convolution and a pool, as networks have them."""

    conv: dict[str, Any]
    pool: Any = layers.MaxPool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = layers.Conv(16, name="conv", **self.conv)
        return layers.conv_then_pool(conv, self.pool(name="pool"), x, train)


FUSED = [
    (16, {"activation": "relu"}, "cpu"),
    (16, {"activation": "relu"}, "xla"),
    (3, {"activation": "relu", "use_bias": False}, "cpu"),
    (3, {"use_bias": False}, "cpu"),
    (16, {"use_bias": False}, "xla"),
    (3, {"activation": "tanh"}, "cpu"),
    (3, {"activation": "relu", "strides": (2, 1)}, "cpu"),
    (3, {"activation": "relu", "padding": "VALID"}, "cpu"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("n_in", "conv", "choice"), FUSED)
def test_conv_then_pool_is_the_same_in_training_and_evaluation(n_in: int, conv: dict, choice: str):
    x = jnp.round(normal(0, 3, 9, 10, n_in))
    initializers = {"bias_init": nn.initializers.normal()} if conv.get("use_bias", True) else {}
    block = Block({**conv, **initializers})
    with kernels.use(choice):
        variables = block.init(jax.random.key(0), x)
        # Of whole numbers, so that windows hold ties and both compute the same.
        variables = jax.tree.map(lambda leaf: jnp.round(10 * leaf), variables)
        found = value_and_gradients(lambda v, x: block.apply(v, x, True), variables, x)
        expected = value_and_gradients(block.apply, variables, x)
    np.testing.assert_array_equal(found[0], expected[0])
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact, 2e-6)


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_conv_then_pool_calls_both_and_in_evaluation_each_returns_its_own(activation: str | None):
    x, block = normal(0, 3, 8, 8, 16), Block({"activation": activation})
    variables = block.init(jax.random.key(0), x)
    evaluated = calls(lambda: block.apply(variables, x))
    trained = calls(lambda: block.apply(variables, x, True))
    assert list(evaluated) == list(trained) == ["conv", "pool", ""]
    assert evaluated["conv"].shape == (3, 8, 8, 16)
    conv = layers.Conv(16, activation=activation)
    expected = conv.apply({"params": variables["params"]["conv"]}, x)
    np.testing.assert_array_equal(evaluated["conv"], expected)
    np.testing.assert_array_equal(evaluated["pool"], nn.max_pool(expected, (2, 2), (2, 2)))
    assert_close(trained["pool"], evaluated["pool"], 1e-6)
    fused = activation != "tanh"
    assert trained["conv"].shape == ((3, 4, 4, 16) if fused else (3, 8, 8, 16))


def wide_pool(name: str) -> layers.MaxPool:
    return layers.MaxPool((3, 3), (2, 2), name=name)


@pytest.mark.parametrize("pool", [layers.AveragePool, wide_pool])
def test_conv_then_another_pool_is_never_fused(pool: Any):
    x, block = normal(0, 3, 8, 8, 16), Block({"activation": "relu"}, pool)
    variables = block.init(jax.random.key(0), x)
    found = calls(lambda: block.apply(variables, x, True))
    assert found["conv"].shape == (3, 8, 8, 16)
    expected = pool(name="pool").apply({}, found["conv"])
    np.testing.assert_array_equal(found["pool"], expected)


def test_a_replaced_pool_hides_the_convolution_before_it():
    """What a cached frozen layer stands for: nothing reads the images."""
    x, block = normal(0, 3, 8, 8, 16), Block({"activation": "relu"})
    variables = block.init(jax.random.key(0), x)
    known = normal(1, 3, 4, 4, 16)

    def replace(next_fun, args, kwargs, context):
        value = next_fun(*args, **kwargs)
        return known if context.module.name == "pool" else value

    for train in (True, False):
        with nn.intercept_methods(replace):
            found = block.apply(variables, jnp.full_like(x, jnp.nan), train)
        np.testing.assert_array_equal(found, known)


def test_pool_layer_is_2x2_by_default_and_has_no_parameters():
    x = normal(0, 2, 7, 8, 3)
    y, variables = layers.MaxPool().init_with_output(jax.random.key(0), x)
    assert variables == {}
    np.testing.assert_array_equal(y, nn.max_pool(x, (2, 2), (2, 2)))
    y = layers.MaxPool((3, 2), (1, 2), "SAME").apply({}, x)
    np.testing.assert_array_equal(y, nn.max_pool(x, (3, 2), (1, 2), "SAME"))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_average_pool_and_its_gradient_equal_those_of_linen(size: tuple[int, int]):
    x = normal(0, 3, *size, 5)
    pool = layers.AveragePool()
    assert pool.init(jax.random.key(0), x) == {}
    ours = value_and_gradients(lambda x: pool.apply({}, x), x)
    plain = value_and_gradients(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), x)
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 1e-6)


def test_adaptive_averages_are_those_of_the_windows_that_cover_an_image():
    x = normal(0, 2, 5, 7, 3)
    found = layers.adaptive_average_pool(x, 3)
    rows, columns = [(0, 2), (1, 4), (3, 5)], [(0, 3), (2, 5), (4, 7)]
    for (i, row), (j, column) in [(a, b) for a in enumerate(rows) for b in enumerate(columns)]:
        window = x[:, slice(*row), slice(*column)]
        np.testing.assert_allclose(found[:, i, j], window.mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layers.adaptive_average_pool(x[:, :, :5], 5), x[:, :, :5])


@pytest.mark.parametrize("kind", [layers.Conv, layers.Dense])
def test_parameters_that_exist_are_not_drawn_again(kind: type):
    """Tracing random numbers, only to compare shapes, would take a quarter of a start."""
    drawn = []

    def drawing(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        drawn.append(shape)
        return jnp.ones(shape, dtype)

    layer = kind(3, use_bias=True, kernel_init=drawing, bias_init=drawing)
    x = jnp.ones((1, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    assert len(drawn) == 2
    layer.apply(variables, x)
    assert len(drawn) == 2
    kernel = jnp.ones((1, 1, 1, 1))
    with pytest.raises(flax.errors.ScopeParamShapeError):  # as flax compares them
        layer.apply({"params": {**variables["params"], "kernel": kernel}}, x)
