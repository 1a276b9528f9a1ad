"""What must stay flat over thousands of epochs: memory, files, threads, and the time of a step."""

import gc
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.training import edit, fit

from cnn_jax import fit as fitting
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.runs.checkpoint import Checkpoints


def memory() -> float:
    """Returns the megabytes that the process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize(
    ("epochs", "saves"), [(200, 10), pytest.param(2000, 100, marks=pytest.mark.slow)]
)
def test_epochs_and_checkpoints_leave_nothing_behind(
    tiny: Config, dataset: ImageDataset, workdir: Path, monkeypatch, epochs: int, saves: int
):
    """Looked at after each save; a fifth of the run is left to caches that fill up.

    Not every epoch is saved, as that takes a hundred times as long as to train it. What memory
    still grows by, some 50 kB a save, are the metrics that orbax asks tensorstore for.
    """
    config = edit(
        tiny, data={"validation": 0.0}, train={"epochs": epochs}, runtime={"segment_steps": 3}
    )
    save, compile_segment = Checkpoints.save, fitting.compile_segment
    seen: dict[str, list] = {"memory": [], "arrays": [], "files": [], "threads": [], "kept": []}
    seconds = []

    def rare_save(self, step, state, record):
        if step % (3 * epochs // saves):
            return
        save(self, step, state, record)
        gc.collect()
        seen["memory"].append(memory())
        seen["arrays"].append(len(jax.live_arrays()))
        seen["files"].append(sum(path.is_file() for path in workdir.rglob("*")))
        seen["threads"].append(threading.active_count())
        seen["kept"].append(sorted(int(path.name) for path in self.folder.iterdir()))

    def timed(*args):
        segment = compile_segment(*args)

        def run(state, n_steps):
            start = time.perf_counter()
            result = segment(state, n_steps)
            seconds.append(time.perf_counter() - start)
            return result

        return run

    monkeypatch.setattr(Checkpoints, "save", rare_save)
    monkeypatch.setattr(fitting, "compile_segment", timed)
    progress = fit(config, replace(dataset, validation=None), workdir).progress

    assert progress.images == epochs * 22
    assert (workdir / "metrics.jsonl").read_text().count("\n") == epochs * 3
    assert len(seen["kept"]) == saves
    for number, kept in enumerate(seen["kept"], start=1):
        assert kept == [60 * (number - 1), 60 * number][-min(number, 2) :]
    early, late = saves // 5, saves - 1
    if saves >= 100:  # Fewer are over before the caches are full.
        assert seen["memory"][late] - seen["memory"][early] < 10
    for name in ("arrays", "threads"):
        assert seen[name][late] <= seen[name][early], name
    assert max(seen["files"]) < 4 * seen["files"][0]  # orbax splits a checkpoint as it likes
    # The fast tenth of the segments, as other work on the machine only ever adds time.
    first, last = np.quantile(np.reshape(seconds, (5, -1))[[1, 4]], 0.1, axis=1)
    assert last < 1.5 * first
