"""Times features and training of networks for photos against PyTorch, in turn, on this machine.

python benchmarks/photos.py --torch_python=PATH [--networks=resnet18] [--modes=features,train]

PATH is the Python of an environment of its own with PyTorch, made for example by
    python -m venv torch_env && torch_env/bin/pip install torch==2.13.0 numpy
Batches of 32 photos of 224x224. `features` is the network without its head, in evaluation; `train`
is a step of SGD on all layers. Every competitor is a process that stays alive, and rounds go
through all of them, one at work at a time, so that a slow minute of the machine hits all. Before
that, both frameworks start from the same variables on the same photos: their features and losses
must agree. This project's processes get the environment that launch.sh gives it; PyTorch's get it
with --same_environment.

Printed and saved: median images/s, the median over rounds of PyTorch's time over this project's in
the same type, its quartiles, peak memory, and the machine's load.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from absl import app, flags
from competitor import Competitor, made_by, ratio

_NETWORKS = flags.DEFINE_list(
    "networks", ["efficientnet_lite0", "resnet18", "resnet50"], "Networks to time."
)
_MODES = flags.DEFINE_list("modes", ["features", "train"], "What to time.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Types of the arithmetic.")
_TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "Python of an environment with PyTorch.")
_SAME_ENVIRONMENT = flags.DEFINE_bool(
    "same_environment", False, "Give PyTorch the environment variables of launch.sh as well."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each competitor.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 2, "Batches of a timing.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", "benchmarks/results/photos.json", "File that receives the rows of the table."
)

BATCH_SIZE = 32
CHECKED_STEPS = 3
# Of losses and mean features, relative. Sums of float32 in another order differ by less.
TOLERANCE = 1e-3
# What launch.sh sets; see there.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def check(network: str, mode: str, ours: list[float], torch: list[float]) -> float:
    """Returns the largest relative difference of the first results in float32."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, torch, strict=True))
    if not difference < TOLERANCE:
        raise SystemExit(f"{network}, {mode}: {ours} and {torch}: not the same work is being timed")
    return difference


def time_network(network: str, mode: str, path: str) -> list[dict[str, Any]]:
    """Returns a row of the table for each competitor."""
    competitors = {}
    for dtype in _DTYPES.value:
        competitors["cnn_jax", dtype] = Competitor(
            sys.executable, "photos_jax.py", network, mode, dtype, **ENVIRONMENT
        )
        if _TORCH_PYTHON.value:
            environment = ENVIRONMENT if _SAME_ENVIRONMENT.value else {}
            competitors["torch", dtype] = Competitor(
                _TORCH_PYTHON.value, "photos_torch.py", network, mode, dtype, path, **environment
            )
    first = {kind: one.run(CHECKED_STEPS).get("losses") for kind, one in competitors.items()}
    if not all(first.values()):
        raise SystemExit("a competitor has died; it said why above")
    difference = None
    if ("torch", "float32") in first:
        results = first["cnn_jax", "float32"], first["torch", "float32"]
        difference = check(network, mode, *results)  # pyright: ignore[reportArgumentType]
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in competitors}
    peaks, loads = {}, []
    for _ in range(_ROUNDS.value):
        loads.append(os.getloadavg()[0])
        for kind, competitor in competitors.items():
            answer = competitor.run(_STEPS.value)
            seconds[kind].append(answer["seconds"] / _STEPS.value)
            peaks[kind] = answer["peak_mb"]
    for competitor in competitors.values():
        competitor.stop()
    rows = []
    for (name, dtype), values in seconds.items():
        rows.append(
            {
                "network": network,
                "mode": mode,
                "dtype": dtype,
                "kind": name,
                "images_per_second": BATCH_SIZE / median(values),
                **ratio(values, seconds["cnn_jax", dtype]),
                "peak_mb": peaks[name, dtype],
                "load": median(loads),
                "difference": difference,
            }
        )
    return rows


def main(_: list[str]) -> None:
    """Times all, prints the table and saves it."""
    if not _TORCH_PYTHON.value:
        print("Without --torch_python PyTorch is left out; --help says how to install it.")
    rows = []
    print("| network | | type | | images/s | time / ours | quartiles | peak MB | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for network in _NETWORKS.value:
            path = str(Path(folder) / f"{network}.npz")
            Competitor(sys.executable, "photos_jax.py", network, "export", path).wait()
            for mode in _MODES.value:
                for row in time_network(network, mode, path):
                    rows.append(row)
                    low, high = row["quartiles"]
                    print(
                        f"| {network} | {mode} | {row['dtype']} | {row['kind']} "
                        f"| {row['images_per_second']:.1f} | {row['time_over_ours']:.2f} "
                        f"| {low:.2f} to {high:.2f} | {row['peak_mb']:.0f} | {row['load']:.1f} |",
                        flush=True,
                    )
                print(f"largest difference: {rows[-1]['difference']}", flush=True)
                found = {"made_by": made_by(_TORCH_PYTHON.value), "rows": rows}
                Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
