"""Summaries, outputs, replaced outputs, freezing and cut points, mostly of branching networks."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import leaves

from cnn_jax import kernels, layers, models, trees
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models import inspection

HE = ModelConfig(name="resnet_small", blocks=((16, 16), (32, 32), (64, 64)), dense=())
SMALL = ModelConfig(name="resnet_small", blocks=((4, 4), (6, 6)), dense=())
VGG = ModelConfig(name="vgg", blocks=((4, 4), (6,)), dense=(8, 7), dropout=0.5)
SHAPE = (8, 8, 3)
IMAGES = jax.random.normal(jax.random.key(1), (4, *SHAPE))
TRAIN: dict[str, Any] = {"train": True, "mutable": ["batch_stats"]}


def start(model: nn.Module) -> dict[str, Any]:
    """Returns variables of which none has its initial value, with which much goes unnoticed."""
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.ndim < 2:  # Variances must be positive.
            return jnp.asarray(rng.uniform(0.2, 0.8, x.shape), x.dtype)
        scale = np.sqrt(2 / np.prod(x.shape[:-1]))
        return jnp.asarray(rng.normal(0, scale, x.shape), x.dtype)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), IMAGES))


def trainable(variables: dict[str, Any], pattern: str) -> Any:
    return trees.select(lambda name: bool(re.fullmatch(pattern, name)), variables["params"])


def train(model: nn.Module, variables, images, trained: Any, seed: int = 0) -> tuple[Any, Any]:
    """Returns the logits in training and the new batch statistics by name."""
    with inspection.frozen_in_eval_mode(variables["params"], trained):
        rngs = {"dropout": jax.random.key(seed)}
        logits, changed = model.apply(variables, images, rngs=rngs, **TRAIN)
    return logits, leaves(changed)


def input_of(name: str, model: nn.Module, variables, images) -> jax.Array:
    """Returns the input of a layer."""
    seen = {}

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        seen["/".join(context.module.path)] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images)
    return seen[name]


# --- summarize


def test_flops_of_the_residual_network_by_hand():
    rows = inspection.summarize(models.build(HE, 10), (32, 32, 3))
    by_name = {row.name: row for row in rows}
    assert by_name["stem"].flops == 2 * 32 * 32 * (3 * 3 * 3 * 16)
    assert by_name["stage2/block1/conv1"].flops == 2 * 16 * 16 * (3 * 3 * 16 * 32)  # stride 2
    assert by_name["stage2/block1/shortcut"].flops == 2 * 16 * 16 * (16 * 32)
    assert by_name["stage2/block1/shortcut"].output_shape == (16, 16, 32)
    assert by_name["pool"].output_shape == (64,)
    assert by_name["head"].flops == 2 * 64 * 10
    same = 2 * 32 * 32 * 9 * 16 * 16  # Of each of the 3x3 convolutions that keep the resolution.
    assert 4 * same + 2 * (same // 2 + 3 * same) == 4 * 4718592 + 2 * (2359296 + 3 * 4718592)
    convolutions = 4 * same + 2 * (same // 2 + 3 * same) + 2 * 16 * 16 * 16 * 32 * 2
    assert sum(row.flops for row in rows) == 884_736 + convolutions + 1280
    assert sum(row.params for row in rows) == 175_258


@pytest.mark.parametrize(
    "config", [HE, ModelConfig(name="vgg", blocks=((32, 32), (64, 64)), dense=(256,))]
)
def test_the_total_is_close_to_what_xla_counts(config: ModelConfig):
    """XLA counts a little more for norms and sums, and leaves out products with the padding."""
    model, images = models.build(config, 10), jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with kernels.use("xla"):
        analysis = jax.jit(model.apply).lower(variables, images).compile().cost_analysis()
    assert analysis is not None
    rows = inspection.summarize(model, (32, 32, 3))
    padded = 0.0
    for row in rows:
        if row.kind == "Conv" and not row.name.endswith("shortcut"):
            side = row.output_shape[0]
            padded += row.flops * (1 - ((3 * side - 2) / (3 * side)) ** 2)
    total = sum(row.flops for row in rows)
    print(f"summary {total}, XLA {analysis['flops'] / 4}, of the padding {padded:.0f}")
    assert 0.97 < (analysis["flops"] / 4 + padded) / total < 1.03


class Odd(nn.Module):
    """A grouped convolution, a layer called twice, a parameter of its own, and two branches."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(6, (3, 3), strides=2, name="first")(images)
        x = x * self.param("scale", nn.initializers.ones, (6,)).reshape(1, 1, 1, 6)
        shared = nn.Conv(6, (3, 3), feature_group_count=3, name="shared")
        x = shared(shared(x)) + nn.Conv(6, (1, 1), name="side")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_summary_of_groups_shared_layers_and_parameters_outside_layers():
    found = [(r.name, r.kind, r.params, r.flops) for r in inspection.summarize(Odd(), SHAPE)]
    assert found == [
        ("", "Odd", 6, 0),
        ("first", "Conv", 27 * 6 + 6, 2 * 4 * 4 * 27 * 6),
        ("shared", "Conv", 9 * 2 * 6 + 6, 2 * (2 * 4 * 4 * 9 * 2 * 6)),
        ("side", "Conv", 6 * 6 + 6, 2 * 4 * 4 * 6 * 6),
        ("head", "Dense", 6 * 3 + 3, 2 * 6 * 3),
    ]
    assert sum(params for _, _, params, _ in found) == trees.param_count(start(Odd())["params"])


