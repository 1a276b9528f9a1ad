"""Images that are read when they are needed: the same as in memory, and bounded in memory."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, write_photos
from PIL import Image

from cnn_jax import data, memory
from cnn_jax.config import DataConfig
from cnn_jax.data import ImageDataset, dataset, stream
from cnn_jax.data.dataset import LazyImages
from cnn_jax.errors import UserError

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
    options = {"workers": 0, "ahead": 2} | options
    return stream.BatchStream(
        images, partial(numbers_of, order=order), start, len(order), **options
    )


def random_order(n_images: int, steps: int = 6, batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n_images, (steps, batch))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_step_on(load: Load, workers: int) -> None:
    images = load().train.images
    assert isinstance(images, LazyImages)
    expected, order = images[:], random_order(len(images))
    reader = open_stream(images, order, start=1, workers=workers)
    try:
        for step, n_steps in ((1, 2), (3, 1), (4, 2)):
            assert reader.step == step
            taken = reader.take(n_steps)
            np.testing.assert_array_equal(taken, expected[order[step : step + n_steps]])
            assert taken.ctypes.data % 64 == 0
        assert reader.waited > 0
    finally:
        reader.close()


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
    assert len(warned) == 1


def test_a_killed_worker_is_one_line(load: Load) -> None:
    images = load().train.images
    assert isinstance(images, LazyImages)
    reader = open_stream(images, random_order(len(images), steps=2000), workers=1)
    try:
        reader.take(1)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match=r"^a process that decodes photos has ended \(.*-9"):
            reader.take(1999)
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
reader = BatchStream(images, lambda step: np.arange(4), 0, 2000, workers=1, ahead=2)
reader.take(1)
(worker,) = multiprocessing.active_children()
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(photos: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(photos)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    deadline = time.monotonic() + 20
    while is_running(int(killed.stdout)):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("lazy", [False, True])
def test_reading_ahead_gives_every_image_once(load: Load, lazy: bool) -> None:
    images = load("stream" if lazy else "memory").train.images
    blocks = list(stream.read_ahead(images, 5))
    assert [len(block) for block in blocks[:-1]] == [5] * (len(images) // 5)
    np.testing.assert_array_equal(np.concatenate(blocks), images[:])


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
