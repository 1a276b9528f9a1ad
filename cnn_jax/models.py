"""The chapter's networks as linen modules whose layers have explicit, stable names.

Names are what summaries, checkpoints and patterns speak of: "block1/conv1", "fc1", "head".
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cnn_jax import layers, trees
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
}

# Rows of a kernel that are drawn at once.
_INIT_ROWS = 128


def glorot_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel [..., in, out] drawn from U(-a, a), a = sqrt(6 / (fan_in + fan_out)).

    Equation 16 of Glorot and Bengio (2010), what tf.layers starts from, and so the chapter. Some
    rows at a time, because the random bits of all of vgg1's fc1 would take three times its memory.
    """
    receptive = math.prod(shape[:-2])
    return _uniform(key, shape, dtype, math.sqrt(6 / (receptive * (shape[-2] + shape[-1]))))


def he_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel [..., in, out] drawn from U(-a, a), a = sqrt(6 / fan_in).

    Of the variance 2 / fan_in that He et al. (2015), equation 10, derive for ReLU.
    """
    return _uniform(key, shape, dtype, math.sqrt(6 / math.prod(shape[:-1])))


def narrow_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns a kernel drawn from U(-0.01, 0.01), whatever its shape."""
    return _uniform(key, shape, dtype, 0.01)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any, limit: float) -> Array:
    keys = jax.random.split(key, math.prod(shape[:-1]))

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, shape[-1:], dtype, -limit, limit)

    return jax.lax.map(draw, keys, batch_size=_INIT_ROWS).reshape(shape)


INITIALIZERS: dict[str, Callable[..., Array]] = {
    "glorot_uniform": glorot_uniform,
    "he_uniform": he_uniform,
    "narrow_uniform": narrow_uniform,
}


def _convolution(width: int, stride: int, initializer: str, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        width,
        (3, 3),
        strides=(stride, stride),
        padding="SAME",
        dtype=dtype,
        kernel_init=INITIALIZERS[initializer],
        conv_general_dilated=layers.conv_general_dilated,
        name=name,
    )


def _dense(width: int, initializer: str, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(
        width,
        dtype=dtype,
        kernel_init=INITIALIZERS[initializer],
        dot_general=layers.dot_general,
        name=name,
    )


def _convolve_and_pool(
    x: Array, widths: tuple[int, ...], activation: str, pooling: str, initializer: str, dtype: Any
) -> Array:
    """Runs `conv1`, `conv2`, ... and `pool` in the module that calls it, and halves the side."""
    for i, width in enumerate(widths, start=1):
        stride = 2 if pooling == "stride" and i == len(widths) else 1
        convolution = _convolution(width, stride, initializer, dtype, f"conv{i}")
        x = ACTIVATIONS[activation](convolution(x))
    pools = {"max": layers.MaxPool, "average": layers.AveragePool}
    return pools[pooling](name="pool")(x) if pooling in pools else x


class Classifier(nn.Module):
    """Flatten, then hidden dense layers `fc1`, `fc2`, ... with dropout, then the linear `head`.

    A base class, so that the layers are named at the top of the network that inherits them.
    """

    n_classes: int
    dense: tuple[int, ...]
    activation: str = "relu"
    pooling: str = "max"
    dropout: float = 0.0
    initializer: str = "glorot_uniform"
    dtype: Any = jnp.float32

    def classify(self, x: Float[Array, "batch height width channels"], train: bool) -> Array:
        """Returns float32 logits [batch, classes] for a batch of feature maps."""
        x = x.reshape((x.shape[0], -1))
        for i, width in enumerate(self.dense, start=1):
            dense = _dense(width, self.initializer, self.dtype, f"fc{i}")
            x = ACTIVATIONS[self.activation](dense(x))
            if self.dropout:
                x = nn.Dropout(self.dropout, name=f"dropout{i}")(x, deterministic=not train)
        head = _dense(self.n_classes, self.initializer, self.dtype, "head")
        return head(x).astype(jnp.float32)


class SimpleCNN(Classifier):
    """Listing 6-1: convolutions `conv1`, `conv2`, ..., one pool, then the classifier."""

    widths: tuple[int, ...] = (50, 50)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns logits; `train` turns dropout on and needs a "dropout" key."""
        x = images.astype(self.dtype)
        settings = self.activation, self.pooling, self.initializer, self.dtype
        return self.classify(_convolve_and_pool(x, self.widths, *settings), train)


class VGGBlock(nn.Module):
    """3x3 convolutions `conv1`, `conv2`, ... of one resolution, ended by a 2x2 pool."""

    widths: tuple[int, ...]
    activation: str
    pooling: str
    initializer: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Returns feature maps of half the height and width, rounded down; up by a stride."""
        settings = self.activation, self.pooling, self.initializer, self.dtype
        return _convolve_and_pool(x, self.widths, *settings)


class VGG(Classifier):
    """Blocks `block1`, `block2`, ... of 3x3 convolutions (Simonyan and Zisserman, 2015)."""

    blocks: tuple[tuple[int, ...], ...] = ((64, 64),)
    grid: int = 0
    """Side that the last feature maps are averaged to before the dense layers; 0: as they are."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns logits; `train` turns dropout on and needs a "dropout" key."""
        side, (height, width) = 2 ** len(self.blocks), images.shape[1:3]
        if min(height, width) < side:
            raise UserError(
                f"{len(self.blocks)} blocks need images of {side}x{side} or larger, "
                f"not {height}x{width}"
            )
        x = images.astype(self.dtype)
        settings = self.activation, self.pooling, self.initializer, self.dtype
        for i, widths in enumerate(self.blocks, start=1):
            x = VGGBlock(widths, *settings, name=f"block{i}")(x)
        if self.grid:
            x = layers.adaptive_average_pool(x, self.grid)
        return self.classify(x, train)


class VGG16(VGG):
    """VGG16 for ImageNet, as in torchvision: 13 convolutions, 7x7 averages, fc1, fc2, head.

    The averages let the trunk take images of 32x32 and larger, not only of 224x224.
    """

    blocks: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )
    grid: int = 7


