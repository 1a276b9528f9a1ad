"""Official archives of the same format but small, from a server that does what real ones do."""

import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets
from helpers.data import noise
from tensorflow_datasets.core import hashing

from cnn_jax import data
from cnn_jax.config import DataConfig
from cnn_jax.data import archives, download
from cnn_jax.data.download import Archive
from cnn_jax.errors import UserError

CLASSES = {
    "batches.meta.txt": [f"class_{i}" for i in range(10)],
    "coarse_label_names.txt": [f"coarse_{i}" for i in range(20)],
    "fine_label_names.txt": [f"fine_{i}" for i in range(100)],
}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, each connection with the next of `faults`, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str] = []
        """What happens to each connection: bytes after which it breaks, or "503" and the like."""
        self.ranges = True
        self.requests: list[str] = []
        """Path and range of each request."""
        self.stalled, self.resume = threading.Event(), threading.Event()

    def archives(self) -> list[Archive]:
        return [
            Archive(
                f"http://127.0.0.1:{self.server_address[1]}/{name}",
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
            for name, content in self.files.items()
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, wanted = self.server.files[self.path[1:]], self.headers.get("Range", "")
        self.server.requests.append(f"{self.path} {wanted}".rstrip())
        fault = self.server.faults.pop(0) if self.server.faults else len(content)
        if isinstance(fault, str) and fault.isdigit():
            self.send_error(int(fault))
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0) if self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault == "stall":
            self.wfile.write(content[start : start + 100_000])
            self.server.stalled.set()
            self.server.resume.wait(60)
        else:
            self.wfile.write(content[start : start + int(fault)])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.resume.set()
        server.shutdown()
        thread.join()


def cifar(labels: int, files: dict[str, bytes]) -> bytes:
    """Returns a tar.gz as the University of Toronto publishes it."""
    folder = {1: "cifar-10-batches-bin", 2: "cifar-100-binary"}[labels]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def cifar_rows(*labels: np.ndarray, images: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(label[:, None] for label in labels), planes], 1).tobytes()


def names(file: str) -> bytes:
    return "".join(f"{name}\n" for name in CLASSES[file]).encode() + b"\n"


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return gzip.compress(header + values.tobytes())


TRAIN, TEST = noise(60, 32, 32, 3, seed=1), noise(20, 32, 32, 3, seed=2)
TRAIN_LABELS, TEST_LABELS = (np.arange(n, dtype=np.uint8) * 7 % 10 for n in (60, 20))


def cifar10() -> dict[str, bytes]:
    train = [
        cifar_rows(TRAIN_LABELS[i : i + 12], images=TRAIN[i : i + 12]) for i in range(0, 60, 12)
    ]
    files = {f"data_batch_{number}.bin": part for number, part in enumerate(train, start=1)}
    files |= {"batches.meta.txt": names("batches.meta.txt"), "readme.html": b"<html>"}
    files["test_batch.bin"] = cifar_rows(TEST_LABELS, images=TEST)
    return {"cifar-10-binary.tar.gz": cifar(1, files)}


def mnist() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte.gz": idx(TRAIN[:, :28, :28, 0]),
        "train-labels-idx1-ubyte.gz": idx(TRAIN_LABELS),
        "t10k-images-idx3-ubyte.gz": idx(TEST[:, :28, :28, 0]),
        "t10k-labels-idx1-ubyte.gz": idx(TEST_LABELS),
    }


def builder(name: str, root: Path) -> Any:
    return tensorflow_datasets.builder(name, data_dir=root, file_format="array_record")


def prepare(server: Server, root: Path, name: str = "cifar10") -> Path:
    return archives.prepare(builder(name, root), server.archives(), pause=0)


def tfds_order(split: str, n: int) -> list[int]:
    hasher = hashing.Hasher(split)
    return sorted(range(n), key=hasher.hash_key)


