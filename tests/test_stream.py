"""Images that are read when they are needed: the same as in memory, and bounded in memory."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import ONE_DEVICE, finish, on_devices, refuse, start
from helpers.data import noise, write_photos
from helpers.results import lines, losses, result, summary
from helpers.training import HEAD, edit, fit, fit_until, quiet, train_run
from PIL import Image
from test_multiprocess import launch, wait

from cnn_jax import data, memory, mesh, trees
from cnn_jax import fit as fitting
from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    RuntimeConfig,
    TrainConfig,
)
from cnn_jax.data import ImageDataset, dataset, stream
from cnn_jax.data.dataset import LazyImages
from cnn_jax.errors import UserError
from cnn_jax.hooks import Moment, every
from cnn_jax.runs import processes
from cnn_jax.runs.folder import RunFolder
from cnn_jax.step import Setup
from cnn_jax.tools import find_rate
from cnn_jax.tools.train import train

Load = Callable[..., ImageDataset]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """14, 10 and 6 photos of three classes."""
    write_photos(tmp_path / "photos", {"ape": 14, "bee": 10, "cat": 6})
    return tmp_path / "photos"


@pytest.fixture
def load(photos: Path, tmp_path: Path) -> Load:
    """Loads them, streamed unless storage says otherwise."""

    def load_photos(storage: str = "stream", **values: Any) -> ImageDataset:
        values = {"name": "folder", "dir": str(photos), "image_size": 8} | values
        return data.load(DataConfig(**values), str(tmp_path / "cache"), storage)

    return load_photos


def test_streamed_photos_are_those_in_memory(load: Load) -> None:
    values = dict(validation=0.2, classes=("cat", "ape"), images_per_class=3)
    held, streamed = load("memory", **values), load(**values)
    assert (held.is_streamed, streamed.is_streamed) == (False, True)
    assert streamed.sha256 == held.sha256
    assert streamed.image_shape == held.image_shape == (8, 8, 3)
    for name, split in streamed.parts.items():
        expected = held.parts[name]
        assert split.files == expected.files
        assert isinstance(split.images, LazyImages)
        assert split.images.shape == expected.images.shape
        assert split.labels.tolist() == expected.labels.tolist()
        for key in (slice(None), slice(1, 3), 0, -1, np.array([2, 0, 2]), split.labels == 1):
            np.testing.assert_array_equal(split.images[key], expected.images[key])
        assert [image.tobytes() for image in split.images] == [x.tobytes() for x in expected.images]


def test_nothing_is_decoded_before_it_is_needed(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()  # The first time, thumbnails are compared, to find copies and broken photos.
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    streamed = load(validation=0.2)
    assert len(streamed.sha256) == 64
    with pytest.raises(pytest.fail.Exception):
        streamed.train.images[0]


def test_other_sources_are_streamed_from_their_cache(tmp_path: Path) -> None:
    config = DataConfig(image_size=8, validation=0.1)
    held = data.load(config, str(tmp_path), "memory")
    streamed = data.load(config, str(tmp_path), "stream")
    assert isinstance(held.train.images, np.ndarray)
    assert isinstance(streamed.train.images, LazyImages)
    assert streamed.sha256 == held.sha256


def test_images_in_memory_are_held_once(tmp_path: Path) -> None:
    """From a cache, the pixels are allocated once, and a block of them besides."""
    config = DataConfig(image_size=100, validation=0.1)  # 54 MB
    data.load(config, str(tmp_path))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(data.cache, "_BLOCK_BYTES", 2**20)
        tracemalloc.start()
        loaded = data.load(config, str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert loaded.nbytes == 1797 * 100 * 100 * 3
    assert peak < loaded.nbytes + 6e6


@pytest.mark.parametrize(("free", "streamed"), [(4 * 30 * 192 - 1, True), (4 * 30 * 192, False)])
def test_auto_streams_more_than_a_quarter_of_the_free_memory(
    load: Load, monkeypatch: pytest.MonkeyPatch, free: int, streamed: bool
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    assert load("auto").is_streamed is streamed


def test_auto_holds_a_small_choice_from_a_large_folder(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 4 * 20 * 192)
    held = load("auto", images_per_class=2)
    assert not held.is_streamed
    assert held.sha256 == load("memory", images_per_class=2).sha256


def test_memory_that_is_not_free_is_not_allocated(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 30 * 192 - 1)
    message = r"do not fit into 0 MB of free memory; set runtime.storage=stream, or a lower "
    with pytest.raises(UserError, match=message + "data.image_size"):
        load("memory")


# Broken photos


def break_one(photos: Path, streamed: ImageDataset, damage: str) -> tuple[int, Path]:
    """Breaks a training photo of class 1; returns its number and its path."""
    number = int(np.flatnonzero(streamed.train.labels == 1)[-1])
    path = photos / streamed.train.files[number]
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    return number, path


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_photo_that_breaks_is_named(load: Load, photos: Path, damage: str) -> None:
    streamed = load()
    number, path = break_one(photos, streamed, damage)
    with pytest.raises(UserError) as caught:
        streamed.train.images[number]
    message = str(caught.value)
    assert message.startswith(f"{path} can't be read as an image: ")
    assert message.endswith("; restore it, or replace such photos with --data.skip_broken=true")
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_broken_photo_is_replaced_by_the_next_of_its_class(
    load: Load, photos: Path, damage: str, warned: list[str]
) -> None:
    streamed = load(skip_broken=True)
    before = streamed.train.images[:]
    number, path = break_one(photos, streamed, damage)
    after = streamed.train.images[:]
    next_one = int(np.flatnonzero(streamed.train.labels == 1)[0])  # after the last comes the first
    np.testing.assert_array_equal(after[number], before[next_one])
    others = np.arange(len(before)) != number
    np.testing.assert_array_equal(after[others], before[others])
    assert streamed.replaced == (streamed.train.files[number],)
    streamed.train.images[number]
    (warning,) = warned
    assert warning.startswith(f"{path} can't be read as an image: ")
    assert warning.endswith("; another photo of its class replaces it")


def test_a_class_without_a_readable_photo_is_an_error(load: Load, photos: Path) -> None:
    streamed = load(skip_broken=True)
    for file in streamed.train.files:
        if file.startswith("bee"):
            (photos / file).unlink()
    with pytest.raises(UserError, match=r"^no photo of a class can be read: .*/bee/"):
        streamed.train.images[:]


# What the hash of a data set sees of its photos


@pytest.mark.parametrize("size", [100, 60_000])
def test_a_changed_file_has_another_digest(tmp_path: Path, size: int) -> None:
    path = tmp_path / "photo"
    content = bytes(noise(size))
    path.write_bytes(content)
    original = dataset.file_digest(str(path))
    for place in (0, size // 2, size - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert dataset.file_digest(str(path)) != original
    path.write_bytes(content + b"x")
    assert dataset.file_digest(str(path)) != original
    path.write_bytes(content)
    assert dataset.file_digest(str(path)) == original


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_the_hash_sees_a_changed_photo_and_not_its_date(
    load: Load, photos: Path, storage: str
) -> None:
    before = load(storage)
    path = photos / before.test.files[0]
    os.utime(path, (1, 1))
    assert load(storage).sha256 == before.sha256
    Image.fromarray(noise(12, 12, 3, seed=1234)).save(path)
    assert load(storage).sha256 != before.sha256


def test_a_photo_that_vanishes_before_it_is_hashed_is_named(load: Load, photos: Path) -> None:
    streamed = load()
    path = photos / streamed.test.files[0]
    path.unlink()
    with pytest.raises(UserError, match=f"^{path} can't be read: .*No such file"):
        _ = streamed.sha256


# The stream of batches


def numbers_of(step: int, order: np.ndarray) -> np.ndarray:
    return order[step]


def open_stream(
    images: LazyImages, order: np.ndarray, start: int = 0, **options: Any
) -> stream.BatchStream:
    options = {"workers": 0, "most": 2} | options
    return stream.BatchStream(
        images, partial(numbers_of, order=order), start, len(order), **options
    )


def random_order(n_images: int, steps: int = 6, batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n_images, (steps, batch))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_step_on(load: Load, workers: int) -> None:
    images = load().train.images
    assert isinstance(images, LazyImages)
    expected, order = images[:], random_order(len(images))
    reader = open_stream(images, order, start=1, workers=workers)
    try:
        for step, n_steps in ((1, 2), (3, 1), (4, 2)):
            taken = reader.take(n_steps)
            assert taken.shape == (2, 4, 8, 8, 3)
            np.testing.assert_array_equal(taken[:n_steps], expected[order[step : step + n_steps]])
            assert taken.ctypes.data % 64 == 0
            assert reader.waited > 0
    finally:
        reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photo_ends_a_stream_or_is_counted(
    load: Load, photos: Path, workers: int, warned: list[str]
) -> None:
    for skip_broken in (False, True):
        streamed = load(skip_broken=skip_broken)
        images = streamed.train.images
        assert isinstance(images, LazyImages)
        path = photos / streamed.train.files[2]
        path.write_bytes(b"")
        reader = open_stream(images, np.array([[0, 1], [2, 3]]), workers=workers)
        try:
            reader.take(1)
            if skip_broken:
                replaced = reader.take(1)
                np.testing.assert_array_equal(replaced[0, 0], images[3])
                assert streamed.replaced == (streamed.train.files[2],)
            else:
                with pytest.raises(UserError, match=f"^{path} can't be read as an image: "):
                    reader.take(1)
        finally:
            reader.close()
    assert len(warned) == 2
    assert ": 1 file skipped" in warned[0]  # The one that the first round broke.
    assert warned[1].endswith("; another photo of its class replaces it")


@pytest.mark.slow
def test_a_killed_worker_is_one_line(load: Load) -> None:
    images = load().train.images
    assert isinstance(images, LazyImages)
    reader = open_stream(images, random_order(len(images), steps=2000), workers=1)
    try:
        reader.take(1)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match=r"^a process that decodes photos has ended \(.*-9"):
            for _ in range(1999):
                reader.take(1)
    finally:
        reader.close()
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, signal, sys, os
import numpy as np
from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data.stream import BatchStream

config = DataConfig(name="folder", dir=sys.argv[1], image_size=8)
images = data.load(config, "", "stream").train.images
reader = BatchStream(images, lambda step: np.arange(4), 0, 2000, workers=1, most=2)
reader.take(1)
(worker,) = multiprocessing.active_children()
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(photos: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(photos)]
    output = photos.parent / "output"  # A pipe would be open for as long as the worker lives.
    with output.open("w") as file:
        killed = subprocess.run(command, stdout=file, check=False)
    assert killed.returncode == -signal.SIGKILL
    worker = int(output.read_text())
    deadline = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("lazy", [False, True])
def test_reading_ahead_gives_each_block(load: Load, lazy: bool) -> None:
    images = load("stream" if lazy else "memory").train.images
    numbers = [np.array([3, 1]), np.arange(4), np.array([5])]
    blocks = list(stream.read_ahead(images, numbers))
    for block, chosen in zip(blocks, numbers, strict=True):
        np.testing.assert_array_equal(block, images[chosen])
    assert list(stream.read_ahead(images, [])) == []


# Training


def streamed_config(photos: Path, **sections: Any) -> Config:
    """A small network and batches of 8, with dropout, padding, and segments of two steps at most.

    "alternate" flips depend on the numbers of the examples.
    """
    config = Config(
        name="streamed",
        data=DataConfig(name="folder", dir=str(photos), image_size=8, validation=0.2),
        augment=AugmentConfig(flip="alternate", translate=1),
        model=ModelConfig(name="vgg", blocks=((4,), (4,)), dense=(8,), dropout=0.25),
        train=TrainConfig(epochs=2, batch_size=8),
        runtime=RuntimeConfig(segment_steps=2),
    )
    return edit(config, **sections)


@pytest.mark.slow
def test_training_on_a_stream_gives_the_bits_of_memory(load: Load, photos: Path) -> None:
    config = streamed_config(photos)
    runs = {}
    for storage, workers in (("memory", 0), ("stream", 0), ("stream", 2)):
        workdir = photos.parent / f"{storage}{workers}"
        workdir.mkdir()
        config = edit(config, runtime={"storage": storage, "workers": workers})
        runs[storage, workers] = train_run(config, load(storage, validation=0.2), workdir)
        runs[storage, workers]["lines"] = result(workdir)[1]
    held = runs["memory", 0]
    assert held["steps"] == 2 * 3
    for (storage, _), found in runs.items():
        for line in found["lines"]:
            assert ("wait_share" in line) == (storage == "stream" and line["step"] in (2, 3, 5, 6))
            line.pop("wait_share", None)
        for name in ("lines", "params_sha256", "test_loss", "test_accuracy", "train_loss"):
            assert found[name] == held[name], name
    assert "wait_share" not in held
    assert 0 < runs["stream", 0]["wait_share"] < 1
    assert runs["stream", 0]["replaced_photos"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_stream_resumes_in_mid_epoch(
    load: Load, photos: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config, dataset = streamed_config(photos), load(validation=0.2)
    whole = fit(config, dataset, photos.parent / "whole").state
    first = edit(config, runtime={"segment_steps": 1, "storage": "memory"})
    fit_until(step, first, load("memory", validation=0.2), workdir, monkeypatch)
    resumed = fit(config, dataset, workdir).state
    assert trees.sha256(resumed) == trees.sha256(whole)


@pytest.mark.slow
def test_segments_of_a_stream_fit_into_a_chunk(
    load: Load, photos: Path, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    config, dataset = streamed_config(photos), load(validation=0.2)
    assert Setup.of(config, dataset).config.runtime.segment_steps == 2
    expected = fit(config, dataset, photos.parent / "whole").state
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2 * 8 * 192 - 1)
    assert Setup.of(config, dataset).config.runtime.segment_steps == 1
    assert trees.sha256(fit(config, dataset, workdir).state) == trees.sha256(expected)
    assert all("images_per_second" in line for line in lines(workdir))
    held = load("memory", validation=0.2)
    assert Setup.of(config, held).config.runtime.segment_steps == 2


@pytest.mark.slow
def test_several_passes_an_epoch_and_an_order_of_their_own(
    load: Load, photos: Path, workdir: Path
) -> None:
    config = streamed_config(photos, train={"min_epoch_steps": 5, "epochs": 1})
    assert Setup.of(config, load(validation=0.2)).passes == 2
    hashes = [
        trees.sha256(fit(config, load(storage, validation=0.2), workdir / storage).state)
        for storage in ("memory", "stream")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_frozen_outputs_of_streamed_photos_are_cached(
    load: Load, photos: Path, workdir: Path
) -> None:
    plain = replace(streamed_config(photos), augment=AugmentConfig())
    config = edit(plain, optim={"groups": HEAD}, train={"cache_frozen": True})
    hashes = [
        trees.sha256(fit(config, load(storage, validation=0.2), workdir / storage).state)
        for storage in ("memory", "stream")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_a_learning_rate_is_found_on_a_stream(load: Load, photos: Path, workdir: Path) -> None:
    config = streamed_config(photos)
    curves = [
        find_rate.find(config, load(storage, validation=0.2), RunFolder(workdir, quiet), 8).losses
        for storage in ("memory", "stream")
    ]
    np.testing.assert_array_equal(curves[0], curves[1])


@pytest.mark.slow
def test_a_photo_that_breaks_in_training_ends_the_run_in_one_line(photos: Path) -> None:
    """It is deleted in the first epoch, by a hook, and read again in the second."""
    (photos.parent / "own.py").write_text(
        "import os\n"
        "def delete(moment):\n"
        "    if moment.epoch == 1: os.rename('photos/bee', 'photos/.bee')\n"
    )
    command = (
        "--data.name=folder",
        "--data.dir=photos",
        "--data.image_size=8",
        "--model.blocks=[[4]]",
        "--model.dense=[16]",
        "--train.epochs=30",
        "--train.batch_size=4",
        "--runtime.storage=stream",
        "--hooks=own.py:delete",
        "--workdir=run",
    )
    message = refuse(*command, cwd=photos.parent)
    assert re.match(r"photos/bee/\d+\.png can't be read as an image: .*No such file", message)
    assert message.endswith("restore it, or replace such photos with --data.skip_broken=true")
    (photos / ".bee").rename(photos / "bee")
    command = (*(one for one in command if "epochs" not in one and "hooks" not in one),)
    finish(*command, "--train.epochs=30", "--data.skip_broken=true", cwd=photos.parent)


@pytest.mark.slow
def test_replaced_photos_are_counted_in_the_summary(
    load: Load, photos: Path, workdir: Path, warned: list[str]
) -> None:
    """They vanish after the first step, when the run has not saved anything yet."""
    config = streamed_config(photos, data={"skip_broken": True, "validation": 0.0})
    config = edit(config, train={"epochs": 8})  # Up to 44 of 24 * 8 are read before the first step.
    streamed = load(skip_broken=True)

    @every(steps=1)
    def delete(moment: Moment) -> None:
        if moment.step == 1:
            for split in (streamed.train, streamed.test):
                (photos / split.files[0]).unlink()

    expected = load().sha256
    found = train(config, streamed, workdir, make_log=quiet, hooks=[delete]).summary
    assert found["replaced_photos"] == 2
    assert len(warned) == 2
    assert found["data"]["sha256"] == expected


TWO_PROCESSES = (
    "--data.name=folder",
    "--data.dir=../photos",
    "--data.image_size=8",
    "--data.validation=0.2",
    "--augment.flip=alternate",
    "--model.blocks=[[4]]",
    "--model.dense=[16]",
    "--train.epochs=3",
    "--train.batch_size=8",
    "--optim.learning_rate=0.1",
    "--workdir=run",
)


@pytest.mark.slow
def test_two_processes_read_disjoint_shards(load: Load, tmp_path: Path) -> None:
    """Each has half of every batch, and of what is evaluated; together they agree with one."""
    (tmp_path / "spy.py").write_text(SPY)
    (tmp_path / "one").mkdir()
    alone = start(*TWO_PROCESSES, "--runtime.storage=memory", cwd=tmp_path / "one", **ONE_DEVICE)
    assert alone.end() == 0, alone.stderr
    two = launch(
        tmp_path, *TWO_PROCESSES, "--runtime.storage=stream", "--hooks=../spy.py:note_read"
    )
    for code, _, errors in wait(two):
        assert code == 0, errors
    np.testing.assert_allclose(losses(tmp_path / "0/run"), losses(tmp_path / "one/run"), rtol=2e-5)
    found, expected = summary(tmp_path / "0/run"), summary(tmp_path / "one/run")
    np.testing.assert_allclose(found["test_loss"], expected["test_loss"], rtol=1e-4)
    assert found["data"] == expected["data"]
    files = {f"../photos/{file}" for file in load(validation=0.2).train.files}
    assert -(-len(files) // 8) == 3  # Steps an epoch; each process has half of each.
    read = [(tmp_path / str(i) / "read.txt").read_text().splitlines() for i in range(2)]
    assert sum(file in files for file in read[1]) == 3 * 24 // 2
    assert files < {*read[0], *read[1]}


@pytest.mark.parametrize("streams", [True, False])
def test_processes_store_their_images_alike(monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    monkeypatch.setattr(processes, "broadcast_json", lambda value: ["f00d", True])
    if streams:
        processes.check_same_data("f00d", True)
        with pytest.raises(UserError, match=r"^process 0 has other images than process 0$"):
            processes.check_same_data("beef", True)
    else:
        with pytest.raises(UserError, match=r"only one of them streams .* runtime.storage=stream$"):
            processes.check_same_data("f00d", False)


def print_whether_memory_is_shared() -> None:
    array = memory.empty_images(10, 32, 32, 3)
    array[:] = noise(*array.shape)
    whole = mesh.lend(array)
    for shard in whole.addressable_shards:
        print(shard.data.unsafe_buffer_pointer() == array.ctypes.data, shard.data.shape[0])
    batches = array.reshape(2, 5 * 2, 16, 32, 3)
    np.testing.assert_array_equal(np.asarray(mesh.divide(batches, axis=1)), batches)
    print(mesh.own_places(10) == tuple(range(10)))


def test_the_devices_of_a_cpu_share_the_host_s_images() -> None:
    assert on_devices(print_whether_memory_is_shared, n=2) == ["True 10", "True 10", "True"]
    assert on_devices(print_whether_memory_is_shared, n=1) == ["True 10", "True"]


SPY = """
from cnn_jax.data import photos

