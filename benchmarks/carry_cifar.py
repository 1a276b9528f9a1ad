"""Divides CIFAR-10 into files that can be carried to a machine without a network, and reads them.

python benchmarks/carry_cifar.py FOLDER [--tiny]    # writes part1.npz and part2.npz, 47 MB each

Each part has half of the training and of the test images, as lossless WebP. Where all parts lie
in one folder, `read_parts` puts them together again. They are made from what data.name=cifar10
loads, so their pixels are the same; `--tiny` makes parts of random images, for a rehearsal.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

N_PARTS = 2
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]
"""Training images and labels, test images and labels, and the names of the classes."""


def write_parts(folder: Path, arrays: Arrays) -> None:
    """Writes the files; part i has every N_PARTS-th image from i on."""
    folder.mkdir(parents=True, exist_ok=True)
    *data, names = arrays
    for i in range(N_PARTS):
        images, labels, test_images, test_labels = (array[i::N_PARTS] for array in data)
        part = {"names": np.array(names), "labels": labels, "test_labels": test_labels}
        part |= _packed("images", images) | _packed("test_images", test_images)
        np.savez(folder / f"part{i + 1}.npz", **part)  # pyright: ignore[reportArgumentType]


def read_parts(folder: Path) -> Arrays:
    """Returns the whole set from all its parts, in its own order.

    Raises:
        FileNotFoundError: a part is missing.
    """
    parts = [np.load(folder / f"part{i + 1}.npz") for i in range(N_PARTS)]
    joined = {}
    for name in ("images", "labels", "test_images", "test_labels"):
        is_image = name.endswith("images")
        arrays = [_unpacked(part, name) if is_image else part[name] for part in parts]
        joined[name] = np.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
        for i, array in enumerate(arrays):
            joined[name][i::N_PARTS] = array
    return (*joined.values(), tuple(parts[0]["names"].tolist()))  # pyright: ignore


def _packed(name: str, images: np.ndarray) -> dict[str, np.ndarray]:
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", lossless=True, quality=40)
        files.append(file.getvalue())
    ends = np.cumsum([len(file) for file in files])
    return {name: np.frombuffer(b"".join(files), np.uint8), f"{name}_ends": ends}


def _unpacked(part: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    data, ends = part[name].tobytes(), part[f"{name}_ends"].tolist()
    files = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def tiny() -> Arrays:
    """Returns 48 training and 12 test images of noise, in ten classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 10
    labels = labels.astype(np.int32)
    return images[:48], labels[:48], images[48:], labels[48:], tuple("abcdefghij")


def whole() -> Arrays:
    """Returns CIFAR-10 as data.name=cifar10 loads it."""
    from cnn_jax import data
    from cnn_jax.config import DataConfig

    found = data.load(DataConfig(name="cifar10"), storage="memory")
    train, test = found.train, found.test
    images, test_images = np.asarray(train.images), np.asarray(test.images)
    return images, train.labels, test_images, test.labels, found.class_names


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    write_parts(Path(sys.argv[1]), tiny() if "--tiny" in sys.argv else whole())
