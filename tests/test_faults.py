"""Nothing lost, nothing silently wrong: kills, full disks, damage, and input of strangers."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.checkpoints import empty, everything, largest_file
from helpers.cli import SMALL, SMALL_STEPS, command, finish, refuse, start
from helpers.disks import fill, mounted
from helpers.results import line, result
from helpers.training import edit, fit, initial, quiet
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset, Split, photos
from cnn_jax.errors import UserError
from cnn_jax.runs import checkpoint
from cnn_jax.runs.checkpoint import CheckpointError, Checkpoints
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.outcome import write_json

RUN = (*SMALL, "--runtime.segment_steps=1", "--runtime.checkpoint_seconds=0", "--workdir=run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    finish(*RUN, cwd=cwd)
    assert len(result(cwd / "run")[1]) == SMALL_STEPS
    return cwd / "run"


def leftovers(workdir: Path) -> list[Path]:
    """Returns what a save that was cut short has left behind.

    Unlike Path.glob, os.walk takes it that a folder vanishes while a running save is watched.
    """
    return sorted(
        Path(folder, name)
        for folder, folders, files in os.walk(workdir)
        for name in (*folders, *files)
        if "tmp" in name and Path(folder).name != "tensorboard"
    )


def saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*/*tmp*"))


def assert_whole_checkpoint(workdir: Path) -> None:
    """Reads all that counts as a checkpoint: the newest is whole, and no other is half of one.

    A kill inside the removal of an old one may leave a part of it, which reading must notice.
    """
    if not (workdir / "checkpoints/latest").is_dir():
        return
    with Checkpoints(workdir, "latest") as store:
        for step in store.steps():
            try:
                loaded = store.read(step, everything)
            except CheckpointError:
                assert step != store.steps()[-1]
            else:
                assert int(loaded.arrays["step"]) == step
                assert "params.head.kernel" in loaded.arrays


def assert_same(workdir: Path, whole: Path) -> None:
    assert result(workdir) == result(whole)
    assert [line["step"] for line in result(workdir)[1]] == list(range(1, SMALL_STEPS + 1))
    assert leftovers(workdir) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "wanted_inside"), [(5, 2), pytest.param(20, 5, marks=pytest.mark.slow)]
)
def test_kills_change_no_bit(whole: Path, tmp_path: Path, wanted: int, wanted_inside: int):
    """kill -9 at random moments of a run's life, every third as soon as a save has begun.

    A kill counts as one inside a save if the save's temporary folder is still there after it. A
    run that is killed is resumed until it ends and is compared, and then another one starts.
    """
    moments = random.Random(0)
    kills = inside = ended = 0
    while kills < wanted or inside < wanted_inside:
        cwd = tmp_path / str(ended)
        cwd.mkdir(exist_ok=True)
        workdir = cwd / "run"
        started = start(*RUN, cwd=cwd)
        if kills % 3 == 0:
            before = leftovers(workdir)
            started.wait_for(lambda w=workdir, b=before: saving(w) and leftovers(w) != b)
            time.sleep(moments.uniform(0, 0.02))
        else:
            time.sleep(moments.uniform(0, 2.5))
        if started.kill():
            kills += 1
            inside += saving(workdir)
            assert_whole_checkpoint(workdir)
        else:
            assert_same(workdir, whole)
            ended += 1
    workdir = tmp_path / str(ended) / "run"
    finish(*RUN, cwd=workdir.parent)
    assert_same(workdir, whole)


def test_a_kill_while_the_config_is_written_leaves_a_workdir_that_starts(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/config.json.tmp").write_text('{"na')
    finish(*RUN, "--train.epochs=0", cwd=tmp_path)
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path):
    """Also from a segment of many seconds, in which the main thread runs no Python."""
    started = start(
        "--model.blocks=[[128,128]]",
        "--train.batch_size=16",  # Gigabytes of a large one would be freed before the end.
        "--runtime.segment_steps=90",
        "--train.epochs=99",
        "--workdir=run",
        cwd=tmp_path,
    )
    started.wait_for((tmp_path / "run/metrics.jsonl").exists)
    time.sleep(0.5)
    started.send(signal.SIGINT)
    time.sleep(3)  # Within two seconds of when it is noticed, it would be a repeat.
    assert started.running()
    started.send(signal.SIGINT)
    assert started.end(seconds=1) == 130
    assert not any((tmp_path / "run/checkpoints/latest").iterdir())


@pytest.mark.slow
def test_the_second_process_on_a_workdir_is_refused(whole: Path, tmp_path: Path):
    first = start(*RUN, cwd=tmp_path)
    first.wait_for((tmp_path / "run/metrics.jsonl").exists)
    (tmp_path / "other").mkdir()
    said = refuse(*RUN[:-1], f"--workdir={tmp_path}/run", cwd=tmp_path / "other")
    assert said == f"workdir {tmp_path}/run is in use by another process"
    assert first.end() == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 8192, 65536])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    whole: Path, tmp_path: Path, left: int
):
    """Whichever file is written when the space ends: events, metrics, or a checkpoint."""
    with mounted(tmp_path / "disk", "size=2m") as disk:
        stopped = start(*RUN[:-1], f"--workdir={disk}/run", cwd=tmp_path)
        stopped.wait_for((disk / "run/checkpoints/latest/3").is_dir)
        stopped.send(signal.SIGTERM)
        assert stopped.end() == 143
        with Checkpoints(disk / "run", "latest") as store:
            kept = store.steps()[-1]
        fill(disk, left)
        said = refuse(*RUN[:-1], f"--workdir={disk}/run", cwd=tmp_path)
        assert "No space left on device" in said
        assert said.startswith(f"{disk}/run")
        with Checkpoints(disk / "run", "latest") as store:
            assert kept <= store.steps()[-1]
        assert_whole_checkpoint(disk / "run")
        (disk / "filling").unlink()
        finish(*RUN[:-1], f"--workdir={disk}/run", cwd=tmp_path)
        assert_same(disk / "run", whole)


# Of tensorstore's callbacks, as orbax has closed its event loop before they come.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_inside_a_save_leaves_the_one_before(tmp_path: Path, monkeypatch):
    """With the space not looked at beforehand, as if another process had taken it since."""
    state = {str(i): np.random.default_rng(i).random(2000) for i in range(8)}
    with (
        mounted(tmp_path / "disk", "size=2m") as disk,
        Checkpoints(disk, "latest", writable=True) as store,
    ):
        store.save(1, state, {})
        monkeypatch.setattr(checkpoint, "_check_space", lambda *_: None)
        for left in (0, 4096, 20_000, 80_000):
            fill(disk, left)
            with pytest.raises(UserError, match=r"latest/2 can't be saved: .*No space left"):
                store.save(2, state, {})
            assert store.steps() == [1]
            store.read(1, everything)
            shutil.rmtree(next(disk.glob("checkpoints/latest/2*")))
        (disk / "filling").unlink()
        store.save(2, state, {})
        assert store.steps() == [1, 2]


@pytest.mark.parametrize("written", ["metrics", "events", "summary"])
def test_a_disk_that_fills_up_while_a_run_is_told_of_is_one_line(
    tiny: Config, tmp_path: Path, written: str
):
    """Nothing waits for ever, either: the events have no thread that could die of it."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        workdir = disk / "run"

        def tell() -> None:
            with RunFolder(workdir, quiet).claim(tiny):
                write_json(workdir / "summary.json", {"steps": 1})
                if written == "summary":
                    fill(disk, 0)
                    write_json(workdir / "summary.json", {"steps": 2})
                log = quiet(workdir)
                with log.running(0, 10**6, 10**6):
                    fill(disk, 0)
                    for step in range(1, 10**6, 99):
                        lines = 99 if written == "metrics" else 1
                        log.segment([line(step + i) for i in range(lines)], 1.0)

        with pytest.raises(UserError, match=r"run can't be written: .*No space left on device"):
            tell()
        assert json.loads((workdir / "summary.json").read_text()) == {"steps": 1}