@contextlib.contextmanager
def frozen_in_eval_mode(params: Any, trainable: Any) -> Iterator[None]:
    """Inside the block, frozen modules run as in evaluation, whatever `train` they are given.

    `trainable` is `params` with None in place of what is frozen. A module is frozen if it has
    parameters and all of them are; one without parameters, such as dropout, is if the layer
    before it is. Frozen BatchNorm uses its running statistics, which then do not move.
    """
    names, trained = list(trees.named_leaves(params)), set(trees.named_leaves(trainable))
    switches = {nn.Dropout: "deterministic", nn.BatchNorm: "use_running_average"}
    frozen = False

    def evaluate(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal frozen
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        prefix = "".join(f"{name}/" for name in context.module.path)
        if own := [name for name in names if name.startswith(prefix)]:
            frozen = trained.isdisjoint(own)
        for kind, switch in switches.items():
            if frozen and isinstance(context.module, kind):
                # Linen refuses a switch that both the constructor and the call set.
                object.__setattr__(context.module, switch, None)
                args, kwargs = args[:1], {**kwargs, switch: True}
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(evaluate):
        yield


def _is_layer(context: Any) -> bool:
    """Says whether a call that linen intercepts is a layer's own, not that of what holds layers."""
    inside = isinstance(context.module, Classifier | VGGBlock)
    return context.method_name == "__call__" and not inside


def layer_inputs(model: nn.Module, variables: Any, images: Array) -> dict[str, Array]:
    """Returns what each layer is given in evaluation, past the activation function before it.

    By the layers' names; where it is compiled, JAX sorts them.
    """
    given: dict[str, Array] = {}

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if _is_layer(context):
            given["/".join(context.module.path)] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images)
    return given


@dataclass(frozen=True)
class LayerCache:
    """The layer whose inputs are known beforehand, and the shape of the images they come from."""

    layer: str
    image_shape: tuple[int, int, int]

    @contextlib.contextmanager
    def replacing(self, inputs: Array) -> Iterator[Array]:
        """Inside the block the layer is given `inputs`; yields images to call the network with.

        They are NaN, so a network in which anything else reads what comes before the layer says
        so. Otherwise nothing does, and XLA leaves all that out.
        """

        def replace(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if _is_layer(context) and "/".join(context.module.path) == self.layer:
                args = (inputs, *args[1:])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(replace):
            yield jnp.full((len(inputs), *self.image_shape), jnp.nan)


def build(config: ModelConfig, n_classes: int) -> Classifier:
    """Returns the linen module that a config describes."""
    common = {
        "n_classes": n_classes,
        "dense": config.dense,
        "activation": config.activation,
        "pooling": config.pooling,
        "initializer": config.initializer,
        "dropout": config.dropout,
        "dtype": jnp.dtype(config.dtype),
    }
    if config.name == "simple_cnn":
        return SimpleCNN(widths=config.blocks[0], **common)
    return {"vgg": VGG, "vgg16": VGG16}[config.name](blocks=config.blocks, **common)


def param_names(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns the names of all parameters, in name order, without computing anything."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return list(trees.named_leaves(variables["params"]))


def first_trainable(model: nn.Module, image_shape: tuple[int, int, int], trainable: Any) -> str:
    """Returns the name of the first layer to run that has parameters in `trainable`."""
    trained = list(trees.named_leaves(trainable))
    return next(
        row.name
        for row in summarize(model, image_shape)
        if any(name.startswith(row.name + "/") for name in trained)
    )


@dataclass(frozen=True)
class LayerSummary:
    """One row of a network's table; `flops` are those of one image's forward pass."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


def summarize(model: nn.Module, image_shape: tuple[int, int, int]) -> list[LayerSummary]:
    """Returns the layers of `model` in the order they run, without computing anything.

    A multiplication and an addition count as two FLOPs; biases, activations and pooling, under 1%
    of the work, are not counted.
    """
    rows: list[LayerSummary] = []

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        module = context.module
        if _is_layer(context):
            params = module.variables.get("params", {})
            kernel_size = params["kernel"].size if "kernel" in params else 0
            shape = tuple(outputs.shape[1:])
            rows.append(
                LayerSummary(
                    name="/".join(module.path),
                    kind=type(module).__name__,
                    output_shape=shape,
                    params=trees.param_count(params),
                    flops=2 * math.prod(shape[:-1]) * kernel_size,
                )
            )
        return outputs

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return rows