def check_cifar10(root: Path) -> None:
    """Reads the set with tfds and with our own reader, and leaves nothing beside it."""
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        source = tensorflow_datasets.data_source("cifar10", split=split, data_dir=root)
        order = tfds_order(split, len(images))
        assert [example["id"].decode() for example in source] == [f"{split}_{i:05}" for i in order]
        assert [example["label"] for example in source] == labels[order].tolist()
        np.testing.assert_array_equal([example["image"] for example in source], images[order])
        assert source.dataset_info.features["label"].names == CLASSES["batches.meta.txt"]
    assert sorted(path.name for path in (root / "cifar10").iterdir()) == ["3.0.2"]
    assert sorted(path.name for path in (root / "cifar10" / "3.0.2").iterdir()) == [
        "cifar10-test.array_record-00000-of-00001",
        "cifar10-train.array_record-00000-of-00001",
        "dataset_info.json",
        "features.json",
        "label.labels.txt",
    ]
    dataset = data.load(DataConfig(name="cifar10", dir=str(root)), str(root / "cache"))
    assert dataset.class_names == tuple(CLASSES["batches.meta.txt"])
    np.testing.assert_array_equal(dataset.train.images, TRAIN[tfds_order("train", 60)])
    np.testing.assert_array_equal(dataset.test.images, TEST[tfds_order("test", 20)])
    assert dataset.test.labels.tolist() == TEST_LABELS[tfds_order("test", 20)].tolist()


def looks_prepared(root: Path) -> bool:
    by_tfds = builder("cifar10", root).is_prepared()
    assert by_tfds == bool(list(root.glob("cifar10/3.0.2")))
    return by_tfds