# --- outputs


def test_outputs_are_what_named_layers_and_blocks_return():
    model = models.build(SMALL, 3)
    variables = start(model)
    names = ["stage1", "stage2", "stage2/block1/norm2", "stage2/block1/shortcut_norm", "pool"]
    found = inspection.outputs(model, variables, IMAGES, names)
    assert list(found) == names
    np.testing.assert_allclose(found["pool"], found["stage2"].mean(axis=(1, 2)), atol=1e-6)
    assert found["stage2"].shape == (4, 4, 4, 6)
    block = inspection.outputs(model, variables, IMAGES, ["stage2/block1"])["stage2/block1"]
    both = found["stage2/block1/norm2"] + found["stage2/block1/shortcut_norm"]
    np.testing.assert_array_equal(block, nn.relu(both))


def test_the_input_of_the_next_layer_is_not_the_output_where_a_network_branches():
    """The layer called after norm2 is on the shortcut, and gets the input of the whole block."""
    model = models.build(SMALL, 3)
    variables = start(model)
    names = [row.name for row in inspection.summarize(model, SHAPE)]
    following = names[names.index("stage2/block1/norm2") + 1]
    assert following == "stage2/block1/shortcut"
    found = inspection.outputs(model, variables, IMAGES, ["stage2/block1/norm2", "stage1"])
    old = input_of(following, model, variables, IMAGES)
    np.testing.assert_array_equal(old, found["stage1"])
    assert old.shape != found["stage2/block1/norm2"].shape


def test_outputs_are_those_of_evaluation_after_activation_and_dropout():
    model = models.build(VGG, 3)
    variables = start(model)
    found = inspection.outputs(model, variables, IMAGES, ["fc1", "fc2", "block1/conv1", "head"])
    fc2 = variables["params"]["fc2"]
    expected = np.maximum(found["fc1"] @ fc2["kernel"] + fc2["bias"].reshape(1, -1), 0)
    np.testing.assert_allclose(found["fc2"], expected, atol=1e-5)
    assert found["block1/conv1"].min() == 0
    np.testing.assert_array_equal(found["head"], model.apply(variables, IMAGES))


def test_an_unknown_name_is_refused_with_the_nearest():
    model = models.build(VGG, 3)
    with pytest.raises(UserError) as caught:
        inspection.outputs(model, start(model), IMAGES, ["fc1", "block1/con1"])
    assert str(caught.value) == (
        "the network has no layer block1/con1 (did you mean block1/conv1?); known: block1, "
        "block1/conv1, block1/conv2, block1/pool, block2, block2/conv1, block2/pool, fc1, "
        "fc1/dropout, fc2, fc2/dropout, head"
    )