load_image = photos._read_image

def spying(path, layout):
    with open("read.txt", "a") as file:
        print(path, file=file)
    return load_image(path, layout)

photos._read_image = spying

def note_read(moment):
    pass
"""


# A batch that is larger than the training set


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "cut"), [(1, 22), (4, 24)])
def test_a_batch_is_cut_to_the_training_set(
    tiny: Config,
    dataset: ImageDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    accumulate: int,
    cut: int,
) -> None:
    train = {"accumulate": accumulate, "class_weights": "balanced"}
    large = edit(tiny, train={"batch_size": 4096, **train})
    states = []
    for i, config in enumerate((large, edit(tiny, train={"batch_size": cut, **train}))):
        (tmp_path / str(i)).mkdir()
        states.append(fitting.fit(config, dataset, RunFolder(tmp_path / str(i))).state)
    assert int(states[0].step) == int(states[1].step) == 2
    assert trees.sha256(states[0]) == trees.sha256(states[1])
    line = f"train.batch_size=4096 is cut to {cut}, as there are 22 training images"
    assert capsys.readouterr().out.splitlines().count(line) == 1


# Free memory


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


MEMINFO = "MemTotal:       2000 kB\nMemFree:         10 kB\nMemAvailable:    1000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "900000\n",
                "sys/fs/cgroup/job/memory.current": "500000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 4\ninactive_file 200000\n",
            },
            600_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "300000\n",
                "sys/fs/cgroup/memory.current": "100000\n",
            },
            200_000,
        ),
        (
            {  # Docker with version 1: the path is that of the host, and not there.
                "proc/self/cgroup": "5:memory:/docker/ab12\n4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "700000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "600000\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 9\ntotal_inactive_file 50000\n",
            },
            150_000,
        ),
        (
            {  # No limit.
                "proc/self/cgroup": "5:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "600000\n",
            },
            1_024_000,
        ),
        (
            {  # More is used than is allowed.
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "300000\n",
                "sys/fs/cgroup/memory.current": "400000\n",
            },
            0,
        ),
    ],
)
def test_limits_of_containers_count(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write_tree(tmp_path, {"proc/meminfo": MEMINFO} | files)
    assert memory.free_bytes(tmp_path) == expected


def test_without_proc_half_of_the_memory_counts(tmp_path: Path) -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.free_bytes(tmp_path) == installed // 2
    assert 0 < memory.free_bytes() < installed


def test_images_for_devices_are_aligned() -> None:
    for n in range(1, 8):
        array = memory.empty_images(n, 3, 5, 3)
        assert array.shape == (n, 3, 5, 3)
        assert array.ctypes.data % 64 == 0


def test_sizes_are_printed_as_people_write_them() -> None:
    assert [memory.format_bytes(n) for n in (1_900_000_000, 64e6)] == ["1.9 GB", "64 MB"]
