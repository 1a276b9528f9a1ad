"""ImageNet weights of PyTorch's libraries, as safetensors files: read, described and written.

One table for each family of networks pairs the names of our arrays with those of timm and
torchvision. Networks, names and preprocessing are the libraries'; nothing here needs PyTorch.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cnn_jax import trees
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError, one_line
from cnn_jax.models import efficientnet, resnet

Style = Literal["torchvision", "timm"]
Shapes = Mapping[str, tuple[int, ...]]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_VGG16_CONVOLUTIONS = (2, 2, 3, 3, 3)
_VGG16_GRID = 7


class Pair(NamedTuple):
    """An array under both names."""

    ours: str
    """Collection and name, such as "params/stem/kernel"."""
    theirs: str
    kind: Literal["convolution", "dense", "after_grid", "vector"]
    """How the two differ: see `_to_ours`."""


@dataclass(frozen=True)
class Family:
    """Networks whose arrays have the same names."""

    marker: str
    """An array that all of them have and no other family has."""
    describe: Callable[[Shapes], ModelConfig]
    """From the shapes in a file to the network's config."""
    pairs: Callable[[ModelConfig, Style], list[Pair]]


def download(repo: str) -> Path:
    """Downloads model.safetensors and config.json from the Hugging Face hub; returns the former.

    Raises:
        UserError: huggingface_hub is not installed, or the download fails.
    """
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"hf:{repo} needs the package huggingface_hub; install it, or name a .safetensors file"
        ) from None
    try:
        hf_hub_download(repo, "config.json")
        return Path(hf_hub_download(repo, "model.safetensors"))
    except Exception as error:  # The hub's client raises dozens of kinds, of several lines each.
        raise UserError(f"hf:{repo} can't be downloaded: {one_line(error)[:200]}") from None


def describe(path: Path) -> ModelConfig:
    """Returns the config of the network in a file; reads only the file's header.

    Raises:
        UserError: the file is missing or holds none of the networks that are read.
    """
    with _open(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return _network(shapes, path)[0]


def preprocessing(path: Path) -> dict[str, Any]:
    """Returns the fields of the section `data` that belong to the weights in a file.

    They are image_size, crop, interpolation and normalize. A config.json of timm's beside the file
    has them; otherwise they are those that the network was published with.

    Raises:
        UserError: as `describe`, or that config.json is damaged.
    """
    name = describe(path).name
    sides = {"efficientnet_lite1": 240, "efficientnet_lite2": 260}
    crops = {"efficientnet_lite1": 0.882, "efficientnet_lite2": 0.890}
    is_lite = name.startswith("efficientnet_lite")
    found: dict[str, Any] = {
        "image_size": sides.get(name, 224),
        "crop": crops.get(name, 0.875),
        "interpolation": "bicubic" if is_lite else "bilinear",
        "normalize": _HALF if is_lite else _IMAGENET,
    }
    settings = path.with_name("config.json")
    try:
        stored = json.loads(settings.read_text()).get("pretrained_cfg")
        if not stored:
            return found
        return {
            "image_size": int(stored["input_size"][-1]),
            "crop": float(stored["crop_pct"]),
            "interpolation": str(stored["interpolation"]),
            "normalize": (tuple(stored["mean"]), tuple(stored["std"])),
        }
    except FileNotFoundError:
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{settings} can't be read: {one_line(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """Reads a file of float32 weights: the collections "params" and "batch_stats".

    Raises:
        UserError: the file is missing, or its arrays are not those of a network that is read.
    """
    with _open(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config, pairs = _network({name: array.shape for name, array in arrays.items()}, path)
    found = {}
    for pair in pairs:
        array = arrays[pair.theirs]
        if array.dtype != np.float32:
            raise UserError(f"{path}: {pair.theirs} is {array.dtype}, not float32")
        try:
            found[pair.ours] = np.ascontiguousarray(_to_ours(pair.kind, array))
        except ValueError:
            raise UserError(
                f"{path}: {pair.theirs} of shape {list(array.shape)} is not of a {config.name}"
            ) from None
    return {"batch_stats": {}} | flax.traverse_util.unflatten_dict(found, sep="/")


def write(
    variables: Mapping[str, Any], config: ModelConfig, path: Path, style: Style = "torchvision"
) -> None:
    """Writes the variables of a network that can be read, as PyTorch's libraries read them.

    `style` tells timm's names from torchvision's where they differ: in a vgg16.
    """
    arrays = {}
    leaves = trees.named_leaves(dict(variables))
    for pair in _family_of(config).pairs(config, style):
        array = _to_theirs(pair.kind, np.asarray(leaves[pair.ours]))
        if style == "timm" and pair.theirs.startswith("pre_logits") and array.ndim == 2:
            side = _VGG16_GRID if pair.kind == "after_grid" else 1
            array = array.reshape(len(array), -1, side, side)
        arrays[pair.theirs] = np.ascontiguousarray(array)
    save_file(arrays, path, metadata={"format": "pt"})


def is_known(config: ModelConfig) -> bool:
    """Returns whether `write` can write a network of this config."""
    return _key(config) in FAMILIES


def _key(config: ModelConfig) -> str:
    return config.name.rstrip("0123456789") if config.name != "vgg16" else "vgg16"


def _family_of(config: ModelConfig) -> Family:
    return FAMILIES[_key(config)]


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file: {one_line(error)}") from None


def _network(shapes: Shapes, path: Path) -> tuple[ModelConfig, list[Pair]]:
    """Returns the network that a file's arrays belong to, and their names."""
    accepted = "vgg16, resnet18/34/50 or efficientnet_lite0/1/2, of timm or torchvision"
    family = next((f for f in FAMILIES.values() if f.marker in shapes), None)
    if family is None:
        first = ", ".join(sorted(shapes)[:3])
        raise UserError(f"{path} holds none of the known networks ({accepted}); it has {first}")
    try:
        config = family.describe(shapes)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} holds no {accepted}: {one_line(error)} is missing") from None
    style: Style = "timm" if "pre_logits.fc1.weight" in shapes else "torchvision"
    pairs = family.pairs(config, style)
    # PyTorch counts the batches that a BatchNorm has seen; nothing reads the count.
    found = {name for name in shapes if not name.endswith(".num_batches_tracked")}
    if odd := sorted({pair.theirs for pair in pairs} ^ found):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(
            f"{path} is not a {config.name}: missing or unknown: {', '.join(odd[:3])}{more}"
        )
    return config, pairs