class Remade(nn.Module):
    """Blocks whose activations are computed again in the backward pass, and a shared layer."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.remat(models.resnet.ResidualBlock)(4, 1, "relu", jnp.float32, name="block")(images)
        shared = nn.Dense(4, name="shared")
        return nn.Dense(3, name="head")(shared(shared(x).mean((1, 2))))


def test_outputs_inside_a_transformed_module_and_of_a_layer_called_twice():
    variables = start(Remade())
    names = ["block/norm1", "block", "shared", "head"]
    found = jax.jit(lambda v: inspection.outputs(Remade(), v, IMAGES, names))(variables)
    block = models.resnet.ResidualBlock(4, 1, "relu", jnp.float32)
    own = {collection: tree["block"] for collection, tree in variables.items()}
    np.testing.assert_allclose(found["block"], block.apply(own, IMAGES), atol=1e-5)
    inner = inspection.outputs(block, own, IMAGES, ["norm1"])["norm1"]
    np.testing.assert_allclose(found["block/norm1"], inner, atol=1e-5)
    head = variables["params"]["head"]
    expected = found["shared"] @ head["kernel"] + head["bias"].reshape(1, -1)
    np.testing.assert_allclose(found["head"], expected, atol=1e-5)


# --- replaced


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, VGG])
def test_any_output_can_be_replaced_by_itself_and_what_is_before_it_is_not_run(config):
    model = models.build(config, 3)
    variables = start(model)
    expected = model.apply(variables, IMAGES)
    names = [row.name for row in inspection.summarize(model, SHAPE)]
    names += [name.rpartition("/")[0] for name in names if "/" in name]
    for name, output in inspection.outputs(model, variables, IMAGES, names).items():
        with inspection.replaced({name: output}):
            np.testing.assert_array_equal(model.apply(variables, IMAGES), expected)
        with inspection.replaced({name: 1 + output}):
            changed = model.apply(variables, IMAGES)
        assert not np.array_equal(changed, expected), name
    with inspection.replaced(inspection.outputs(model, variables, IMAGES, names[-1:])):
        assert np.isfinite(model.apply(variables, jnp.full_like(IMAGES, jnp.nan))).all()


def test_a_layer_that_is_called_twice_has_no_one_output_to_replace():
    variables = start(Odd())
    output = inspection.outputs(Odd(), variables, IMAGES, ["shared"])
    with (
        inspection.replaced(output),
        pytest.raises(UserError, match="shared is called more than once"),
    ):
        Odd().apply(variables, IMAGES)
    side = inspection.outputs(Odd(), variables, IMAGES, ["side"])
    with inspection.replaced(side):
        Odd().apply(variables, IMAGES)
        Odd().apply(variables, IMAGES)  # Another call of the network is not a second call in it.


# --- frozen_in_eval_mode


def test_frozen_norms_of_a_residual_network_use_statistics_that_do_not_move():
    model = models.build(SMALL, 3)
    variables = start(model)
    trained = trainable(variables, r"(stage2/block1/conv2|head)/.*")
    logits, stats = train(model, variables, IMAGES, trained)
    for name, leaf in leaves({"batch_stats": variables["batch_stats"]}).items():
        np.testing.assert_array_equal(stats[name], leaf)
    np.testing.assert_allclose(logits, model.apply(variables, IMAGES), atol=1e-5)


def test_norms_that_are_trained_move_and_no_others():
    model = models.build(SMALL, 3)
    variables = start(model)
    trained = trainable(variables, r"stage2/block1/shortcut_norm/scale|head/.*")
    _, stats = train(model, variables, IMAGES, trained)
    for name, leaf in leaves({"batch_stats": variables["batch_stats"]}).items():
        assert np.array_equal(stats[name], leaf) != ("stage2/block1/shortcut_norm" in name), name


class Dropping(nn.Module):
    """Dropout in a layer and on its own, and a layer of one's own that is told of training."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = layers.Dense(8, activation="relu", dropout=0.5, name="fc1")(images.mean((1, 2)), train)
        x = Noise(name="noise")(x, train)
        x = nn.Dropout(0.5, name="drop")(x, not train)
        return nn.Dense(3, name="head")(x)


