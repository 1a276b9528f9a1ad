"""What strangers hand over: ten thousand mutilated overrides and images, and no crash among them.

The only way out of a reader, beside what it reads, is the one exception that it documents.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax import config, photos, weights
from cnn_jax.config import Config, ModelConfig
from cnn_jax.errors import UserError

OVERRIDE_CASES = 3000

# The same cases every time, so that a change that passes here passes elsewhere.
fuzz = settings(
    max_examples=OVERRIDE_CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

FIELDS = st.sampled_from([*config.all_fields(), "name", "data", "optim", "train.epochs.x", "", "."])
NUMBERS = st.integers() | st.floats()
VALUES = (
    st.text(max_size=20)
    | NUMBERS.map(str)
    | st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=5), st.lists).map(
        json.dumps
    )
    | st.sampled_from(
        ["[" * 5000, "1e999", "-0", "9" * 5000, "\x00", "\udcff", "0x10", "\uff11\uff12"]
    )
)


@fuzz
@given(st.lists(st.tuples(FIELDS | st.text(max_size=12), VALUES), min_size=1, max_size=3))
def test_overrides_are_read_or_refused(pairs: list[tuple[str, str]]) -> None:
    try:
        changed = config.with_overrides(Config(), [f"{name}={value}" for name, value in pairs])
    except UserError as error:
        assert str(error)
        return
    assert config.from_dict(json.loads(json.dumps(config.to_dict(changed)))) == changed
    hash(changed)


def image_bytes(kind: str, **values: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    if kind in ("GIF", "PNG-P"):
        image = image.convert("P")
    image.save(file, kind.removesuffix("-P"), **values)
    return file.getvalue()


def weights_bytes(style: str) -> bytes:
    """A VGG16 of one channel a layer, two hidden units and three classes."""
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    shapes = {f"features.{i}": (1, 3 if i == 0 else 1, 3, 3) for i in convolutions}
    if style == "timm":
        shapes |= {"pre_logits.fc1": (2, 1, 7, 7), "pre_logits.fc2": (2, 2, 1, 1)}
        shapes |= {"head.fc": (3, 2)}
    else:
        shapes |= {"classifier.0": (2, 49), "classifier.3": (2, 2), "classifier.6": (3, 2)}
    arrays = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": np.ones(shape[0], np.float32) for name, shape in shapes.items()}
    return safetensors.numpy.save(arrays)


@dataclass(frozen=True)
class Reader:
    """A reader of files, whole examples of what it reads, and what must hold of its result."""

    read: Callable[[Path], Any]
    seeds: tuple[bytes, ...]
    check: Callable[[Any], bool]
    cases: int


def is_config(found: Any) -> bool:
    return isinstance(found, Config)


def is_network(found: Any) -> bool:
    network, params = found
    return isinstance(network, ModelConfig) and set(params) == {
        *(f"block{i}" for i in range(1, 6)),
        *("fc1", "fc2", "head"),
    }


def is_image(found: Any) -> bool:
    return found.shape == (8, 8, 3) and found.dtype == np.uint8


READERS = {
    "image": Reader(
        lambda path: photos.load_image(path, 8),
        (
            image_bytes("JPEG"),
            image_bytes("JPEG", progressive=True),
            image_bytes("PNG"),
            image_bytes("PNG-P"),
            image_bytes("GIF"),
            image_bytes("BMP"),
            image_bytes("WEBP"),
            image_bytes("TIFF"),
            image_bytes("TIFF", compression="tiff_lzw"),
            image_bytes("PPM"),
        ),
        is_image,
        cases=4000,
    ),
    "config": Reader(
        config.load,
        (json.dumps(config.to_dict(Config()), indent=2).encode(),),
        is_config,
        cases=3000,
    ),
    "weights": Reader(
        lambda path: (weights.describe(path), weights.read(path)),
        (weights_bytes("torchvision"), weights_bytes("timm")),
        is_network,
        cases=3000,
    ),
}


@st.composite
def mutilated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A whole file after a few of: bytes changed, removed, inserted or doubled; a cut end."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        # Often near the start, as that is where headers are.
        reach = draw(st.sampled_from([32, 128, len(content) + 1]))
        start = draw(st.integers(0, min(reach, len(content))))
        end = start + draw(st.integers(0, 16))
        change = draw(st.sampled_from(["set", "set", "set", "remove", "double", "cut"]))
        if change == "cut":
            del content[start:]
        elif change == "remove":
            del content[start:end]
        elif change == "double":
            content[start:start] = content[start:end]
        else:
            content[start:end] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_mutilated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    reader, path = READERS[name], tmp_path / "file"
    outcomes = {"read": 0, "refused": 0}

    @settings(fuzz, max_examples=reader.cases)
    @given(mutilated(reader.seeds))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = reader.read(path)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            return
        assert reader.check(found)
        outcomes["read"] += 1

    read()
    assert min(outcomes.values()) >= 50, outcomes
