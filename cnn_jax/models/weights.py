"""Reads and writes VGG16's weights as safetensors, with the names of torchvision or of timm.

timm/vgg16.tv_in1k on the Hugging Face hub holds the same arrays as torchvision's VGG16, with the
dense layers as convolutions.
"""

from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cnn_jax import trees
from cnn_jax.config import DataConfig, ModelConfig
from cnn_jax.errors import UserError, one_line

Style = Literal["torchvision", "timm"]

# The size and the normalisation of the images that torchvision and timm trained VGG16 on.
IMAGENET = DataConfig(image_size=224, normalize=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

_CONVOLUTIONS = (2, 2, 3, 3, 3)
_DENSE = {
    "torchvision": {"fc1": "classifier.0", "fc2": "classifier.3", "head": "classifier.6"},
    "timm": {"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2", "head": "head.fc"},
}
_GRID = 7


def download(repo: str) -> Path:
    """Downloads model.safetensors of a repository on the Hugging Face hub and returns its path.

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
        return Path(hf_hub_download(repo, "model.safetensors"))
    except Exception as error:  # The hub's client raises dozens of kinds, of several lines each.
        raise UserError(f"hf:{repo} can't be downloaded: {one_line(error)[:200]}") from None


def describe(path: Path) -> ModelConfig:
    """Returns the config of the VGG16 in a file; reads only the file's header.

    Raises:
        UserError: the file is missing or is not a VGG16.
    """
    with _open(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    names = _names(shapes, path)
    blocks = tuple(
        tuple(shapes[names[f"block{b}/conv{c}"] + ".weight"][0] for c in range(1, n + 1))
        for b, n in enumerate(_CONVOLUTIONS, start=1)
    )
    dense = shapes[names["fc1"] + ".weight"][0], shapes[names["fc2"] + ".weight"][0]
    return ModelConfig(name="vgg16", blocks=blocks, dense=dense, dropout=0.5)


def read(path: Path) -> dict[str, Any]:
    """Reads a file of float32 weights and returns the params of the network vgg16.

    Raises:
        UserError: the file is missing, or its arrays are not those of a VGG16.
    """
    with _open(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    params = {}
    for layer, prefix in _names(arrays, path).items():
        weight, bias = arrays[prefix + ".weight"], arrays[prefix + ".bias"]
        for kind, array in (("weight", weight), ("bias", bias)):
            if array.dtype != np.float32:
                raise UserError(f"{path}: {prefix}.{kind} is {array.dtype}, not float32")
        try:
            params[f"{layer}/kernel"] = _to_kernel(layer, weight)
        except ValueError:
            raise UserError(
                f"{path}: {prefix}.weight of shape {list(weight.shape)} is not a VGG16's"
            ) from None
        params[f"{layer}/bias"] = bias
    return flax.traverse_util.unflatten_dict(params, sep="/")


def write(params: Any, path: Path, style: Style = "torchvision") -> None:
    """Writes the params of the network vgg16, of any widths, as PyTorch's libraries read them."""
    leaves = trees.named_leaves(params)
    arrays = {}
    for layer, prefix in _layer_names(style).items():
        kernel = np.asarray(leaves[f"{layer}/kernel"])
        weight = _to_weight(layer, kernel)
        if style == "timm" and layer in ("fc1", "fc2"):
            side = _GRID if layer == "fc1" else 1
            weight = weight.reshape(len(weight), -1, side, side)
        arrays[f"{prefix}.weight"] = np.ascontiguousarray(weight)
        arrays[f"{prefix}.bias"] = np.ascontiguousarray(leaves[f"{layer}/bias"])
    save_file(arrays, path, metadata={"format": "pt"})


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file: {one_line(error)}") from None


def _layer_names(style: Style) -> dict[str, str]:
    """Returns the prefix that a style gives to the names of each layer's arrays."""
    names, index = {}, 0
    for block, n in enumerate(_CONVOLUTIONS, start=1):
        for conv in range(1, n + 1):
            names[f"block{block}/conv{conv}"] = f"features.{index}"
            index += 2  # PyTorch numbers the ReLU that follows as well,
        index += 1  # and the pool.
    return names | _DENSE[style]


def _names(arrays: dict[str, Any], path: Path) -> dict[str, str]:
    style: Style = "timm" if "pre_logits.fc1.weight" in arrays else "torchvision"
    names = _layer_names(style)
    expected = {f"{prefix}.{kind}" for prefix in names.values() for kind in ("weight", "bias")}
    if odd := sorted(expected ^ set(arrays)):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{path} is not a VGG16: missing or unknown: {', '.join(odd[:3])}{more}")
    return names


def _to_kernel(layer: str, weight: np.ndarray) -> np.ndarray:
    """Returns linen's kernel for PyTorch's weight.

    Convolutions change from OIHW to HWIO. Of fc1, the inputs change from the order of flattened
    CHW feature maps to that of HWC.

    Raises:
        ValueError: the shape is not that of a layer of VGG16.
    """
    if layer.startswith("block"):
        if weight.shape[2:] != (3, 3):
            raise ValueError
        return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
    if layer == "fc1":
        weight = weight.reshape(len(weight), -1, _GRID, _GRID).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def _to_weight(layer: str, kernel: np.ndarray) -> np.ndarray:
    """Returns PyTorch's weight for linen's kernel: the inverse of `_to_kernel`."""
    if layer.startswith("block"):
        return kernel.transpose(3, 2, 0, 1)
    weight = kernel.T
    if layer == "fc1":
        weight = weight.reshape(len(weight), _GRID, _GRID, -1).transpose(0, 3, 1, 2)
    return weight.reshape(len(weight), -1)