def failure(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar10(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files = cifar10()
    assert prepare(server, tmp_path) == tmp_path / "cifar10" / "3.0.2"
    check_cifar10(tmp_path)
    assert server.requests == ["/cifar-10-binary.tar.gz"]
    shown = " ".join(capsys.readouterr().err.split())
    assert "cifar-10-binary.tar.gz" in shown
    size = len(server.files["cifar-10-binary.tar.gz"]) / 1024
    assert f"{size:.1f}/{size:.1f} KiB" in shown
    assert "writing cifar10 train" in shown
    assert prepare(server, tmp_path) == tmp_path / "cifar10" / "3.0.2"
    assert len(server.requests) == 1


def test_description_of_the_set(server: Server, tmp_path: Path) -> None:
    server.files = cifar10()
    prepare(server, tmp_path)
    info = builder("cifar10", tmp_path).info
    assert (info.splits["train"].num_examples, info.splits["test"].num_examples) == (60, 20)
    assert info.splits["train"].shard_lengths == [60]
    assert info.splits["train"].num_bytes > TRAIN.nbytes
    assert info.supervised_keys == ("image", "label")


def test_cifar100(server: Server, tmp_path: Path) -> None:
    fine, coarse = (np.arange(60) * 13 % 100).astype(np.uint8), np.arange(60, dtype=np.uint8) % 20
    files = {file: names(file) for file in ("coarse_label_names.txt", "fine_label_names.txt")}
    files["train.bin"] = cifar_rows(coarse, fine, images=TRAIN)
    files["test.bin"] = cifar_rows(coarse[:20], fine[:20], images=TEST)
    server.files = {"cifar-100-binary.tar.gz": cifar(2, files)}
    prepare(server, tmp_path, "cifar100")
    source = tensorflow_datasets.data_source("cifar100", split="train", data_dir=tmp_path)
    order = tfds_order("train", 60)
    assert [example["label"] for example in source] == fine[order].tolist()
    assert [example["coarse_label"] for example in source] == coarse[order].tolist()
    np.testing.assert_array_equal([example["image"] for example in source], TRAIN[order])
    assert source.dataset_info.features["label"].names == CLASSES["fine_label_names.txt"]
    assert source.dataset_info.features["coarse_label"].names == CLASSES["coarse_label_names.txt"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(server: Server, tmp_path: Path, name: str) -> None:
    server.files = mnist()
    prepare(server, tmp_path, name)
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        source = tensorflow_datasets.data_source(name, split=split, data_dir=tmp_path)
        order = tfds_order(split, len(images))
        assert [example["label"] for example in source] == labels[order].tolist()
        pixels = np.stack([example["image"] for example in source])
        np.testing.assert_array_equal(pixels, images[order, :28, :28, :1])
    dataset = data.load(DataConfig(name=name, dir=str(tmp_path)), str(tmp_path / "cache"))
    assert dataset.class_names[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]
    assert dataset.train.images.shape == (60, 28, 28, 3)


def test_wrong_checksum(server: Server, tmp_path: Path) -> None:
    server.files = cifar10()
    (good,) = server.archives()
    bad = Archive(good.url, good.size, "0" * 64)
    message = failure(lambda: archives.prepare(builder("cifar10", tmp_path), [bad], pause=0))
    assert message == (
        f"{good.url} is not the file that is expected: its SHA-256 is {good.sha256}, not {'0' * 64}"
    )
    assert not looks_prepared(tmp_path)
    assert not list(tmp_path.rglob("*.gz"))
    prepare(server, tmp_path)
    check_cifar10(tmp_path)


def test_broken_connections_are_continued(server: Server, tmp_path: Path) -> None:
    server.files, server.faults = cifar10(), [70_000, "503", 0, 100_000]
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    ranges = [request.partition(" ")[2] for request in server.requests]
    assert ranges == ["", *["bytes=70000-"] * 3, "bytes=170000-"]


def test_broken_connections_without_ranges_start_again(server: Server, tmp_path: Path) -> None:
    server.files, server.faults, server.ranges = cifar10(), [70_000, 30_000, 90_000], False
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert len(server.requests) == 4


def test_a_silent_server_counts_as_broken(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    server.files, server.faults = cifar10(), ["stall"]
    start = time.monotonic()
    prepare(server, tmp_path)
    assert time.monotonic() - start < 20
    check_cifar10(tmp_path)
    assert server.requests[1].startswith("/cifar-10-binary.tar.gz bytes=")


def test_connections_that_always_break_end_in_one_line(server: Server, tmp_path: Path) -> None:
    server.files, server.faults = cifar10(), [70_000] + [0] * 9
    (archive,) = server.archives()
    assert failure(lambda: prepare(server, tmp_path)) == (
        f"{archive.url}: 10 connections broke, the last one with: the server sent too few bytes; "
        f"the next call continues after 70,000 of {archive.size:,} bytes"
    )
    assert not looks_prepared(tmp_path)
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert server.requests[-1] == "/cifar-10-binary.tar.gz bytes=70000-"


def test_no_network(tmp_path: Path) -> None:
    with Server() as server:
        server.files = cifar10()
    (archive,) = server.archives()
    message = failure(lambda: prepare(server, tmp_path))
    assert message.startswith(f"{archive.url}: 10 connections broke, the last one with: ")
    assert "Connection refused" in message
    assert not looks_prepared(tmp_path)


def test_a_pause_before_another_connection(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.files, server.faults = cifar10(), [70_000, 70_000]
    archives.prepare(builder("cifar10", tmp_path), server.archives())
    assert [pause for pause in pauses if pause >= 0.1] == [1.0, 1.0]


def test_a_server_that_refuses(server: Server, tmp_path: Path) -> None:
    server.files, server.faults = cifar10(), ["404"]
    (archive,) = server.archives()
    assert failure(lambda: prepare(server, tmp_path)) == (
        f"{archive.url}: the server answers 404 Not Found"
    )
    assert len(server.requests) == 1
    assert not looks_prepared(tmp_path)


def left_over(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "cifar10" / "incomplete.3.0.2"
    folder.mkdir(parents=True)
    (folder / "cifar-10-binary.tar.gz").write_bytes(content)


def test_a_damaged_incomplete_file_is_downloaded_once_more(server: Server, tmp_path: Path) -> None:
    server.files = cifar10()
    left_over(tmp_path, bytes(50_000))
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert server.requests == [
        "/cifar-10-binary.tar.gz bytes=50000-",
        "/cifar-10-binary.tar.gz",
    ]


def test_an_incomplete_file_that_is_too_long_for_the_server(server: Server, tmp_path: Path) -> None:
    server.files = cifar10()
    left_over(tmp_path, bytes(50_000))
    server.faults = ["416"]
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert server.requests[1] == "/cifar-10-binary.tar.gz"


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
import tensorflow_datasets
from array_record.python import array_record_module
from cnn_jax.data import archives, download
name, root, when, limit, *archive = sys.argv[1:]
archive = download.Archive(archive[0], int(archive[1]), archive[2])
records, write_records = archives._records, archives._write_records

def killed_while_writing(*args, **kwargs):
    for number, record in enumerate(records(*args, **kwargs)):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield record

def killed_after_writing(path, records):
    write_records(path, records)
    if "test" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1

if when == "writing":
    archives._records = killed_while_writing
if when == "written":
    archives._write_records = killed_after_writing
builder = tensorflow_datasets.builder(name, data_dir=root, file_format="array_record")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    archives.prepare(builder, [archive], pause=0)
except (OSError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def start_script(
    server: Server, root: Path, when: str = "", limit: int = 0
) -> subprocess.Popen[str]:
    (archive,) = server.archives()
    words = ("cifar10", root, when, limit, archive.url, archive.size, archive.sha256)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_while_downloading(server: Server, tmp_path: Path) -> None:
    server.files, server.faults = cifar10(), ["stall"]
    with start_script(server, tmp_path) as process:
        assert server.stalled.wait(60)
        path = tmp_path / "cifar10" / "incomplete.3.0.2" / "cifar-10-binary.tar.gz"
        deadline = time.monotonic() + 60
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    received = path.stat().st_size
    assert 0 < received <= 100_000
    assert not looks_prepared(tmp_path)
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert server.requests[-1] == f"/cifar-10-binary.tar.gz bytes={received}-"


@pytest.mark.parametrize("when", ["writing", "written"])
def test_a_kill_while_writing(server: Server, tmp_path: Path, when: str) -> None:
    server.files = cifar10()
    with start_script(server, tmp_path, when) as process:
        process.communicate(timeout=60)
    assert process.returncode == -9
    records = tmp_path / "cifar10" / "incomplete.3.0.2" / "records"
    assert list(records.iterdir())
    assert not looks_prepared(tmp_path)
    (records / "of an older version").touch()
    prepare(server, tmp_path)
    check_cifar10(tmp_path)
    assert len(server.requests) == 1  # The archive was complete, and was kept.


@pytest.mark.parametrize("part", ["download", "records"])
def test_a_full_disk(server: Server, tmp_path: Path, part: str) -> None:
    server.files = cifar10()
    size = len(server.files["cifar-10-binary.tar.gz"])
    limit, error = {
        "download": (size - 1000, "OSError: [Errno 27] File too large"),
        # The archive is there already, and the training images are three quarters of it.
        "records": (size * 3 // 4, "RuntimeError: write() failed: File too large"),
    }[part]
    if part == "records":
        left_over(tmp_path, server.files["cifar-10-binary.tar.gz"])
    with start_script(server, tmp_path, limit=limit) as process:
        output, errors = process.communicate(timeout=60)
    assert output.startswith(error), (output, errors)
    assert not looks_prepared(tmp_path)
    prepare(server, tmp_path)
    check_cifar10(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data.tfds, "_reachable", lambda url: True)
    config = DataConfig(name="cifar10", dir=str(tmp_path / "file"))
    message = failure(lambda: data.load(config, str(tmp_path / "cache")))
    assert message.startswith(f"cifar10 is not in {tmp_path / 'file'}, and preparing it failed: ")


def test_two_processes_prepare_a_set_once(server: Server, tmp_path: Path) -> None:
    """Threads stand for processes: each opens the lock file by itself."""
    server.files, server.faults = cifar10(), ["stall"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare, server, tmp_path)
        assert server.stalled.wait(60)
        second = pool.submit(prepare, server, tmp_path)
        time.sleep(0.2)
        assert not second.done()
        server.resume.set()
        assert first.result() == second.result()
    check_cifar10(tmp_path)
    assert len(server.requests) == 2  # The one that stalled, and its continuation.


CHECKSUMS = {
    "cifar10": ["c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"],
    "cifar100": ["58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"],
    "mnist": [
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ],
    "fashion_mnist": [
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ],
}


@pytest.mark.parametrize("name", archives.NAMES)
def test_official_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The readers find their files under the names of the official archives."""
    asked: list[Archive] = []
    monkeypatch.setattr(archives, "download", lambda archives, *rest: asked.extend(archives))
    with pytest.raises(FileNotFoundError) as caught:
        archives.prepare(builder(name, tmp_path))
    assert Path(caught.value.filename).name in [archive.name for archive in asked]
    assert [archive.sha256 for archive in asked] == CHECKSUMS[name]
    hosts = ("www.cs.toronto.edu", "storage.googleapis.com", "fashion-mnist.s3-website.")
    assert all(archive.url.split("/")[2].startswith(hosts) for archive in asked)
    assert sum(archive.size for archive in asked) > 10_000_000
