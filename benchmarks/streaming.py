"""Measures the time to the first step and the peak memory of training on many photos.

python benchmarks/streaming.py PHOTOS

The photos of a folder are linked under many names until there are enough of them. Each number of
photos is started twice: the first start examines them all, and compiles.
"""

import os
import subprocess
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path

from absl import app, flags

_COUNTS = flags.DEFINE_list("counts", ["12644", "100000"], "Numbers of photos.")
_STORAGE = flags.DEFINE_string("storage", "stream", "runtime.storage.")

_NETWORK = (
    "--data.image_size=224",
    "--model.name=vgg",
    "--model.blocks=[[8],[16],[32],[64],[64]]",
    "--model.dense=[32]",
    "--train.batch_size=32",
    "--train.epochs=1",
)
_HOOK = """
import os, signal, time
from cnn_jax.hooks import every

@every(steps=1)
def stop(moment):
    if moment.step == 1:
        print("first step", time.process_time(), time.time(), flush=True)
    if moment.step == 20:
        os.kill(os.getpid(), signal.SIGTERM)
"""


def main(argv: list[str]) -> None:
    """Prints a line for each start."""
    photos = Path(argv[1]).resolve()
    with tempfile.TemporaryDirectory(dir=photos.parent) as name:
        folder = Path(name)
        (folder / "hook.py").write_text(_HOOK)
        for n in map(int, _COUNTS.value):
            _link(photos, folder / str(n), n)
            for start in ("first", "second"):
                seconds, cpu, peak = _measure(folder, n, start)
                times = f"{seconds:5.1f} s ({cpu:.1f} s of CPU time)"
                print(f"{n:7,} photos, {start:6} start: {times}, {peak / 1e9:.2f} GB", flush=True)


def _link(photos: Path, folder: Path, n: int) -> None:
    """Fills a folder with n hard links to photos, in the folders of their classes."""
    files = sorted(path for path in photos.rglob("*") if path.suffix == ".jpg")
    names = ((round_, file) for round_ in count() for file in files)
    for round_, file in islice(names, n):
        target = folder / file.parent.name / f"{round_}-{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)


def _measure(folder: Path, n: int, start: str) -> tuple[float, float, int]:
    """Returns seconds and CPU time to the first step, and the peak memory of 20 in bytes."""
    data = ("--data.name=folder", f"--data.dir={folder / str(n)}")
    runtime = (f"--runtime.cache_dir={folder / 'cache'}", f"--runtime.storage={_STORAGE.value}")
    own = (f"--hooks={folder / 'hook.py'}:stop", f"--workdir={folder / f'{n}-{start}'}")
    command = [sys.executable, "-m", "cnn_jax.main", *data, *_NETWORK, *runtime, *own]
    began = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, _, usage = os.wait4(process.pid, 0)
    *_, cpu, at = next(line.split() for line in lines if line.startswith("first step"))
    return float(at) - began, float(cpu), usage.ru_maxrss * 1024


if __name__ == "__main__":
    app.run(main)
