"""The networks: parameter counts of the chapter, layer names, and the effect of each field."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import configs, models, trees
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models import initializers, inspection

CIFAR = (32, 32, 3)
SMALL = ModelConfig(name="vgg", blocks=((4, 4), (8,)), dense=(16, 12))
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))


def rows(config: ModelConfig, shape: tuple[int, int, int] = CIFAR) -> list[inspection.LayerSummary]:
    return inspection.summarize(models.build(config, 10), shape)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("simple_cnn", 6_583_192),
        ("vgg1", 83_973_962),
        ("vgg2", 50_640_970),
        ("vgg3", 35_339_082),
        ("vgg_dropout", 35_339_082),
    ],
)
def test_parameter_counts_of_the_chapter(name: str, count: int):
    model = models.build(configs.get(name).model, 10)
    images = jnp.zeros((1, *CIFAR))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert trees.param_count(params) == count
    assert sum(row.params for row in inspection.summarize(model, CIFAR)) == count


def test_layers_of_simple_cnn():
    found = [(r.name, r.kind, r.output_shape) for r in rows(configs.get("simple_cnn").model)]
    assert found == [
        ("conv1", "Conv", (32, 32, 50)),
        ("conv2", "Conv", (32, 32, 50)),
        ("pool", "MaxPool", (16, 16, 50)),
        ("fc1", "Dense", (512,)),
        ("head", "Dense", (10,)),
    ]


def test_layers_of_vgg_dropout():
    found = [(r.name, r.output_shape) for r in rows(configs.get("vgg_dropout").model)]
    assert found == [
        ("block1/conv1", (32, 32, 64)),
        ("block1/conv2", (32, 32, 64)),
        ("block1/pool", (16, 16, 64)),
        ("block2/conv1", (16, 16, 128)),
        ("block2/conv2", (16, 16, 128)),
        ("block2/pool", (8, 8, 128)),
        ("block3/conv1", (8, 8, 256)),
        ("block3/conv2", (8, 8, 256)),
        ("block3/conv3", (8, 8, 256)),
        ("block3/pool", (4, 4, 256)),
        ("fc1", (4096,)),
        ("fc1/dropout", (4096,)),
        ("fc2", (4096,)),
        ("fc2/dropout", (4096,)),
        ("head", (10,)),
    ]


def test_flops_are_two_for_each_multiplication():
    by_name = {row.name: row.flops for row in rows(configs.get("simple_cnn").model)}
    assert by_name["conv1"] == 2 * 32 * 32 * 3 * 3 * 3 * 50
    assert by_name["conv2"] == 2 * 32 * 32 * 3 * 3 * 50 * 50
    assert by_name["fc1"] == 2 * 16 * 16 * 50 * 512
    assert by_name["pool"] == 0


@pytest.mark.slow
def test_kernels_start_glorot_uniform_and_biases_at_zero():
    params = models.build(SMALL, 10).init(jax.random.key(0), IMAGES)["params"]
    for name, leaf in trees.named_leaves(params).items():
        if name.endswith("bias"):
            assert not np.any(leaf)
            continue
        receptive = int(np.prod(leaf.shape[:-2]))
        limit = np.sqrt(6 / (receptive * (leaf.shape[-2] + leaf.shape[-1])))
        assert 0.85 * limit < np.abs(leaf).max() <= limit, name


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("glorot_uniform", np.sqrt(6 / (27 + 45))),
        ("he_uniform", np.sqrt(6 / 27)),
        ("narrow_uniform", 0.01),
    ],
)
def test_the_initializer_sets_the_width_of_every_kernel(name: str, limit: float):
    kernel = initializers.INITIALIZERS[name](jax.random.key(0), (3, 3, 3, 5))
    assert 0.95 * limit < np.abs(kernel).max() <= limit
    config = ModelConfig(name="vgg", blocks=((4,),), dense=(6,), initializer=name)  # pyright: ignore
    params = models.build(config, 10).init(jax.random.key(0), IMAGES)["params"]
    default = models.build(replace(config, initializer="glorot_uniform"), 10)
    same = default.init(jax.random.key(0), IMAGES)["params"]
    for layer, leaf in trees.named_leaves(params).items():
        glorot = np.asarray(trees.named_leaves(same)[layer])
        differs = name != "glorot_uniform" and layer.endswith("kernel")
        assert np.array_equal(leaf, glorot) != differs, layer


@pytest.mark.parametrize("name", ["simple_cnn", "vgg"])
def test_a_block_ends_as_pooling_says(name: str):
    """All three halve the side and have the same parameters; only the rest of the block differs."""
    config = ModelConfig(name=name, blocks=((4, 6),), dense=())  # pyright: ignore
    prefix = "block1/" if name == "vgg" else ""
    found = {}
    for pooling in ("max", "average", "stride"):
        made = inspection.summarize(models.build(replace(config, pooling=pooling), 10), (8, 8, 3))
        found[pooling] = [(r.name.removeprefix(prefix), r.output_shape, r.params) for r in made]
    assert (
        found["max"]
        == found["average"]
        == [
            ("conv1", (8, 8, 4), 112),
            ("conv2", (8, 8, 6), 222),
            ("pool", (4, 4, 6), 0),
            ("head", (10,), 970),
        ]
    )
    assert found["stride"] == [
        ("conv1", (8, 8, 4), 112),
        ("conv2", (4, 4, 6), 222),
        ("head", (10,), 970),
    ]


def test_average_pooling_averages_what_max_pooling_takes_the_largest_of():
    config = ModelConfig(name="simple_cnn", blocks=((4,),), dense=())
    largest, mean = (models.build(replace(config, pooling=p), 10) for p in ("max", "average"))
    variables = largest.init(jax.random.key(0), IMAGES)
    maps = np.asarray(inspection.outputs(largest, variables, IMAGES, ["conv1"])["conv1"])
    windows = maps.reshape(2, 4, 2, 4, 2, 4)
    for model, pooled in ((largest, windows.max(axis=(2, 4))), (mean, windows.mean(axis=(2, 4)))):
        found = inspection.outputs(model, variables, IMAGES, ["pool"])["pool"]
        np.testing.assert_allclose(found, pooled, atol=1e-7)


def test_a_kernel_is_drawn_evenly_and_no_row_twice():
    """More rows than are drawn at once, and not a multiple of them."""
    kernel = np.asarray(initializers.glorot_uniform(jax.random.key(0), (3, 100, 40)), np.float64)
    limit = np.sqrt(6 / (3 * 140))
    rows = kernel.reshape(300, 40)
    assert len(np.unique(rows, axis=0)) == 300
    counts, _ = np.histogram(kernel, bins=10, range=(-limit, limit))
    assert counts.sum() == 12000
    assert abs(counts - 1200).max() < 5 * np.sqrt(1200)
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.05


def by_hand(params: dict, images: np.ndarray, activation) -> np.ndarray:
    """SMALL written out with lax and numpy."""
    x = images
    for block, convs in (("block1", ("conv1", "conv2")), ("block2", ("conv1",))):
        for conv in convs:
            p = params[block][conv]
            x = jax.lax.conv_general_dilated(
                x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = activation(x + p["bias"].reshape(1, 1, 1, -1))
        n, h, w, c = x.shape
        x = np.asarray(x).reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2"):
        x = activation(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("tanh", np.tanh),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_forward_equals_the_network_written_out(name, function, train: bool):
    config = ModelConfig(name="vgg", blocks=SMALL.blocks, dense=SMALL.dense, activation=name)
    model = models.build(config, 10)
    variables = model.init(jax.random.key(0), IMAGES)
    expected = by_hand(variables["params"], np.asarray(IMAGES), function)
    found = model.apply(variables, IMAGES, train=train)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "at_once"), [("max", 3), ("average", 3), ("stride", 1)])
def test_training_computes_at_once_what_evaluation_does_layer_by_layer(pooling: str, at_once: int):
    config = ModelConfig(name="vgg", blocks=((16, 16), (16,)), dense=(16,), pooling=pooling)
    model = models.build(config, 10)
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 16))
    variables = model.init(jax.random.key(0), images)
    plain = model.apply(variables, images)
    np.testing.assert_allclose(model.apply(variables, images, train=True), plain, atol=1e-6)
    program = str(jax.make_jaxpr(lambda x: model.apply(variables, x, train=True))(images))
    assert program.count("name=conv_relu") == at_once  # With and without a pool.
    assert "name=max_pool" not in program


def test_dropout_acts_in_training_only_and_follows_its_key():
    config = ModelConfig(name="vgg", blocks=SMALL.blocks, dense=SMALL.dense, dropout=0.5)
    model = models.build(config, 10)
    variables = models.build(SMALL, 10).init(jax.random.key(0), IMAGES)

    def apply(seed: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, IMAGES, train=True, rngs=rngs))

    plain = models.build(SMALL, 10).apply(variables, IMAGES)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), plain)
    np.testing.assert_array_equal(apply(1), apply(1))
    assert not np.array_equal(apply(1), apply(2))
    assert not np.array_equal(apply(1), plain)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    config = ModelConfig(name="vgg", blocks=SMALL.blocks, dense=SMALL.dense, dtype="bfloat16")
    model = models.build(config, 10)
    variables = model.init(jax.random.key(0), IMAGES)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    logits = model.apply(variables, IMAGES)
    exact = models.build(SMALL, 10).apply(variables, IMAGES)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, exact)
    np.testing.assert_allclose(logits, exact, atol=0.05)


def test_summarize_computes_nothing_and_leaves_grayscale_to_the_caller():
    shapes = [row.output_shape for row in rows(SMALL, (9, 9, 1))]
    assert shapes[0] == (9, 9, 4)
    assert shapes[2] == (4, 4, 4)


def test_layers_and_work_of_airbench():
    found = rows(configs.get("airbench").model)
    assert [(r.name, r.output_shape) for r in found] == [
        ("whiten", (31, 31, 24)),
        ("group1/conv1", (31, 31, 64)),
        ("group1/pool", (15, 15, 64)),
        ("group1/norm1", (15, 15, 64)),
        ("group1/conv2", (15, 15, 64)),
        ("group1/norm2", (15, 15, 64)),
        ("group2/conv1", (15, 15, 256)),
        ("group2/pool", (7, 7, 256)),
        ("group2/norm1", (7, 7, 256)),
        ("group2/conv2", (7, 7, 256)),
        ("group2/norm2", (7, 7, 256)),
        ("group3/conv1", (7, 7, 256)),
        ("group3/pool", (3, 3, 256)),
        ("group3/norm1", (3, 3, 256)),
        ("group3/conv2", (3, 3, 256)),
        ("group3/norm2", (3, 3, 256)),
        ("pool", (1, 1, 256)),
        ("head", (10,)),
    ]
    assert sum(row.params for row in found) == 1_971_640
    assert sum(row.flops for row in found) == 236_294_720


AIRBENCH = ModelConfig(name="airbench", blocks=((4, 6), (5,)), dense=(), activation="gelu")
WIDE = jax.random.uniform(jax.random.key(1), (3, 14, 14, 3))


@functools.cache
def airbench_start() -> dict:
    return jax.jit(models.build(AIRBENCH, 10).init)(jax.random.key(0), WIDE)


def test_airbench_starts_as_pytorch_does_with_an_identity_in_each_group():
    variables = airbench_start()
    params = trees.named_leaves(variables["params"])
    fan_in = {"whiten/kernel": 12, "whiten/bias": 12, "head/kernel": 5}
    fan_in |= {"group1/conv1/kernel": 216, "group1/conv2/kernel": 36, "group2/conv1/kernel": 54}
    norms = {"group1/norm1/bias", "group1/norm2/bias", "group2/norm1/bias"}
    assert set(params) == fan_in.keys() | norms
    assert not any(np.any(params[name]) for name in norms)
    for name, n in fan_in.items():
        kernel = np.array(params[name])
        if "conv" in name:
            first = min(kernel.shape[2:])
            identity = np.zeros(kernel[..., :first].shape)
            identity[1, 1, range(first), range(first)] = 1
            np.testing.assert_array_equal(kernel[..., :first], identity)
            kernel = kernel[..., first:]
        if kernel.size:
            assert 0.75 / np.sqrt(n) < np.abs(kernel).max() <= 1 / np.sqrt(n), name


def airbench_by_hand(variables: dict, train: bool) -> tuple[np.ndarray, dict]:
    """AIRBENCH written out, and the statistics of the batch by layer."""
    params, seen = variables["params"], {}

    def convolve(x, kernel, padding):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    def gelu(x):
        return x * jax.scipy.stats.norm.cdf(x)

    def pool(x, side):
        n, h, w, c = x.shape
        x = np.asarray(x)[:, : h // side * side, : w // side * side]
        return x.reshape(n, h // side, side, w // side, side, c).max(axis=(2, 4))

    def norm(x, group, name):
        x = np.asarray(x, np.float64)
        stats = variables["batch_stats"][group][name]
        seen[group, name] = batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        stats = {k: np.reshape(v, (1, 1, 1, -1)) for k, v in (batch if train else stats).items()}
        x = (x - stats["mean"]) / np.sqrt(stats["var"])
        return gelu((x + np.reshape(params[group][name]["bias"], (1, 1, 1, -1))).astype(np.float32))

    whiten = params["whiten"]
    x = convolve(WIDE, whiten["kernel"], "VALID") + whiten["bias"].reshape(1, 1, 1, -1)
    x = pool(convolve(gelu(x), params["group1"]["conv1"]["kernel"], "SAME"), 2)
    x = convolve(norm(x, "group1", "norm1"), params["group1"]["conv2"]["kernel"], "SAME")
    x = convolve(norm(x, "group1", "norm2"), params["group2"]["conv1"]["kernel"], "SAME")
    x = pool(norm(pool(x, 2), "group2", "norm1"), 3).reshape(3, 5)
    return x @ np.asarray(params["head"]["kernel"]) / 9, seen


@pytest.mark.parametrize("train", [False, True])
def test_airbench_equals_the_network_written_out(train: bool):
    model, variables = models.build(AIRBENCH, 10), airbench_start()
    # Biases and statistics start at 0 and 1, with which much could be wrong unnoticed.
    variables = jax.tree.map(
        lambda x: x + 0.3 * np.random.default_rng(x.size).random(x.shape, np.float32), variables
    )
    expected, seen = airbench_by_hand(variables, train)
    apply = jax.jit(lambda v: model.apply(v, WIDE, train=train, mutable=["batch_stats"]))
    found, mutated = apply(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    for (group, name), batch in seen.items():
        for kind, old in variables["batch_stats"][group][name].items():
            moved = 0.6 * old + 0.4 * batch[kind] if train else old
            new = mutated["batch_stats"][group][name][kind]
            np.testing.assert_allclose(new, moved, rtol=1e-5, atol=1e-6)


RESNET = ModelConfig(name="resnet_small", blocks=((4, 6), (6, 5)), dense=())


def resnet_by_hand(variables: dict, train: bool) -> np.ndarray:
    """RESNET written out."""

    def convolve(x, kernel, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        border = 2 * [2 * [kernel.shape[0] // 2]]
        return jax.lax.conv_general_dilated(x, kernel, strides, border, dimension_numbers=numbers)

    def norm(x, params, stats):
        x = np.asarray(x, np.float64)
        if train:
            stats = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        scale, bias, mean, var = (
            np.reshape(v, (1, 1, 1, -1))
            for v in (params["scale"], params["bias"], stats["mean"], stats["var"])
        )
        return ((x - mean) / np.sqrt(var + 1e-5) * scale + bias).astype(np.float32)

    def block(x, params, stats, stride):
        y = norm(convolve(x, params["conv1"]["kernel"], stride), params["norm1"], stats["norm1"])
        y = convolve(np.maximum(y, 0), params["conv2"]["kernel"])
        y = norm(y, params["norm2"], stats["norm2"])
        if "shortcut" in params:
            x = convolve(x, params["shortcut"]["kernel"], stride)
            x = norm(x, params["shortcut_norm"], stats["shortcut_norm"])
        return np.maximum(x + y, 0)

    params, stats = variables["params"], variables["batch_stats"]
    x = norm(convolve(IMAGES, params["stem"]["kernel"]), params["stem_norm"], stats["stem_norm"])
    x = np.maximum(x, 0)
    for stage, name, stride in (
        ("stage1", "block1", 1),
        ("stage1", "block2", 1),
        ("stage2", "block1", 2),
        ("stage2", "block2", 1),
    ):
        x = block(x, params[stage][name], stats[stage][name], stride)
    head = params["head"]
    return x.mean((1, 2)) @ np.asarray(head["kernel"]) + np.reshape(head["bias"], (1, -1))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_resnet_equals_the_network_written_out(train: bool):
    model = models.build(RESNET, 10)
    variables = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).random(x.shape, np.float32),
        jax.jit(model.init)(jax.random.key(0), IMAGES),
    )
    apply = jax.jit(lambda v: model.apply(v, IMAGES, train=train, mutable=["batch_stats"]))
    found, mutated = apply(variables)
    np.testing.assert_allclose(found, resnet_by_hand(variables, train), rtol=1e-4, atol=1e-4)
    for name, old in trees.named_leaves(variables["batch_stats"]).items():
        moved = not np.array_equal(trees.named_leaves(mutated["batch_stats"])[name], old)
        assert moved == train, name


def test_running_statistics_of_resnet_take_up_a_tenth_of_each_batch():
    """Faster than linen's default of a hundredth, so that few epochs are enough for them."""
    model = models.build(RESNET, 10)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    apply = jax.jit(lambda v: model.apply(v, IMAGES, train=True, mutable=["batch_stats"]))
    _, mutated = apply(variables)
    stem = inspection.outputs(model, variables, IMAGES, ["stem"])["stem"]
    expected = 0.1 * np.mean(stem, axis=(0, 1, 2))
    np.testing.assert_allclose(
        mutated["batch_stats"]["stem_norm"]["mean"], expected, rtol=1e-4, atol=1e-6
    )


