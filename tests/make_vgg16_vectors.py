"""Makes vgg16_vectors.npz: PyTorch's logits for weights and images that NumPy makes from seeds.

Run by hand where PyTorch is installed, which the project does not need:
    python tests/make_vgg16_vectors.py
The network is torchvision's VGG16, by its layout and parameter names.
"""

from pathlib import Path

import numpy as np

VECTORS = Path(__file__).with_name("vgg16_vectors.npz")
BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
SIZES = (224, 96, 32)
# The same network with few channels, which takes milliseconds.
NARROW = {"blocks": ((4, 4), (4, 6), (4, 4, 4), (4, 4, 4), (4, 4, 5)), "dense": (8, 7)}
NARROW_SIZES = (224, 150, 96, 32)


def weights(
    blocks: tuple[tuple[int, ...], ...] = BLOCKS,
    dense: tuple[int, int] = (4096, 4096),
    n_classes: int = 1000,
) -> dict[str, np.ndarray]:
    """Returns random weights by torchvision's names, scaled so that activations stay near 1."""
    rng = np.random.default_rng(0)
    shapes, index, n_in = {}, 0, 3
    for block in blocks:
        for width in block:
            shapes[f"features.{index}"] = (width, n_in, 3, 3)
            index, n_in = index + 2, width
        index += 1
    shapes["classifier.0"] = (dense[0], n_in * 49)
    shapes["classifier.3"] = (dense[1], dense[0])
    shapes["classifier.6"] = (n_classes, dense[1])
    arrays = {}
    for name, shape in shapes.items():
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        arrays[f"{name}.weight"] = rng.standard_normal(shape, np.float32) * scale
        arrays[f"{name}.bias"] = rng.standard_normal(shape[:1], np.float32) * np.float32(0.1)
    return arrays


def images(size: int) -> np.ndarray:
    """Returns two normalised images, float32 [2, size, size, 3]."""
    return np.random.default_rng(size).standard_normal((2, size, size, 3), np.float32)


def main() -> None:
    import torch

    logits = {f"size{size}": array for size, array in torch_logits(SIZES).items()}
    narrow = torch_logits(NARROW_SIZES, **NARROW, n_classes=3)
    logits |= {f"narrow{size}": array for size, array in narrow.items()}
    np.savez_compressed(VECTORS, torch=torch.__version__, **logits)


def torch_logits(
    sizes: tuple[int, ...],
    blocks: tuple[tuple[int, ...], ...] = BLOCKS,
    dense: tuple[int, int] = (4096, 4096),
    n_classes: int = 1000,
) -> dict[int, np.ndarray]:
    """Returns PyTorch's logits of `images(size)` for each size."""
    import torch
    from torch import nn

    features, n_in = [], 3
    for block in blocks:
        for width in block:
            features += [nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU()]
            n_in = width
        features.append(nn.MaxPool2d(2, 2))
    classifier = [nn.Linear(n_in * 49, dense[0]), nn.ReLU(), nn.Dropout()]
    classifier += [nn.Linear(*dense), nn.ReLU(), nn.Dropout(), nn.Linear(dense[1], n_classes)]
    parts = {"features": nn.Sequential(*features), "classifier": nn.Sequential(*classifier)}
    arrays = weights(blocks, dense, n_classes)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    nn.ModuleDict(parts).load_state_dict(state, strict=True)
    logits = {}
    for size in sizes:
        x = torch.from_numpy(images(size)).permute(0, 3, 1, 2)
        with torch.no_grad():
            x = nn.AdaptiveAvgPool2d(7)(parts["features"].eval()(x))
            logits[size] = parts["classifier"].eval()(x.flatten(1)).numpy()
    return logits


if __name__ == "__main__":
    main()
