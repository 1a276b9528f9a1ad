"""The chapter's networks, and a modern one, as linen modules with explicit, stable layer names.

Names are what summaries, checkpoints and patterns speak of: "block1/conv1", "fc1", "head".
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
    "gelu": partial(nn.gelu, approximate=False),
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


def fan_in_uniform(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32, fan_in: int = 0
) -> Array:
    """Returns an array drawn from U(-a, a), a = 1 / sqrt(fan_in): where PyTorch's layers start.

    Without `fan_in` it is that of a kernel of this shape, [..., in, out].
    """
    limit = 1 / math.sqrt(fan_in or math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def partial_identity(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, "kernel_height kernel_width in out"]:
    """Returns `fan_in_uniform`, but the first filters each pass on one of the input's channels."""
    height, width, *channels = shape
    first = jnp.arange(min(channels))
    kernel = fan_in_uniform(key, shape, dtype).at[..., first].set(0)
    return kernel.at[height // 2, width // 2, first, first].set(1)


def _convolution(width: int, stride: int, initializer: str, dtype: Any, name: str) -> layers.Conv:
    return layers.Conv(
        width,
        strides=(stride, stride),
        dtype=dtype,
        kernel_init=INITIALIZERS[initializer],
        name=name,
    )


def _dense(width: int, initializer: str, dtype: Any, name: str) -> layers.Dense:
    return layers.Dense(
        width,
        dtype=dtype,
        kernel_init=INITIALIZERS[initializer],
        name=name,
    )


def _convolve_and_pool(
    x: Array,
    widths: tuple[int, ...],
    activation: str,
    dtype: Any,
    pooling: str,
    initializer: str,
    train: bool,
) -> Array:
    """Runs `conv1`, `conv2`, ... and `pool` in the module that calls it, and halves the side.

    In training ReLU, and the max pool after it, are part of the convolution; in evaluation the pool
    is a layer that can be looked at.
    """
    relu = train and activation == "relu"
    pool = relu and pooling == "max"
    for i, width in enumerate(widths, start=1):
        last = i == len(widths)
        stride = 2 if pooling == "stride" and last else 1
        convolution = _convolution(width, stride, initializer, dtype, f"conv{i}")
        x = convolution(x, relu=relu, pool=pool and last)
        x = x if relu else ACTIVATIONS[activation](x)
    pools = {"max": layers.MaxPool, "average": layers.AveragePool}
    return pools[pooling](name="pool")(x) if pooling in pools and not pool else x


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
        settings = self.activation, self.dtype, self.pooling, self.initializer
        return self.classify(_convolve_and_pool(x, self.widths, *settings, train), train)


class Block(nn.Module):
    """Layers of a network that share a name's first part, around a 2x2 pool."""

    widths: tuple[int, ...]
    activation: str
    dtype: Any


class VGGBlock(Block):
    """3x3 convolutions `conv1`, `conv2`, ... of one resolution, ended by a 2x2 pool."""

    pooling: str
    initializer: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Array:
        """Returns feature maps of half the height and width, rounded down; up by a stride."""
        settings = self.activation, self.dtype, self.pooling, self.initializer
        return _convolve_and_pool(x, self.widths, *settings, train)


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
        _check_size(images, self.blocks, 2 ** len(self.blocks))
        x = images.astype(self.dtype)
        settings = self.activation, self.dtype, self.pooling, self.initializer
        for i, widths in enumerate(self.blocks, start=1):
            x = VGGBlock(widths, *settings, name=f"block{i}")(x, train)
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


class AirbenchGroup(Block):
    """3x3 convolutions `conv1`, ..., each with a norm, `norm1`, ...; a max pool follows the first.

    The norm is BatchNorm without a scale, which the next layer makes up for.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Array:
        """Returns feature maps of half the height and width, rounded down."""
        for i, width in enumerate(self.widths, start=1):
            x = layers.Conv(
                width,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=partial_identity,
                name=f"conv{i}",
            )(x, pool=train and i == 1)
            if i == 1 and not train:
                x = layers.MaxPool(name="pool")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.6,
                epsilon=1e-12,
                dtype=self.dtype,
                use_scale=False,
                use_fast_variance=False,  # epsilon is too small for what that one loses
                name=f"norm{i}",
            )(x)
            x = ACTIVATIONS[self.activation](x)
        return x


class Airbench(Classifier):
    """The network of airbench94 (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).

    A 2x2 convolution `whiten` of twice as many filters as a patch has numbers, meant to be whitened
    and frozen; `group1`, ... of 3x3 convolutions; a 3x3 max pool; and a linear `head`.
    """

    blocks: tuple[tuple[int, ...], ...] = ((64, 64), (256, 256), (256, 256))

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns logits; with `train`, BatchNorm uses the batch and moves its statistics."""
        _check_size(images, self.blocks, 3 * 2 ** len(self.blocks) + 1)
        patch = 2 * 2 * images.shape[-1]
        x = layers.Conv(
            2 * patch,
            (2, 2),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=fan_in_uniform,
            bias_init=partial(fan_in_uniform, fan_in=patch),
            name="whiten",
        )(images)
        x = ACTIVATIONS[self.activation](x)
        for i, widths in enumerate(self.blocks, start=1):
            x = AirbenchGroup(widths, self.activation, self.dtype, name=f"group{i}")(x, train)
        x = layers.MaxPool((3, 3), (3, 3), name="pool")(x)
        head = layers.Dense(
            self.n_classes,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=fan_in_uniform,
            name="head",
        )
        return head(x.reshape((x.shape[0], -1))).astype(jnp.float32) / 9


def _check_size(images: Array, blocks: tuple[tuple[int, ...], ...], side: int) -> None:
    height, width = images.shape[1:3]
    if min(height, width) < side:
        raise UserError(
            f"{len(blocks)} blocks need images of {side}x{side} or larger, not {height}x{width}"
        )


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
    inside = isinstance(context.module, Classifier | Block)
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

        The layer has parameters: in training others may be left out. The images are NaN, so a
        network in which anything else reads what comes before the layer says so. Otherwise nothing
        does, and XLA leaves all that out.
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
    kinds = {"vgg": VGG, "vgg16": VGG16, "airbench": Airbench}
    return kinds[config.name](blocks=config.blocks, **common)


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
