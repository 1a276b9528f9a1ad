"""The exported network, run by a process that has JAX or onnxruntime and not this project."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers.cli import finish
from helpers.data import noise, write_photos
from PIL import Image
from test_docs import code

from cnn_jax import fields, models, onnx_writer, trees
from cnn_jax.config import AugmentConfig, Config, DataConfig, ModelConfig
from cnn_jax.data.photos import Layout
from cnn_jax.errors import UserError
from cnn_jax.models import weights
from cnn_jax.predictor import Predictor
from cnn_jax.runs.outcome import load_predictor
from cnn_jax.tools import Request, export

NETWORKS = {
    "simple_cnn": ModelConfig(name="simple_cnn", dense=(8,), activation="tanh"),
    "vgg": ModelConfig(name="vgg", blocks=((4, 4), (8,)), dense=(8,)),
    "vgg_average": ModelConfig(
        name="vgg", blocks=((4,), (4,)), dense=(), pooling="average", activation="gelu"
    ),
    "vgg_stride": ModelConfig(
        name="vgg", blocks=((4,), (4,)), dense=(4,), pooling="stride", activation="sigmoid"
    ),
    "vgg16": ModelConfig(
        name="vgg16", blocks=((4, 4), (4, 4), *((8, 8, 8),) * 3), dense=(8, 8), dropout=0.5
    ),
    "airbench": ModelConfig(name="airbench", blocks=((4,), (8,), (8,)), dense=()),
    "resnet_small": ModelConfig(name="resnet_small", blocks=((4, 4), (8,)), dense=()),
    "resnet18": ModelConfig(name="resnet18", blocks=((4,), (8, 8)), dense=()),
    "resnet50": ModelConfig(name="resnet50", blocks=((4, 4), (8,)), dense=()),
    "efficientnet_lite0": ModelConfig(name="efficientnet_lite0", blocks=(), dense=()),
}
# Of stored squares of 40 pixels the networks see 35.
DATA = DataConfig(crop=0.875, normalize=((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))


def colours(n: int) -> np.ndarray:
    """Returns images that differ in more than noise, for which random networks differ too."""
    return noise(n, 2, 2, 3).repeat(20, axis=1).repeat(20, axis=2)


def small(name: str) -> Predictor:
    """Returns a random network with a temperature that keeps its probabilities off 0 and 1."""
    model = models.build(NETWORKS[name], 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 35, 35, 3)))
    rng = np.random.default_rng(0)

    def draw(path: tuple, array: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
        spread = 1.5 / np.sqrt(np.prod(array.shape[:-1])) if len(array.shape) > 1 else 0.1
        return rng.normal(0, spread, array.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    config = Config(data=DATA, model=NETWORKS[name])
    predictor = Predictor(config, model, variables, ("red", "green", "blue"), (40, 40, 3))
    spread = float(np.std(predictor.logits(colours(5))))
    return replace(predictor, temperature=spread)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_computes_the_same_probabilities(name: str, tmp_path: Path):
    predictor, images = small(name), colours(5)
    path = tmp_path / "predictor.onnx"
    path.write_bytes(export.to_onnx(predictor))
    found = export.run_exported(path, images)
    np.testing.assert_allclose(found, predictor.probabilities(images), atol=export.TOLERANCE)
    assert np.ptp(found, axis=0).max() > 0.01  # not the same for all
    one = export.run_exported(path, images[2:3])
    np.testing.assert_allclose(one, found[2:3], atol=1e-6)


@pytest.mark.parametrize("name", ["vgg16", "resnet_small", "efficientnet_lite0"])
def test_jax_exports_the_same_probabilities_for_both_platforms(name: str, tmp_path: Path):
    predictor, images = small(name), colours(5)
    path = tmp_path / "predictor.jax"
    path.write_bytes(export.serialize(predictor))
    found = export.run_exported(path, images)
    np.testing.assert_allclose(found, predictor.probabilities(images), atol=export.TOLERANCE)
    assert np.ptp(found, axis=0).max() > 0.01
    assert jax.export.deserialize(bytearray(path.read_bytes())).platforms == ("cpu", "cuda")


def test_onnx_has_the_views_of_test_time_and_each_weight_once(tmp_path: Path):
    plain = small("vgg")
    config = replace(plain.config, augment=AugmentConfig(test_time="mirror_translate"))
    predictor, images = replace(plain, config=config), colours(3)
    path = tmp_path / "predictor.onnx"
    path.write_bytes(export.to_onnx(predictor))
    expected = predictor.probabilities(images)
    np.testing.assert_allclose(export.run_exported(path, images), expected, atol=1e-5)
    assert not np.allclose(plain.probabilities(images), expected, atol=1e-3)
    constants = onnx.load(path).graph.initializer
    n_weights = sum(len(constant.raw_data) // 4 for constant in constants)
    n_params = sum(x.size for x in jax.tree.leaves(predictor.variables))
    assert n_params <= n_weights < 1.2 * n_params


def test_onnx_of_a_bfloat16_network_computes_in_float32(tmp_path: Path):
    exact, images = small("vgg"), colours(3)
    half = replace(exact.config, model=replace(exact.config.model, dtype="bfloat16"))
    path = tmp_path / "predictor.onnx"
    path.write_bytes(export.to_onnx(replace(exact, config=half)))
    found = export.run_exported(path, images)
    np.testing.assert_allclose(found, exact.probabilities(images), atol=1e-5)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)[:, :4]


def dilated(x: jax.Array) -> jax.Array:
    kernel = jnp.linspace(-1, 1, 54).reshape(3, 3, 3, 2)
    numbers = ("NHWC", "HWIO", "NHWC")
    padding, rates = ((2, 1), (0, 2)), (2, 1)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, rhs_dilation=rates, dimension_numbers=numbers
    )


def loop(x: jax.Array) -> jax.Array:
    numbers = jnp.arange(3.0)
    total, each = jax.lax.scan(lambda a, b: (a + b, a * b), x, numbers, reverse=True)
    return total + each[1]


OPERATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "average pool": lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME"),
    "max pool with padding": lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (0, 1))),
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "hard swish": jax.nn.hard_swish,
    "clip, power, square root": lambda x: jnp.sqrt(jnp.clip(x, 0.2, 0.8) ** 3),
    "squeeze and excite": lambda x: x * jax.nn.sigmoid(x.mean((1, 2), keepdims=True)),
    "layer norm": lambda x: x * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1),
    "attention": lambda x: jnp.einsum("bhwc,bvwc->bhvw", x, x),
    "slices": lambda x: jnp.concatenate([x[:, 1:3, 2:4], x[:, 4:6, -2:]], axis=2),
    "one row": lambda x: x[:, 3] + x[:, -1],
    "least and largest": lambda x: jnp.stack([x.min((1, 2, 3)), x.max((1, 2, 3))], axis=1),
    "select": lambda x: jnp.where((x > 0.5) & ~(x > 0.7), x, -x),
    "mirrored and moved axes": lambda x: jnp.moveaxis(jnp.flip(x, (1, 2)), 3, 1),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "constant": lambda x: jnp.concatenate([jnp.ones((x.shape[0], 1, 8, 3)), x], axis=1),
    "dilated convolution": dilated,
    "loop": loop,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_has_the_operations_of_other_networks(name: str, tmp_path: Path):
    """Networks in the user's own file may use what ours do not."""

    def function(images: jax.Array) -> jax.Array:
        found = OPERATIONS[name](images.astype(jnp.float32) / 255)
        return found.reshape(images.shape[0], -1)

    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_writer.convert(function, (8, 8, 3)).SerializeToString())
    images = noise(4, 8, 8, 3)
    np.testing.assert_allclose(export.run_exported(path, images), function(images), atol=1e-5)