class Noise(nn.Module):
    """Adds noise in training, and holds a parameter."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = x + self.param("shift", nn.initializers.zeros, (8,)).reshape(1, 8)
        return x + jax.random.normal(self.make_rng("dropout"), x.shape) if train else x


def test_dropout_belongs_to_the_module_around_it():
    """Dropout on its own is frozen only together with the whole network."""
    model = Dropping()
    variables = start(model)
    variables["params"]["head"]["kernel"] = jnp.ones((8, 3))
    outputs = {name: model.apply(variables, IMAGES) for name in ("", "drop")}

    def logits(pattern: str, seed: int, replaced: dict) -> np.ndarray:
        with inspection.replaced(replaced):
            return train(model, variables, IMAGES, trainable(variables, pattern), seed)[0]

    drop = inspection.outputs(model, variables, IMAGES, ["drop"])
    np.testing.assert_array_equal(logits("head/.*", 0, drop), outputs["drop"])
    assert not np.array_equal(logits("head/.*", 0, {}), logits("head/.*", 1, {}))
    np.testing.assert_allclose(logits("", 0, {}), outputs[""], atol=1e-6)
    noise = inspection.outputs(model, variables, IMAGES, ["noise"])
    fc1 = inspection.outputs(model, variables, IMAGES, ["fc1"])
    frozen = logits("head/.*", 0, {})
    np.testing.assert_array_equal(logits("head/.*", 0, noise), frozen)
    np.testing.assert_array_equal(logits("head/.*", 0, fc1), frozen)
    assert not np.array_equal(logits("(head|noise)/.*", 0, fc1), frozen)
    assert not np.array_equal(logits("(head|fc1)/.*", 0, {}), frozen)


class Constructed(nn.Module):
    """BatchNorm that learns of training when it is constructed."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(images)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_a_frozen_norm_constructed_for_training_is_refused_in_one_line():
    variables = start(Constructed())
    train(Constructed(), variables, IMAGES, variables["params"])
    with pytest.raises(UserError) as caught:
        train(Constructed(), variables, IMAGES, trainable(variables, "head/.*"))
    assert str(caught.value) == (
        "norm is frozen, but is constructed with use_running_average=False; "
        "pass use_running_average to its call instead"
    )
    with inspection.frozen_in_eval_mode(
        variables["params"], trainable(variables, "head/.*")
    ):  # In evaluation it is as it should be.
        Constructed().apply(variables, IMAGES)


# --- cut_point


def cut(model: nn.Module, pattern: str) -> str:
    variables = start(model)
    return inspection.cut_point(model, variables, SHAPE, trainable(variables, pattern))


