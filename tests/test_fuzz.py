"""Flags and files that were damaged at random: each is read, or refused with a UserError.

By default a few cases, the same ones every time; the tests marked slow draw thousands of new ones.
"""

import io
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax import fields
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import photos
from cnn_jax.errors import UserError
from cnn_jax.models import weights

SEED = "CNN_JAX_FUZZ_SEED"
"""The environment variable that makes the slow tests draw the cases of an earlier run."""

OFTEN = pytest.param(3250, marks=pytest.mark.slow)

KNOWN = [*fields.all_fields()]
FIELDS = st.sampled_from([*KNOWN, "name", "data", "optim", "train.epochs.x", "", "."])
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


def fuzz(cases: int, strategy: st.SearchStrategy, test: Callable[[Any], None]) -> None:
    """Calls `test` with so many cases: the same 300 each time, or more from a new seed."""
    is_fresh = cases > 300
    run = settings(
        max_examples=cases,
        deadline=None,
        derandomize=not is_fresh,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(test))
    if is_fresh:
        number = int(os.environ.get(SEED) or secrets.randbits(32))
        print(f"{SEED}={number} draws the same cases")  # pytest shows it if the test fails.
        run = seed(number)(run)
    run()


@pytest.mark.parametrize("cases", [300, OFTEN])
def test_flags_are_read_or_refused(cases: int) -> None:
    def read(values: dict[str, str]) -> None:
        try:
            changed = fields.with_values(Config(), values)
        except UserError as error:
            assert str(error)
            return
        assert fields.from_dict(json.loads(json.dumps(fields.to_dict(changed)))) == changed
        hash(changed)

    names = FIELDS | st.text(max_size=12)
    fuzz(cases, st.dictionaries(names, VALUES, min_size=1, max_size=3), read)


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


def is_config(found: Any) -> bool:
    return isinstance(found, Config)


def is_network(found: Any) -> bool:
    network, variables = found
    return isinstance(network, ModelConfig) and set(variables["params"]) == {
        *(f"block{i}" for i in range(1, 6)),
        *("fc1", "fc2", "head"),
    }


def is_image(found: Any) -> bool:
    return found.shape == (8, 8, 3) and found.dtype == np.uint8


# As version 0.1.0 wrote it.
OLD_CONFIG = json.dumps(
    {
        "name": "quickstart",
        "seed": 3,
        "data": {"name": "digits", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "augment": {"alternate_flip": True},
        "optim": {"phases": [[0, [["head/.*", 1.0], [".*", None]]], [1, [[".*", 0.1]]]]},
        "train": {"epochs": 2, "segment_steps": 7, "keep_checkpoints": 3, "seeds": 2},
        "features": {"layer": "", "classifier": ""},
    },
    indent=2,
)

READERS = {
    "image": Reader(
        lambda path: photos.load_image(path, photos.Layout(8)),
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
    ),
    "config": Reader(
        fields.load,
        (json.dumps(fields.to_dict(Config()), indent=2).encode(), OLD_CONFIG.encode()),
        is_config,
    ),
    "weights": Reader(
        lambda path: (weights.describe(path), weights.read(path)),
        (weights_bytes("torchvision"), weights_bytes("timm")),
        is_network,
    ),
}


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
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


@pytest.mark.parametrize("cases", [300, OFTEN])
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, cases: int, tmp_path: Path) -> None:
    reader, path = READERS[name], tmp_path / "file"
    outcomes = {"read": 0, "refused": 0}

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

    fuzz(cases, damaged(reader.seeds), read)
    assert min(outcomes.values()) >= cases // 60, outcomes
