"""Networks of ImageNet against PyTorch's logits; reading and writing weights as safetensors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import make_imagenet_vectors as imagenet
import make_vgg16_vectors as reference
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cnn_jax import configs, kernels, layers, models, pretrained, trees
from cnn_jax.config import Config, DataConfig, InitConfig, ModelConfig
from cnn_jax.data import photos
from cnn_jax.errors import UserError
from cnn_jax.models import inspection, weights
from cnn_jax.predictor import Predictor

SMALL = reference.NARROW


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of a very narrow VGG16 with three classes, with torchvision's names."""
    path = tmp_path / "small.safetensors"
    save_file(reference.weights(**SMALL, n_classes=3), path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights.describe(path)
        weights.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "PATH")


@pytest.mark.slow
def test_logits_are_pytorchs(tmp_path: Path):
    """The whole network at 224x224, and at sizes whose 7x7 averages repeat and overlap pixels."""
    path = tmp_path / "vgg16.safetensors"
    save_file(reference.weights(), path)
    config = weights.describe(path)
    assert config == ModelConfig(
        name="vgg16",
        blocks=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        dense=(4096, 4096),
        dropout=0.5,
    )
    params = weights.read(path)["params"]
    assert trees.param_count(params) == 138_357_544
    apply = jax.jit(models.build(config, 1000).apply)
    with np.load(reference.VECTORS) as expected:
        for size in reference.SIZES:
            found = np.asarray(apply({"params": params}, reference.images(size)))
            error = np.abs(found - expected[f"size{size}"]).max()
            print(f"{size}: largest logit {np.abs(found).max():.3f}, largest error {error:.2e}")
            assert error < 1e-4