@pytest.mark.parametrize(
    ("config", "pattern", "expected"),
    [
        (VGG, "head/.*", "fc2"),
        (VGG, "(fc2|head)/.*", "fc1"),
        (VGG, "(fc.|head)/.*", "block2"),
        (VGG, "(fc.|head|block2)/.*", "block1"),
        (VGG, "(fc.|head|block2|block1/conv2)/.*", "block1/conv1"),
        (ModelConfig(blocks=((4, 4),), dense=(8,)), "(fc1|head)/.*", "pool"),
        (ModelConfig(blocks=((4, 4),), dense=(8,)), "(conv2|fc1|head)/.*", "conv1"),
        (SMALL, "head/.*", "pool"),
        (SMALL, "(stage2|head)/.*", "stage1"),
        (SMALL, "(stage2/block2|head)/.*", "stage2/block1"),
        (SMALL, "(stage2/block1/conv2|stage2/block2|head)/.*", "stage1"),
        (SMALL, "(stage2/block1/shortcut|head)/.*", "stage1"),
        (SMALL, "(stage1/block2|stage2|head)/.*", "stage1/block1"),
        (SMALL, "(stage.|head)/.*", "stem_norm"),
        (SMALL, "(stage.|head|stem_norm)/.*", "stem"),
    ],
)
def test_the_cut_is_as_late_as_can_be(config: ModelConfig, pattern: str, expected: str):
    assert cut(models.build(config, 3), pattern) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "pattern"),
    [(VGG, "(fc.|head)/.*"), (SMALL, "(stage2/block1/conv2|stage2/block2|head)/.*")],
)
def test_training_from_the_cut_is_training_from_the_images(config: ModelConfig, pattern: str):
    model = models.build(config, 3)
    variables = start(model)
    trained = trainable(variables, pattern)
    name = inspection.cut_point(model, variables, SHAPE, trained)
    logits, stats = train(model, variables, IMAGES, trained)
    with inspection.replaced(inspection.outputs(model, variables, IMAGES, [name])):
        found, found_stats = train(model, variables, jnp.full_like(IMAGES, jnp.nan), trained)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert list(stats) == list(found_stats)
    for leaf_name, leaf in stats.items():
        np.testing.assert_allclose(found_stats[leaf_name], leaf, atol=1e-5)


def test_the_input_of_the_first_trainable_layer_is_no_cut_where_a_network_branches():
    """What a chain of layers could be cut at: here the shortcut still reads the images."""
    model = models.build(SMALL, 3)
    variables = start(model)
    first = "stage2/block1/conv2"
    known = input_of(first, model, variables, IMAGES)

    def replace(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if "/".join(context.module.path) == first:
            args = (known, *args[1:])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(replace):
        logits = model.apply(variables, jnp.full_like(IMAGES, jnp.nan))
    assert np.isnan(logits).all()
    assert cut(model, f"({first}|stage2/block2|head)/.*") == "stage1"


class Masking(nn.Module):
    """A second way from the images to the logits that NaN does not take."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(4, name="fc1")(images.mean((1, 2)))
        bright = jnp.max(jnp.where(images > 0, 1.0, 0.0), axis=(1, 2))
        return nn.Dense(3, name="head")(jnp.concatenate([x, bright], axis=1))


class SharedPool(nn.Module):
    """One pool after two convolutions, which in training return the pool's value."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        pool, x = layers.MaxPool(name="pool"), images
        for name in ("conv1", "conv2"):
            x = layers.conv_then_pool(layers.Conv(4, activation="relu", name=name), pool, x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Method(nn.Module):
    """A module of which a method other than __call__ is used, with parameters."""

    def setup(self):
        self.body = Body()
        self.fc1 = nn.Dense(4)
        self.head = nn.Dense(3)

    def __call__(self, images, train: bool = False):
        return self.head(self.fc1(self.body.embed(images.mean((1, 2)))))


class Body(nn.Module):
    @nn.compact
    def embed(self, x):
        return nn.Dense(5, name="inner")(x) * self.param("scale", nn.initializers.ones, (1, 5))


@pytest.mark.parametrize(
    ("model", "pattern", "expected"),
    [
        (Odd(), "head/.*", "first"),
        (Odd(), "head/.*|scale", "first"),
        (Odd(), "(head|first)/.*", ""),
        (Masking(), "head/.*", ""),
        (SharedPool(), "head/.*", ""),
        (Dropping(), "head/.*", "noise"),
        (Dropping(), "(head|noise)/.*", "fc1"),
        (Method(), "head/.*", "fc1"),
        (Method(), "head/.*|body/scale", "body/inner"),
        (Remade(), "head/.*", ""),
        (models.build(SMALL, 3), ".*", ""),
    ],
)
def test_networks_of_ones_own_are_cut_where_they_can_be_or_refused(model, pattern, expected):
    """The layer `shared` of Odd is called twice. Of Method, fc1 is frozen but reads body/scale."""
    if expected:
        assert cut(model, pattern) == expected
    else:
        with pytest.raises(UserError, match="no frozen layer whose output is all that the"):
            cut(model, pattern)