def test_parameters_of_resnet_are_a_contract_with_checkpoints():
    """A block has a shortcut where its input has another shape: here in three of four."""
    model = models.build(RESNET, 10)
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    found = {name: leaf.shape for name, leaf in trees.named_leaves(params).items()}
    expected = {"stem/kernel": (3, 3, 3, 4), "head/kernel": (5, 10), "head/bias": (10,)}
    norms = {"stem_norm": 4}
    for block, n_in, n_out in (
        ("stage1/block1", 4, 4),
        ("stage1/block2", 4, 6),
        ("stage2/block1", 6, 6),
        ("stage2/block2", 6, 5),
    ):
        expected[f"{block}/conv1/kernel"] = (3, 3, n_in, n_out)
        expected[f"{block}/conv2/kernel"] = (3, 3, n_out, n_out)
        norms |= {f"{block}/norm1": n_out, f"{block}/norm2": n_out}
        if block != "stage1/block1":
            expected[f"{block}/shortcut/kernel"] = (1, 1, n_in, n_out)
            norms[f"{block}/shortcut_norm"] = n_out
    for name, n in norms.items():
        expected |= {f"{name}/scale": (n,), f"{name}/bias": (n,)}
    assert found == expected


def test_resnet_starts_as_he_et_al_do():
    model = models.build(replace(RESNET, blocks=((16,), (64,))), 10)
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
    for name, leaf in trees.named_leaves(params).items():
        if name.endswith("bias"):
            assert not np.any(leaf), name
        elif name.endswith("scale"):
            assert np.all(leaf == 1), name
        else:
            gain = 1 if name == "head/kernel" else 2  # No ReLU follows the head.
            variance = gain / np.prod(leaf.shape[:-1])
            assert 0.75 < np.var(leaf) / variance < 1.3, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "simple_cnn", "blocks": ((4,), (4,))}, "simple_cnn has one block; use model.nam"),
        ({"name": "vgg16", "blocks": ((4,),) * 5, "dense": (8, 8)}, "blocks of 2, 2, 3, 3 and 3 c"),
        ({"name": "airbench"}, "model.name=airbench has no hidden dense layers; set model.dense="),
        ({"name": "resnet_small"}, "resnet_small has no hidden dense layers; set model.dense="),
        ({"name": "resnet_small", "dense": (), "pooling": "average"}, "has its own pooling; leave"),
        ({"name": "airbench", "dense": (), "initializer": "he_uniform"}, "has its own initializer"),
        (
            {"name": "efficientnet_lite0", "dense": (), "activation": "gelu", "pooling": "stride"},
            "has its own pooling and activation; leave out model.pooling and model.activation",
        ),
        ({"name": "resnet_small", "dense": (), "blocks": ()}, "resnet_small needs model.blocks, s"),
        ({"name": "vgg", "blocks": ()}, "vgg needs model.blocks, such as [[64,64],[128,128]]"),
        (
            {"name": "airbench_residual", "dense": (), "blocks": ((4, 4), (4, 5))},
            "airbench_residual needs two or more equal widths in each block of model.blocks",
        ),
        ({"name": "airbench", "dense": (), "dropout": 0.5}, "airbench needs model.blocks, and has"),
        ({"dropout": 0.5, "dense": ()}, "model.dropout follows the hidden dense layers, and model"),
        (
            {"name": "vgg", "dropout": 0.5, "dense": ()},
            "follows the hidden dense layers, and model",
        ),
    ],
)
def test_a_network_refuses_settings_that_do_not_suit_it(changes: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        models.build(replace(ModelConfig(), **changes), 10)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig(blocks=((4, 4),)), {"conv1", "conv2", "fc1"}),
        (SMALL, {"block2", "fc1", "fc2"}),
        (replace(SMALL, dense=()), {"block2"}),
        (AIRBENCH, {"group2"}),
        (RESNET, {"stage2"}),
    ],
)
def test_the_last_block_is_the_last_and_the_dense_layers_above(config: ModelConfig, expected: set):
    model = models.build(config, 10)
    pattern = models.last_block(model) + "/.*"
    names = inspection.param_names(model, (14, 14, 3))
    assert {name.split("/")[0] for name in names if re.fullmatch(pattern, name)} == expected


