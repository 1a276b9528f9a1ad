"""Settings of every test: the CPU, checked types and shapes, no file outside temporary folders."""

import os
import tempfile
from pathlib import Path

# Tests leave a GPU alone, of which each process would take most of the memory. CNN_JAX_GPU=1 runs
# those marked gpu instead, which share it with whatever else is there.
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if os.environ.get("CNN_JAX_GPU") else "cpu"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Also read when JAX is imported. To optimise the programs of tests takes longer than to run them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from absl import logging
from jaxtyping import install_import_hook

pytest.register_assert_rewrite("helpers")
if os.environ.get("CNN_JAX_TYPECHECK"):
    install_import_hook("cnn_jax", "helpers.typecheck.check")  # Of what is imported from here on.

import helpers.typecheck  # noqa: E402
from helpers.data import colours  # noqa: E402

from cnn_jax.config import Config, DataConfig, ModelConfig, RuntimeConfig, TrainConfig  # noqa: E402
from cnn_jax.data import ImageDataset  # noqa: E402

assert helpers.typecheck.check

# The processes of xdist, and those that tests start, inherit the first one's folder, so that all
# of them share one cache of compiled programs.
if "XDG_CACHE_HOME" not in os.environ or "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="cnn_jax_tests_")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of the other kind of device."""
    on_gpu = bool(os.environ.get("CNN_JAX_GPU"))
    for item in items:
        is_marked = item.get_closest_marker("gpu") is not None
        if is_marked and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and CNN_JAX_GPU=1"))
        elif on_gpu and not is_marked:
            item.add_marker(pytest.mark.skip(reason="CNN_JAX_GPU=1 runs the tests marked gpu"))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets a module's compiled programs.

    Each holds several memory maps, of which Linux grants a process 65,530: without this the last
    modules end in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def dataset() -> ImageDataset:
    """22 training, 9 validation and 10 test images of 8x8 in three colours."""
    return colours(22, 9, 10)


@pytest.fixture
def tiny() -> Config:
    """A network of a few hundred parameters, batches of 8: three steps an epoch, the last short."""
    return Config(
        name="tiny",
        data=DataConfig(validation=0.1),
        model=ModelConfig(name="vgg", blocks=((4,), (4,)), dense=(8,), dropout=0.25),
        train=TrainConfig(epochs=2, batch_size=8),
        runtime=RuntimeConfig(segment_steps=2),
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


@pytest.fixture(scope="session")
def shared_photos() -> Path:
    """Real photos in the parts train, validation and test: the set clothing (small)."""
    return _shared("CNN_JAX_PHOTOS", "the folder of clothing-dataset-small")


@pytest.fixture(scope="session")
def lite0_weights() -> Path:
    """ImageNet's weights of EfficientNet-Lite0."""
    return _shared("CNN_JAX_WEIGHTS", "timm's tf_efficientnet_lite0.safetensors")


def _shared(variable: str, what: str) -> Path:
    path = Path(os.environ.get(variable, "missing"))
    if not path.exists():
        pytest.skip(f"{variable} does not name {what}")
    return path.resolve()