def test_a_read_only_workdir_is_one_line(whole: Path, tmp_path: Path):
    """By a read-only mount, as root passes over the permissions of files."""
    with mounted(tmp_path / "disk", "size=2m") as disk:
        shutil.copytree(whole, disk / "run")
        (disk / "run/summary.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for workdir in (disk / "run", disk / "new"):
            said = refuse(*RUN[:-1], f"--workdir={workdir}", cwd=tmp_path)
            assert said == f"workdir {workdir} can't be written: Read-only file system"
        evaluated = finish("--mode=evaluate", f"--workdir={disk}/run", cwd=tmp_path)
        assert f"step {SMALL_STEPS}: test accuracy" in evaluated.stdout


def stopped_run(cwd: Path) -> Path:
    """Returns the workdir of a run that was asked to stop half-way, with two checkpoints."""
    started = start(*RUN, cwd=cwd)
    started.wait_for((cwd / "run/checkpoints/latest/3").is_dir)
    started.send(signal.SIGTERM)
    assert started.end() == 143, started.stderr
    return cwd / "run"


def flip_bits(folder: Path) -> None:
    """Changes a bit in each 256 bytes of the arrays' file, so as to meet the parameters as well."""
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    for position in range(100, len(content), 256):
        content[position] ^= 1
    path.write_bytes(content)


def newest(workdir: Path) -> Path:
    with Checkpoints(workdir, "latest") as store:
        return store.folder / str(store.steps()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_bits, empty], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_gone_on_from(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None]
):
    workdir = stopped_run(tmp_path)
    damaged = newest(workdir)
    damage(damaged)
    said = refuse("--mode=evaluate", "--workdir=run", cwd=tmp_path)
    assert f"{damaged} is damaged" in said
    rerun = finish(*RUN, cwd=tmp_path)
    assert f"warning: {damaged} is damaged" in rerun.stdout
    assert f"resuming after step {int(damaged.name) - 1} of {SMALL_STEPS}" in rerun.stdout
    assert_same(workdir, whole)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_starts_anew(
    whole: Path, tmp_path: Path
):
    workdir = stopped_run(tmp_path)
    for folder in (workdir / "checkpoints/latest").iterdir():
        flip_bits(folder)
    rerun = finish(*RUN, cwd=tmp_path)
    assert rerun.stdout.count("is damaged") == 2
    assert "resuming" not in rerun.stdout
    assert_same(workdir, whole)