OWN = """
import flax.linen as nn
from cnn_jax.config import ModelConfig

class Net(nn.Module):
    config: ModelConfig
    n_classes: int

    last_block = "body"

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(self.config.blocks[0][0], (3, 3), name="body")(images)
        return nn.Dense(self.n_classes, name="head")(x.mean((1, 2)))

def net(config, n_classes):
    return nn.Dense(n_classes)

def number(config, n_classes):
    return 3

def lonely(config):
    return Net(config, 3)
"""


def test_a_network_in_a_file_of_one_s_own(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    config = ModelConfig(name=f"{tmp_path}/own.py:Net", blocks=((7,),))
    model = models.build(config, 5)
    assert inspection.param_names(model, (8, 8, 3)) == [
        "body/bias",
        "body/kernel",
        "head/bias",
        "head/kernel",
    ]
    assert [row.output_shape for row in inspection.summarize(model, (8, 8, 3))] == [(8, 8, 7), (5,)]
    assert models.last_block(model) == "(?:body)"
    assert model == models.build(config, 5)
    assert hash(model) == hash(models.build(config, 5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net", ": __call__ must take (images, train): got an unexpected keyword argument 'train'"),
        ("number", " must return a linen module, not int"),
        ("lonely", " must take (config, n_classes): too many positional arguments"),
        ("nte", ": PATH has no nte (did you mean net?)"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path, name: str, message: str):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(UserError) as caught:
        models.build(ModelConfig(name=f"{path}:{name}"), 5)
    assert str(caught.value).removeprefix("model.name=").removeprefix(f"{path}:{name}") == (
        message.replace("PATH", str(path))
    )


def test_a_network_without_last_block_says_so_where_it_is_needed():
    with pytest.raises(
        UserError, match=r'"{last}" needs the attribute last_block of Conv: a regul'
    ):
        models.last_block(nn.Conv(3, (3, 3)))


def test_airbench_refuses_images_that_its_pools_would_use_up():
    assert rows(AIRBENCH, (13, 13, 3))[-2].output_shape == (1, 1, 5)
    with pytest.raises(UserError, match="2 blocks need images of 13x13 or larger, not 12x14"):
        rows(AIRBENCH, (12, 14, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(name="vgg", blocks=((4,),), dense=(6,)),
        ModelConfig(name="airbench", blocks=((4, 4),), dense=(), activation="gelu"),
        ModelConfig(name="resnet_small", blocks=((4,), (6,)), dense=()),
    ],
    ids=lambda model: model.name,
)
def test_a_mean_head_starts_with_a_deviation_of_1_and_averages_its_inputs(model: ModelConfig):
    plain, mean = (models.build(replace(model, mean_head=m), 5) for m in (False, True))
    variables = jax.jit(plain.init)(jax.random.key(0), WIDE)
    started = jax.jit(mean.init)(jax.random.key(0), WIDE)
    kernel, drawn = (np.asarray(v["params"]["head"]["kernel"]) for v in (started, variables))
    assert kernel.std(ddof=1) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(kernel / kernel[0, 0], drawn / drawn[0, 0], rtol=1e-4)
    logits, mean_logits = (jax.jit(net.apply)(variables, WIDE) for net in (plain, mean))
    factor = 9 if model.name == "airbench" else 1
    np.testing.assert_allclose(mean_logits, logits * factor / len(kernel), rtol=1e-5, atol=1e-7)