@pytest.mark.parametrize("size", reference.NARROW_SIZES)
def test_logits_of_a_narrow_network_are_pytorchs(small: Path, size: int):
    model = models.build(weights.describe(small), 3)
    found = jax.jit(model.apply)(weights.read(small), reference.images(size))
    with np.load(reference.VECTORS) as expected:
        np.testing.assert_allclose(found, expected[f"narrow{size}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", ["torchvision", "timm"])
def test_what_is_read_is_written_back_bit_for_bit(small: Path, tmp_path: Path, style):
    variables = weights.read(small)
    written = tmp_path / "written.safetensors"
    weights.write(variables, weights.describe(small), written, style)
    assert trees.sha256(weights.read(written)) == trees.sha256(variables)
    assert weights.describe(written) == weights.describe(small)
    if style == "torchvision":
        assert trees.sha256(load_file(written)) == trees.sha256(load_file(small))
    else:
        shapes = {name: array.shape for name, array in load_file(written).items()}
        assert shapes["pre_logits.fc1.weight"] == (8, 5, 7, 7)
        assert shapes["pre_logits.fc2.weight"] == (7, 8, 1, 1)
        assert shapes["head.fc.weight"] == (3, 7)
        assert shapes["features.28.weight"] == (5, 4, 3, 3)


def test_timm_s_file_of_the_same_arrays_gives_the_same_params(small: Path, tmp_path: Path):
    arrays = load_file(small)
    renamed = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
    renamed["classifier.6"] = "head.fc"
    for old, new in renamed.items():
        arrays[f"{new}.weight"] = arrays.pop(f"{old}.weight")
        arrays[f"{new}.bias"] = arrays.pop(f"{old}.bias")
    arrays["pre_logits.fc1.weight"] = arrays["pre_logits.fc1.weight"].reshape(8, 5, 7, 7)
    arrays["pre_logits.fc2.weight"] = arrays["pre_logits.fc2.weight"].reshape(7, 8, 1, 1)
    save_file(arrays, tmp_path / "timm.safetensors")
    found = weights.read(tmp_path / "timm.safetensors")
    assert trees.sha256(found) == trees.sha256(weights.read(small))


def test_a_wrong_file_is_one_line(small: Path, tmp_path: Path):
    path = tmp_path / "wrong.safetensors"
    assert refusal(path) == "PATH does not exist"
    path.write_bytes(b"no safetensors at all")
    assert refusal(path).startswith("PATH is not a safetensors file: ")
    arrays = load_file(small)
    save_file({"x": np.zeros(2)}, path)
    assert refusal(path) == (
        "PATH holds none of the known networks (vgg16, resnet18/34/50 or efficientnet_lite0/1/2, "
        "of timm or torchvision); it has x"
    )
    save_file({"features.0.weight": arrays["features.0.weight"]}, path)
    assert refusal(path).endswith("'features.2.weight' is missing")
    save_file(arrays | {"features.1.weight": np.zeros(2)}, path)
    assert refusal(path) == "PATH is not a vgg16: missing or unknown: features.1.weight"
    save_file(arrays | {"features.0.bias": np.zeros(4, np.float16)}, path)
    assert refusal(path) == "PATH: features.0.bias is float16, not float32"
    save_file(arrays | {"features.0.weight": np.zeros((4, 3, 5), np.float32)}, path)
    assert refusal(path) == "PATH: features.0.weight of shape [4, 3, 5] is not of a vgg16"
    save_file(arrays | {"classifier.0.weight": np.zeros((8, 80), np.float32)}, path)
    assert refusal(path) == "PATH: classifier.0.weight of shape [8, 80] is not of a vgg16"


def pretrained_config(checkpoint: str) -> Config:
    return replace(configs.get("finetune_head"), init=InitConfig(checkpoint=checkpoint))


def test_without_its_package_the_hub_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as caught:
        pretrained.adopt(pretrained_config("hf:timm/vgg16.tv_in1k"))
    assert str(caught.value) == (
        "hf:timm/vgg16.tv_in1k needs the package huggingface_hub; install it, "
        "or name a .safetensors file"
    )


def test_normalisation_and_size_come_with_the_file(small: Path):
    base = pretrained_config(str(small))
    adopted = pretrained.adopt(base)
    assert adopted.model == ModelConfig(name="vgg16", **SMALL, dropout=0.5)
    assert adopted.data == replace(
        base.data,
        image_size=224,
        crop=0.875,
        interpolation="bilinear",
        normalize=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )


def test_preprocessing_comes_from_timm_s_config_beside_the_file(small: Path):
    settings = small.with_name("config.json")
    stored = {"input_size": [3, 288, 288], "crop_pct": 0.95, "interpolation": "bicubic"}
    stored |= {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    settings.write_text(json.dumps({"architecture": "vgg16", "pretrained_cfg": stored}))
    adopted = pretrained.adopt(pretrained_config(str(small))).data
    assert (adopted.image_size, adopted.crop, adopted.interpolation) == (288, 0.95, "bicubic")
    assert adopted.normalize == ((0.1, 0.2, 0.3), (1, 2, 3))
    settings.write_text('{"pretrained_cfg": {"crop_pct": 1}}')
    with pytest.raises(UserError, match=r"config.json can't be read: .*input_size"):
        pretrained.adopt(pretrained_config(str(small)))


def test_data_of_its_own_size_is_not_cropped(small: Path):
    base = replace(pretrained_config(str(small)), data=DataConfig(name="cifar10"))
    adopted = pretrained.adopt(base).data
    assert (adopted.crop, adopted.interpolation) == (1.0, "bilinear")
    assert adopted.normalize == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random_file(name: str, folder: Path) -> Path:
    """Writes the random weights of `make_imagenet_vectors` under timm's names."""
    config = ModelConfig(name=name, blocks=(), dense=())
    model, images = models.build(config, imagenet.N_CLASSES), jnp.zeros((1, 64, 64, 3))
    empty = jax.eval_shape(model.init, jax.random.key(0), images)
    path = folder / f"{name}.safetensors"
    weights.write(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty), config, path)
    shapes = {name: array.shape for name, array in load_file(path).items()}
    save_file(imagenet.weights(shapes), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("resnet34", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
        "efficientnet_lite0",
        pytest.param("efficientnet_lite1", marks=pytest.mark.slow),
        pytest.param("efficientnet_lite2", marks=pytest.mark.slow),
    ],
)
def test_logits_of_networks_for_photos_are_pytorchs(name: str, tmp_path: Path):
    path = random_file(name, tmp_path)
    config, variables = weights.describe(path), weights.read(path)
    assert (config.name, config.blocks, config.dense) == (name, (), ())
    apply = jax.jit(models.build(config, imagenet.N_CLASSES).apply)
    with np.load(imagenet.VECTORS) as expected, kernels.use("xla", "highest"):
        for side in imagenet.SIDES:
            found = np.asarray(apply(variables, imagenet.images(side)))
            np.testing.assert_allclose(found, expected[f"{name} {side}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_weights_for_photos_are_written_back_bit_for_bit(name: str, tmp_path: Path):
    path, again = random_file(name, tmp_path), tmp_path / "again.safetensors"
    weights.write(weights.read(path), weights.describe(path), again)
    assert trees.sha256(load_file(again)) == trees.sha256(load_file(path))


@pytest.mark.slow
def test_a_count_of_batches_is_ignored_and_other_widths_are_described(tmp_path: Path):
    config = ModelConfig(name="resnet18", blocks=((4,), (6, 6)), dense=())
    variables = models.build(config, 3).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    path = tmp_path / "narrow.safetensors"
    weights.write(variables, config, path)
    save_file(load_file(path) | {"bn1.num_batches_tracked": np.array([3])}, path)
    assert weights.describe(path) == config
    assert trees.sha256(weights.read(path)) == trees.sha256(dict(variables))


@pytest.mark.slow
def test_real_photos_give_timm_s_logits(shared_photos: Path, lite0_weights: Path):
    """ImageNet's EfficientNet-Lite0, from the files of weights and photos to the logits."""
    config = weights.describe(lite0_weights)
    preprocessing = weights.preprocessing(lite0_weights)
    predictor = Predictor(
        config=Config(
            model=replace(config, precision="highest"),
            data=DataConfig(name="folder", **preprocessing),
        ),
        model=models.build(config, 1000),
        variables=weights.read(lite0_weights),
        class_names=tuple(map(str, range(1000))),
        image_shape=(256, 256, 3),
    )
    layout = photos.Layout.of(predictor.config.data)
    with np.load(imagenet.VECTORS) as expected:
        names = [name for name in expected if name.startswith("photo ")]
        assert len(names) == 3
        for name in names:
            (file,) = shared_photos.glob(f"test/*/{name.removeprefix('photo ')}")
            found = predictor.logits(photos.load_image(file, layout)[None])[0]
            error = np.abs(found - expected[name]).max()
            print(f"{file.name}: largest error {error:.2e}")
            assert error < 1e-4


@pytest.mark.parametrize("size", [32, 33, 64, 150])
def test_images_may_have_any_size_from_32x32_on(size: int):
    model = models.build(ModelConfig(name="vgg16", **SMALL), 3)
    images = jnp.zeros((1, size, size, 3))
    logits, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images))
    assert logits.shape == (1, 3)
    assert variables["params"]["fc1"]["kernel"].shape == (5 * 49, 8)


def test_smaller_images_are_refused():
    model = models.build(ModelConfig(name="vgg16", **SMALL), 3)
    with pytest.raises(UserError, match="5 blocks need images of 32x32 or larger, not 31x31"):
        inspection.param_names(model, (31, 31, 3))


def test_adaptive_average_pool_by_hand():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1)  # windows of 3 pixels for 2 means: {0, 1} and {1, 2}
    found = layers.adaptive_average_pool(x, 2)
    np.testing.assert_allclose(found[0, :, :, 0], [[0.5, 0.5], [1.5, 1.5]])
    np.testing.assert_array_equal(layers.adaptive_average_pool(jnp.ones((1, 1, 1, 2)), 7), 1.0)
