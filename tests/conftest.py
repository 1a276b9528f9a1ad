"""Settings of every test: no silent broadcasting of ranks, no file outside temporary folders."""

import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from cnn_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from cnn_jax.data import ImageDataset, Split

# Inherited by the processes that tests start, so that all of them share one warm cache.
_CACHE = tempfile.TemporaryDirectory(prefix="cnn_jax_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets a module's compiled programs.

    Each holds several memory maps, of which Linux grants a process 65,530: without this the last
    modules end in a segmentation fault.
    """
    yield
    jax.clear_caches()


def make_split(n: int, seed: int, size: int = 8) -> Split:
    """Returns noisy images in three colours, whose names are the classes."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3).astype(np.int32)
    images = rng.integers(0, 100, (n, size, size, 3)).astype(np.uint8)
    images[np.arange(n), :, :, labels] += 120
    return Split(images, labels)


@pytest.fixture
def dataset() -> ImageDataset:
    """22 training, 9 validation and 10 test images of 8x8 in three colours."""
    return ImageDataset(
        name="colours",
        source="made in a test",
        class_names=("red", "green", "blue"),
        train=make_split(22, seed=1),
        validation=make_split(9, seed=2),
        test=make_split(10, seed=3),
        skipped=(),
    )


@pytest.fixture
def tiny() -> Config:
    """A network of a few hundred parameters, batches of 8: three steps an epoch, the last short."""
    return Config(
        name="tiny",
        data=DataConfig(validation=0.1),
        model=ModelConfig(name="vgg", blocks=((4,), (4,)), dense=(8,), dropout=0.25),
        train=TrainConfig(epochs=2, batch_size=8, segment_steps=2),
    )


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings that are logged in the test."""
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty folder for a run."""
    path = tmp_path / "run"
    path.mkdir()
    return path