def _to_ours(kind: str, array: np.ndarray) -> np.ndarray:
    """Returns linen's array for PyTorch's.

    Convolutions change from OIHW to HWIO, dense layers from [out, in] to [in, out]. After a grid of
    feature maps, the inputs change from the order of flattened CHW to that of HWC.

    Raises:
        ValueError: the shape is not that of such a layer.
    """
    if kind == "vector" or kind == "convolution":
        if array.ndim != (1 if kind == "vector" else 4):
            raise ValueError
        return array if kind == "vector" else array.transpose(2, 3, 1, 0)
    if kind == "after_grid":
        grid = array.reshape(len(array), -1, _VGG16_GRID, _VGG16_GRID)
        return grid.transpose(0, 2, 3, 1).reshape(len(array), -1).T
    return array.reshape(len(array), -1).T


def _to_theirs(kind: str, array: np.ndarray) -> np.ndarray:
    """Returns PyTorch's array for linen's: the inverse of `_to_ours`."""
    if kind == "vector":
        return array
    if kind == "convolution":
        return array.transpose(3, 2, 0, 1)
    if kind == "after_grid":
        grid = array.T.reshape(array.shape[1], _VGG16_GRID, _VGG16_GRID, -1)
        return grid.transpose(0, 3, 1, 2).reshape(array.shape[1], -1)
    return array.T


def _convolution(ours: str, theirs: str) -> Pair:
    return Pair(f"params/{ours}/kernel", f"{theirs}.weight", "convolution")


def _norm(ours: str, theirs: str) -> Iterator[Pair]:
    yield Pair(f"params/{ours}/scale", f"{theirs}.weight", "vector")
    yield Pair(f"params/{ours}/bias", f"{theirs}.bias", "vector")
    yield Pair(f"batch_stats/{ours}/mean", f"{theirs}.running_mean", "vector")
    yield Pair(f"batch_stats/{ours}/var", f"{theirs}.running_var", "vector")


def _dense(ours: str, theirs: str, kind: Literal["dense", "after_grid"] = "dense") -> list[Pair]:
    return [
        Pair(f"params/{ours}/kernel", f"{theirs}.weight", kind),
        Pair(f"params/{ours}/bias", f"{theirs}.bias", "vector"),
    ]


def _describe_vgg16(shapes: Shapes) -> ModelConfig:
    widths, index = [], 0
    for n in _VGG16_CONVOLUTIONS:
        widths.append(tuple(shapes[f"features.{index + 2 * i}.weight"][0] for i in range(n)))
        index += 2 * n + 1
    timm = "pre_logits.fc1.weight" in shapes
    names = ("pre_logits.fc1", "pre_logits.fc2") if timm else ("classifier.0", "classifier.3")
    dense = tuple(shapes[f"{name}.weight"][0] for name in names)
    return ModelConfig(name="vgg16", blocks=tuple(widths), dense=dense, dropout=0.5)