@pytest.mark.slow
def test_foreign_files_among_the_checkpoints_are_left_alone(whole: Path, tmp_path: Path):
    workdir = stopped_run(tmp_path)
    latest = workdir / "checkpoints/latest"
    (latest / "notes").mkdir()
    (latest / "99x").mkdir()
    (latest / "README").write_text("mine")
    rerun = finish(*RUN, cwd=tmp_path)
    assert "resuming after step" in rerun.stdout
    assert_same(workdir, whole)
    assert (latest / "README").read_text() == "mine"
    assert (latest / "notes").is_dir()
    assert (
        f"step {SMALL_STEPS}: " in finish("--mode=evaluate", "--workdir=run", cwd=tmp_path).stdout
    )


@pytest.mark.parametrize(
    ("section", "values", "held", "needed"),
    [
        ("optim", {"name": "adam"}, "opt_state.0.0.trace", "opt_state.0.0.count"),
        ("model", {"dense": (9,)}, "fc1.bias [8]", "fc1.bias [9]"),
        ("train", {"ema_decay": 0.5}, "nothing else", "average.params.block1"),
    ],
)
def test_a_checkpoint_of_another_optimizer_or_network_is_not_gone_on_from(
    tiny: Config,
    dataset: ImageDataset,
    workdir: Path,
    section: str,
    values: dict[str, Any],
    held: str,
    needed: str,
):
    """Even with a config.json that was exchanged by hand; the message names both sides."""
    fit(tiny, dataset, workdir)
    other = edit(tiny, **{section: values})
    with pytest.raises(UserError, match="another network or optimizer") as refused:
        fit(other, dataset, workdir)
    holds, needs = str(refused.value).split("this config needs")
    assert held in holds
    assert needed in needs