def test_onnx_names_an_operation_that_it_lacks():
    def function(images: jax.Array) -> jax.Array:
        return jnp.sort(images.astype(jnp.float32).reshape(images.shape[0], -1))

    with pytest.raises(UserError, match=r"no counterpart of sort.*--format=jax has"):
        onnx_writer.convert(function, (8, 8, 3))


LAYOUTS = [
    Layout(40),
    Layout(40, fit="pad"),
    Layout(40, fit="stretch"),
    Layout(300, interpolation="bicubic"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.fit}{layout.side}")
def test_the_golden_photo_tells_the_steps_from_each_other(layout: Layout, tmp_path: Path):
    pixels = export.write_golden(tmp_path, layout)[0]
    np.testing.assert_array_equal(pixels, Image.open(tmp_path / "golden.png"))
    others = [replace(layout, fit=fit) for fit in ("crop", "pad", "stretch") if fit != layout.fit]
    for other in others:
        found = np.asarray(export.write_golden(tmp_path, other)[0], float)
        assert np.abs(found - pixels).mean() > 5
    with Image.open(tmp_path / "golden.jpg") as photo:
        assert photo.size == (240, 320)
        assert photo.getexif()[0x0112] == 6
        photo.convert("RGB").save(tmp_path / "unturned.png")
    unturned = np.asarray(export.photos.load_image(tmp_path / "unturned.png", layout), float)
    assert np.abs(unturned - pixels).mean() > 20


PHOTOS = (
    "--data.name=folder",
    "--data.dir=photos",
    "--data.image_size=21",
    "--data.crop=0.875",
    "--data.normalize=[[0.5,0.4,0.3],[0.2,0.2,0.2]]",
    "--model.blocks=[[16,16]]",  # wide enough for the CPU kernels, which can't be exported
    "--model.dense=[8]",
    "--train.epochs=2",
    "--augment.test_time=mirror_translate",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on photos and both of its exports."""
    folder = tmp_path_factory.mktemp("exported")
    write_photos(folder / "photos", {"cat": 12, "dog": 12}, size=(30, 20))
    finish(*PHOTOS, "--workdir=run", cwd=folder)
    for name in ("jax", "onnx"):
        ended = finish("--mode=export", f"--format={name}", "--workdir=run", cwd=folder)
        assert f"predictor.{name}, predictor.json, golden.jpg, golden.png" in ended.stdout
    return folder


@pytest.mark.slow
def test_the_description_has_the_way_from_a_photo_to_the_probabilities(exported: Path):
    about = json.loads((exported / "run/export/predictor.json").read_text())
    assert about["class_names"] == ["cat", "dog"]
    assert about["photo"] == {
        "rotation": "as the EXIF orientation says",
        "colors": "RGB, transparent pixels over white",
        "side": 24,
        "fit": "crop",
        "interpolation": "bilinear",
    }
    assert about["input"] == ["uint8", ["n", 24, 24, 3]]
    assert about["inside"]["centre"] == [21, 21]
    assert about["inside"]["normalize"] == [[0.5, 0.4, 0.3], [0.2, 0.2, 0.2]]
    golden = np.asarray(Image.open(exported / "run/export/golden.png"))[None]
    predictor = load_predictor(exported / "run", fields.load(exported / "run/config.json"))
    expected = predictor.probabilities(golden)
    np.testing.assert_allclose([about["golden"]["output"]], expected, atol=1e-4)
    photo = exported / "run/export/golden.jpg"
    ended = finish("--mode=predict", "--json", "--workdir=run", str(photo), cwd=exported)
    (found,) = json.loads(ended.stdout)
    assert found["class"] == about["class_names"][expected[0].argmax()]
    assert abs(found["probability"] - expected[0].max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "onnx"])
def test_the_programs_of_the_page_classify_as_predict_does(exported: Path, library: str):
    """They run where this project can't be imported, in the folder of the export."""
    page = (Path(__file__).parents[1] / "docs/photos.md").read_text()
    shown = code(page.split("## Using the network elsewhere")[1], "py")
    ways = {"jax": "jax.export.deserialize", "onnx": "onnxruntime.InferenceSession"}
    (way,) = [block for block in shown if ways[library] in block]
    steps = shown[0] if way == shown[0] else shown[0] + way
    photo = next((exported / "photos/cat").iterdir())
    program = steps + "\nimport sys\nnp.save('found.npy', images)\n"
    program += "print(json.dumps([probabilities.tolist(), [*sys.modules]]))"
    named = exported / "run/export/photo.jpg"
    for path in (photo, exported / "run/export/golden.jpg"):
        with Image.open(path) as image:
            image.convert("RGB").save(named, quality=95, exif=image.getexif())
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        alone = subprocess.run(
            [sys.executable, "-P", "-c", program],
            cwd=exported / "run/export",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert alone.returncode == 0, alone.stderr
        (row,), modules = json.loads(alone.stdout.splitlines()[-1])
        assert not {"cnn_jax", "flax"} & {module.split(".")[0] for module in modules}
        ended = finish("--mode=predict", "--json", "--workdir=run", str(named), cwd=exported)
        (found,) = json.loads(ended.stdout)
        assert found["class"] == ["cat", "dog"][int(np.argmax(row))]
        assert abs(found["probability"] - max(row)) < 2e-3
    pixels = np.load(exported / "run/export/found.npy")[0].astype(int)
    golden = np.asarray(Image.open(exported / "run/export/golden.png"))
    assert np.abs(pixels - golden).max() <= 2


@pytest.mark.slow
def test_a_resnet_is_exported_with_its_weights_for_pytorch(tmp_path: Path):
    resnet = ("--model.name=resnet18", "--model.blocks=[[4],[4]]", "--model.dense=[]")
    data = ("--data.image_size=32", "--data.images_per_class=8", "--train.epochs=1")
    finish(*resnet, *data, "--workdir=run", cwd=tmp_path)
    ended = finish("--mode=export", "--workdir=run", cwd=tmp_path)
    assert "golden.png, resnet18.safetensors in run/export" in ended.stdout
    predictor = load_predictor(tmp_path / "run", fields.load(tmp_path / "run/config.json"))
    found = weights.read(tmp_path / "run/export/resnet18.safetensors")
    assert trees.sha256(found) == trees.sha256(dict(predictor.variables))


def test_onnx_without_its_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        export.run(Request("export", Config(), tmp_path, format="onnx"))


def test_onnx_fuses_what_surrounds_a_convolution(tmp_path: Path):
    """Batch normalisation and ReLU6 are no operations of their own; other uses stay right."""
    kernel = jnp.linspace(-1, 1, 3 * 3 * 3 * 8).reshape(3, 3, 3, 8)
    each = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)

    def convolve(x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def network(images: jax.Array) -> jax.Array:
        y = convolve(images.astype(jnp.float32) / 255)
        y = nn.relu6((y - each) * (2 * each) + 0.5)
        return y.reshape(images.shape[0], -1)

    def branching(images: jax.Array) -> jax.Array:
        y = convolve(images.astype(jnp.float32) / 255)
        rows = each.reshape(1, 8, 1, 1)  # as many numbers, but not one for each channel
        y = jnp.concatenate([y, y * each, y + rows, 1 - y, jnp.minimum(nn.relu(y), each)], -1)
        return jnp.concatenate([y, nn.relu(y)], -1).reshape(images.shape[0], -1)

    images = noise(4, 8, 8, 3)
    for function in (network, branching):
        model = onnx_writer.convert(function, (8, 8, 3))
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        found = export.run_exported(path, images)
        np.testing.assert_allclose(found, function(images), rtol=1e-4, atol=1e-4)
        if function is network:
            kinds = sorted(node.op_type for node in model.graph.node)
            expected = ["Cast", "Clip", "Conv", "Div", "Identity", "Reshape"]
            assert kinds == [*expected, "Transpose", "Transpose"]
