"""Makes imagenet_vectors.npz: logits of timm's networks, to compare ours with.

Run by hand where PyTorch and timm are installed, which the project does not need:
    python tests/make_imagenet_vectors.py [WEIGHTS PHOTO ...]
Without arguments, only the networks with random weights are computed: NumPy makes weights and
images from seeds. WEIGHTS is timm's tf_efficientnet_lite0.safetensors, and each PHOTO is
preprocessed as timm does; without them, their vectors stay as they are.
"""

import sys
from pathlib import Path

import numpy as np

VECTORS = Path(__file__).with_name("imagenet_vectors.npz")
# Names in timm, by ours, and a side of images at which every stage still has a few pixels.
NETWORKS = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
}
SIDES = (96, 75)
N_CLASSES = 7


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random arrays of these shapes, scaled so that activations stay near 1."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in sorted(shapes):
        shape, values = shapes[name], rng.standard_normal(shapes[name], np.float32)
        if len(shape) > 1:
            arrays[name] = values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith("running_var"):
            arrays[name] = 0.5 + np.abs(values)
        elif name.endswith(".weight"):
            arrays[name] = 0.5 + 0.1 * values
        else:
            arrays[name] = 0.1 * values
    return arrays


def images(side: int) -> np.ndarray:
    """Returns two normalised images, float32 [2, side, side, 3]."""
    return np.random.default_rng(side).standard_normal((2, side, side, 3), np.float32)


def main(arguments: list[str]) -> None:
    """Writes the vectors."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    found = dict(np.load(VECTORS)) if VECTORS.exists() else {}
    found["torch"], found["timm"] = np.array(torch.__version__), np.array(timm.__version__)
    with torch.no_grad():
        for ours, theirs in NETWORKS.items():
            network = timm.create_model(theirs, num_classes=N_CLASSES).eval()
            state = network.state_dict()
            shapes = {k: tuple(v.shape) for k, v in state.items() if "num_batches" not in k}
            arrays = {k: torch.from_numpy(v) for k, v in weights(shapes).items()}
            network.load_state_dict(arrays, strict=False)
            for side in SIDES:
                x = torch.from_numpy(images(side)).permute(0, 3, 1, 2)
                found[f"{ours} {side}"] = network(x).numpy()
        if arguments:
            network = timm.create_model("tf_efficientnet_lite0").eval()
            network.load_state_dict(load_file(arguments[0]), strict=False)
            config = timm.data.resolve_data_config(model=network)
            transform = timm.data.create_transform(**config)
            for name in arguments[1:]:
                photo = Image.open(name).convert("RGB")
                found[f"photo {Path(name).name}"] = network(transform(photo)[None])[0].numpy()
    np.savez_compressed(VECTORS, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