def test_a_float16_checkpoint_is_not_cast(tiny: Config, dataset: ImageDataset, workdir: Path):
    half = jax.tree.map(lambda x: x.astype("float16") if x.ndim else x, initial(tiny, dataset))
    with Checkpoints(workdir, "latest", writable=True) as store:
        store.save(3, half, {})
    with pytest.raises(UserError, match=r"holds .* float16.* needs .* float32"):
        fit(tiny, dataset, workdir)


@pytest.mark.parametrize(
    ("line", "kept"), [("{}", 0), ("no json", 1), ('{"step": "x"}', 0), ("[1]", 0)]
)
def test_damaged_metrics_are_one_line(tiny: Config, workdir: Path, line: str, kept: int):
    path = workdir / "metrics.jsonl"
    path.write_text('{"step": 1}\n' * kept + line + "\n")
    with (
        pytest.raises(UserError, match=f"metrics.jsonl, line {kept + 1} is damaged"),
        quiet(workdir).running(9, 10, 10),
    ):
        pass


ODD_NAMES = (
    b"\xff\xfe.png",
    b"two\nlines.png",
    b"\x1b[31mred.png",
    b"-rf.png",
    b"' $(x) ;.png",
    "\u202eturned.png".encode(),
    b"x" * 200 + b".png",
)


@pytest.mark.slow
def test_odd_names_are_read_and_shown_harmlessly(tmp_path: Path, monkeypatch):
    """Names that are no text, that end lines, and that a terminal would obey."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most locales
    for name in (b"plain", b"odd \xff\n[red]"):
        folder = os.fsencode(tmp_path / "photos") + b"/" + name
        os.makedirs(folder)
        for file in ODD_NAMES:
            with open(folder + b"/" + file, "wb") as opened:
                Image.fromarray(np.full((9, 9, 3), 77, np.uint8)).save(opened, "PNG")
        with open(folder + b"/bro\nken\xff.png", "wb"):
            pass
    folder_of_photos = (
        "--data.name=folder",
        f"--data.dir={tmp_path}/photos",
        "--data.images_per_class=0",
    )
    trained = command(*RUN, *folder_of_photos, "--train.epochs=1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "2 files skipped, the first: odd \\udcff\\n[red]/bro\\nken\\udcff.png" in trained.stderr
    assert "11 train, 3 test images" in trained.stdout
    evaluated = command("--mode=evaluate", "--workdir=run", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "odd \\udcff\\n[red]" in evaluated.stdout
    predicted = command("--mode=predict", "--workdir=run", "photos", cwd=tmp_path)
    assert predicted.returncode == 1, predicted.stderr  # Some are broken.
    assert predicted.stdout.count("\n") == 2 * len(ODD_NAMES)
    assert predicted.stderr.count("\n") == predicted.stderr.count("skipped: ") == 2
    assert not set(predicted.stdout + predicted.stderr) & {"\x1b", "\u202e"}
    said = command("--mode=predict", "--workdir=run", "gone\n\x1b[31m.png", cwd=tmp_path).stderr
    assert said.endswith("read: gone\\n\\x1b[31m.png: is neither a file nor a folder\n")
    assert "\x1b" not in said


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path):
    pixels = np.full((9, 9), np.nan, np.float32)
    Image.fromarray(pixels).save(tmp_path / "nan.tif")
    with pytest.raises(UserError, match=r"nan.tif can't be read .*floats of unknown range"):
        photos.load_image(tmp_path / "nan.tif", photos.Layout(8))
    images = np.full((3, 8, 8, 3), np.nan, np.float32)
    split = Split(images, np.arange(3, dtype=np.int32))
    with pytest.raises(UserError, match="images must be uint8"):
        data.check(ImageDataset("n", "src", ("a", "b", "c"), split, None, split, ()))


BOMB = """
import resource, sys
from cnn_jax.data import photos
from cnn_jax.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    photos.load_image(sys.argv[1], photos.Layout(8))
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.slow
def test_a_bomb_takes_no_memory(tmp_path: Path):
    """A file of 1.2 MB that says, truly, to hold 400 million pixels."""
    side = 20_000
    path = tmp_path / "bomb.png"
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes, error = run.stdout.split(" ", 1)
    assert "decompression bomb" in error
    assert int(kilobytes) < 20_000


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