def _vgg16_pairs(config: ModelConfig, style: Style) -> list[Pair]:
    pairs, index = [], 0
    for block, n in enumerate(_VGG16_CONVOLUTIONS, start=1):
        for conv in range(1, n + 1):
            ours, theirs = f"block{block}/conv{conv}", f"features.{index}"
            pairs.append(_convolution(ours, theirs))
            pairs.append(Pair(f"params/{ours}/bias", f"{theirs}.bias", "vector"))
            index += 2  # PyTorch numbers the ReLU that follows as well,
        index += 1  # and the pool.
    if style == "timm":
        fc1, fc2, head = "pre_logits.fc1", "pre_logits.fc2", "head.fc"
    else:
        fc1, fc2, head = "classifier.0", "classifier.3", "classifier.6"
    return pairs + _dense("fc1", fc1, "after_grid") + _dense("fc2", fc2) + _dense("head", head)


def _describe_resnet(shapes: Shapes) -> ModelConfig:
    blocks = _numbered(shapes, lambda stage, i: f"layer{stage + 1}.{i}.conv1.weight")
    bottleneck = "layer1.0.conv3.weight" in shapes
    names = ["resnet50"] if bottleneck else ["resnet18", "resnet34"]
    name = next((name for name in names if resnet.WIDTHS[name] == blocks), None)
    return ModelConfig(name=name or names[0], blocks=() if name else blocks, dense=())


def _resnet_pairs(config: ModelConfig, style: Style) -> list[Pair]:
    blocks = config.blocks or resnet.WIDTHS[config.name]
    bottleneck, before = config.name == "resnet50", blocks[0][0]
    pairs = [_convolution("stem", "conv1"), *_norm("stem_norm", "bn1")]
    for i, widths in enumerate(blocks, start=1):
        for j, width in enumerate(widths, start=1):
            ours, theirs = f"stage{i}/block{j}", f"layer{i}.{j - 1}"
            for k in range(1, 4 if bottleneck else 3):
                pairs.append(_convolution(f"{ours}/conv{k}", f"{theirs}.conv{k}"))
                pairs += _norm(f"{ours}/norm{k}", f"{theirs}.bn{k}")
            after = width * (4 if bottleneck else 1)
            if after != before or (j == 1 and i > 1):
                pairs.append(_convolution(f"{ours}/shortcut", f"{theirs}.downsample.0"))
                pairs += _norm(f"{ours}/shortcut_norm", f"{theirs}.downsample.1")
            before = after
    return pairs + _dense("head", "fc")


def _describe_efficientnet(shapes: Shapes) -> ModelConfig:
    def last(stage: int, index: int) -> str:
        kind = "conv_pw" if stage == 0 else "conv_pwl"
        return f"blocks.{stage}.{index}.{kind}.weight"

    blocks = _numbered(shapes, last)
    names = [f"efficientnet_lite{i}" for i in range(3)]
    name = next((name for name in names if efficientnet.widths(name) == blocks), None)
    return ModelConfig(name=name or names[0], blocks=() if name else blocks, dense=(), dropout=0.2)


def _efficientnet_pairs(config: ModelConfig, style: Style) -> list[Pair]:
    pairs = [_convolution("stem", "conv_stem"), *_norm("stem_norm", "bn1")]
    for i, widths in enumerate(config.blocks or efficientnet.widths(config.name), start=1):
        layers = [("expand", "conv_pw"), ("depthwise", "conv_dw"), ("project", "conv_pwl")]
        if i == 1:
            layers = [("depthwise", "conv_dw"), ("project", "conv_pw")]
        for j in range(1, len(widths) + 1):
            ours, theirs = f"stage{i}/block{j}", f"blocks.{i - 1}.{j - 1}"
            for k, (our_name, their_name) in enumerate(layers, start=1):
                pairs.append(_convolution(f"{ours}/{our_name}", f"{theirs}.{their_name}"))
                pairs += _norm(f"{ours}/{our_name}_norm", f"{theirs}.bn{k}")
    pairs += [_convolution("top", "conv_head"), *_norm("top_norm", "bn2")]
    return pairs + _dense("head", "classifier")


def _numbered(shapes: Shapes, name: Callable[[int, int], str]) -> tuple[tuple[int, ...], ...]:
    """Returns the outputs of the arrays name(stage, index), both counted from 0 without gaps."""
    stages = []
    while name(len(stages), 0) in shapes:
        widths: list[int] = []
        while (array := name(len(stages), len(widths))) in shapes:
            widths.append(shapes[array][0])
        stages.append(tuple(widths))
    return tuple(stages)


FAMILIES = {
    "vgg16": Family("features.0.weight", _describe_vgg16, _vgg16_pairs),
    "resnet": Family("layer1.0.conv1.weight", _describe_resnet, _resnet_pairs),
    "efficientnet_lite": Family("conv_stem.weight", _describe_efficientnet, _efficientnet_pairs),
}
"""The tables, by the beginning of the networks' names."""
