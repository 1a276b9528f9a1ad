"""What can't fit into memory is refused before it is allocated, and named in one line."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.cli import refuse
from helpers.data import write_photos
from helpers.training import HEAD, edit, fit, initial, keys

from cnn_jax import capacity, command, data, memory
from cnn_jax.config import Config, DataConfig, ModelConfig
from cnn_jax.data import ImageDataset, photos
from cnn_jax.errors import UserError
from cnn_jax.fit import compile_segment
from cnn_jax.step import Setup, train_segment


@pytest.mark.slow
def test_a_network_that_is_too_large_is_one_line(tmp_path: Path) -> None:
    """4096 * 10^7 parameters: 164 GB, with gradients and velocities three times that."""
    wide = ("--data.image_size=64", "--model.blocks=[[4]]", "--model.dense=[10000000]")
    line = refuse(*wide, "--workdir=run", cwd=tmp_path)
    needs = (
        r"training needs at least 49\d\.\d GB of memory \(49\d\.\d GB for parameters, gradients "
    )
    assert re.match(needs + r"and optimizer, .*\), and \d+\.\d GB are free; lower data\.", line)
    assert "train.batch_size" in line
    assert "train.accumulate or train.remat" in line
    assert line.endswith("or set runtime.storage=stream")


def needs(config: Config, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns what is said of the need where nothing is free."""
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(memory, "free_bytes", lambda: 0)
        capacity.check(Setup.of(config, dataset), dataset)
    return str(caught.value)


def test_the_parts_of_the_need(
    tiny: Config, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 images of 8x8: 8 * 8 * 4 + 4 * 4 * 4 + 8 + 3 numbers of 4 bytes each."""
    monkeypatch.setattr(memory, "format_bytes", lambda n: f"{n:.0f} B")
    devices = jax.local_device_count()
    params = sum(x.size for x in jax.tree.leaves(initial(tiny, dataset).params))
    state = (3 * params + 4) * 4 * devices  # and the step and the epoch's sums
    outputs = 8 * (8 * 8 * 4 + 4 * 4 * 4 + 8 + 3) * 4
    expected = f"({state} B for parameters, gradients and optimizer, {outputs} B for the outputs of"
    assert expected in needs(tiny, dataset, monkeypatch)
    halves = edit(tiny, train={"accumulate": 2})
    assert f" {outputs // 2} B for the outputs" in needs(halves, dataset, monkeypatch)
    half_precision = edit(tiny, model={"dtype": "bfloat16"})
    assert f" {outputs // 2} B for the outputs" in needs(half_precision, dataset, monkeypatch)
    frozen = edit(tiny, optim={"groups": HEAD})
    assert f" {8 * 3 * 4} B for the outputs" in needs(frozen, dataset, monkeypatch)
    later = edit(tiny, optim={"groups": (("head/.*", 1.0), (".*", ((0, None), (1, 1.0))))})
    monkeypatch.setattr(memory, "free_bytes", lambda: state + outputs - 1)
    with pytest.raises(UserError, match=f" {outputs} B for the outputs"):
        capacity.check(Setup.of(later, dataset), dataset)
    capacity.check(Setup.of(edit(later, train={"epochs": 0}), dataset), dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(name="vgg", blocks=((8, 8), (16,)), dense=(16,)),
        ModelConfig(name="resnet_small", blocks=((8,), (16, 16)), dense=()),
    ],
)
@pytest.mark.parametrize("batch_size", [8, 16])
def test_no_program_needs_less(
    tiny: Config, dataset: ImageDataset, model: ModelConfig, batch_size: int
) -> None:
    """Else training would be refused that fits."""
    config = replace(edit(tiny, train={"batch_size": batch_size}), model=model)
    setup, state = Setup.of(config, dataset), initial(config, dataset)
    inputs = dataset.train.images, dataset.train.labels, keys(config)[1], np.int32(1)
    found = train_segment.lower(setup, state, *inputs).compile().memory_analysis()
    assert found is not None
    assert capacity._activation_bytes(setup) <= found.temp_size_in_bytes


def test_a_program_that_is_too_large_is_not_run(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, state = Setup.of(tiny, dataset), initial(tiny, dataset)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"\(0 MB for intermediate results of a step\), and 0 MB"):
        compile_segment(tiny, setup, dataset, state, keys(tiny)[1])
    with pytest.raises(UserError, match=r"^training needs at least 0 MB of memory \(0 MB for para"):
        fit(tiny, dataset, workdir)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 18.2 GiB for an array\nwith shape (1,)"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n" * 9),
    ],
)
def test_out_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.guarded(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    assert re.search(r" \(\d+\.\d GB of memory are free\); lower data\.image_size, train", line)
    assert line.endswith("set train.accumulate or train.remat, or set runtime.storage=stream")
    assert len(line) < 400


def test_the_memory_of_a_gpu_is_named_where_it_runs_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the message that XLA gives, as for a convolution's workspace."""
    stats = {"bytes_limit": 60 * 10**9, "bytes_in_use": 12 * 10**9}
    gpu = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    allocation = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."

    def main() -> None:
        raise jax.errors.JaxRuntimeError(allocation)

    with pytest.raises(SystemExit):
        command.guarded(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{allocation} (48.0 GB of the 60.0 GB of the GPU are free); lower" in line
    assert capacity.free_bytes() == 48 * 10**9


def test_memory_that_runs_out_makes_no_photo_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, {"a": 3, "b": 3})
    config = DataConfig(name="folder", dir=str(tmp_path), image_size=8, skip_broken=True)
    streamed = data.load(config, str(tmp_path / "cache"), "stream")

    def read(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(photos, "_read_image", read)
    with pytest.raises(MemoryError):
        streamed.train.images[0]
    assert streamed.replaced == ()


def test_other_errors_of_the_runtime_are_not_hidden() -> None:
    def main() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        command.guarded(main)
