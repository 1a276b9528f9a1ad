"""Times training steps against PyTorch and against plain flax, in turn, on this machine.

python benchmarks/speed.py --torch_python=PATH [--models=vgg1,vgg3] [--batch_sizes=64,128]

PATH is the Python of an environment of its own with PyTorch, made for example by
    python -m venv torch_env && torch_env/bin/pip install torch==2.13.0 numpy
Without it only JAX is timed. For each network and batch size every competitor is a process that
stays alive; rounds go through all of them, one at work at a time, so that a slow minute of the
machine hits all. Printed and saved: median images/s, the median over rounds of each competitor's
time over ours with its quartiles (over ours in bfloat16 for PyTorch's bfloat16, else over ours in
float32), peak memory, the machine's load, and the speed as a share of the float32 matrix-product
rate measured in the same rounds. FLOPs are three times those of the forward
pass. Before that, PyTorch and this project train from the same parameters on the same batches:
their losses must agree.
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

HERE = Path(__file__).resolve().parent
GEMM_FLOPS = 2 * 2048**3

_MODELS = flags.DEFINE_list(
    "models", ["simple_cnn", "vgg1", "vgg2", "vgg3", "vgg_dropout"], "Configs to time."
)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["64", "128"], "Batch sizes to time.")
_TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "Python of an environment with PyTorch.")
_COMPILE = flags.DEFINE_bool("compile", True, "Time torch.compile as well.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each competitor.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 4, "Steps of a timing.", lower_bound=1, upper_bound=32)
_OUT = flags.DEFINE_string(
    "out", "benchmarks/results/speed.json", "File that receives the rows of the table."
)
_TOLERANCE = 1e-4
_CHECKED_STEPS = 20


def check_losses(ours: Competitor, torch: Competitor, dropout: float) -> float | None:
    """Returns the largest difference of the first losses; None where dropout makes them differ."""
    a, b = (competitor.run(_CHECKED_STEPS).get("losses") for competitor in (ours, torch))
    if not (a and b):
        raise SystemExit("a competitor has died; it said why above")
    if dropout:
        return None
    difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
    if difference > _TOLERANCE:
        raise SystemExit(f"losses differ by {difference:g}: not the same work is being timed")
    return difference


def against(kind: str) -> str:
    """Returns the kind whose time a competitor's is divided by: PyTorch's, of the same type."""
    return f"cnn_jax {'bfloat16' if kind == 'torch bfloat16' else 'float32'}"


def time_model(name: str, batch_size: str, folder: Path) -> list[dict[str, Any]]:
    """Returns a row of the table for each competitor, this project in float32 first."""
    from cnn_jax import configs, models
    from cnn_jax.models import inspection

    config = configs.get(name)
    if config.model.name not in ("simple_cnn", "vgg") or config.optim.name != "momentum":
        raise SystemExit(f"{name}: the competitors have no such network or optimizer")
    flops = (
        3
        * int(batch_size)
        * sum(
            row.flops for row in inspection.summarize(models.build(config.model, 10), (32, 32, 3))
        )
    )
    export = str(folder / f"{name}_{batch_size}")
    jax = [sys.executable, "jax_step.py", name, batch_size]
    competitors = {"cnn_jax float32": Competitor(*jax, "float32")}
    competitors["cnn_jax bfloat16"] = Competitor(*jax, "bfloat16")
    competitors["cnn_jax step loop"] = Competitor(*jax, "step")
    competitors["plain flax"] = Competitor(*jax, "plain")
    gemm = Competitor(*jax, "gemm")
    difference = None
    if _TORCH_PYTHON.value:
        kinds = {"torch eager": (False, False), "torch bfloat16": (True, False)}
        if _COMPILE.value:
            kinds["torch.compile"] = (False, True)
        Competitor(*jax, "export", export).wait()
        spec = json.loads(Path(f"{export}.json").read_text())
        for kind, (autocast, compiled) in kinds.items():
            path = Path(f"{export}_{autocast:d}{compiled:d}.json")
            path.write_text(json.dumps(spec | {"autocast": autocast, "compile": compiled}))
            competitors[kind] = Competitor(_TORCH_PYTHON.value, "torch_step.py", str(path))
        difference = check_losses(
            competitors["cnn_jax float32"], competitors["torch eager"], config.model.dropout
        )
    rounds: dict[str, list[float]] = {kind: [] for kind in competitors}
    rates, peaks, loads = [], {}, []
    for i in range(-1, _ROUNDS.value):  # Round -1 compiles and warms up.
        loads.append(os.getloadavg()[0])
        rates.append(GEMM_FLOPS * 8 / gemm.run(8)["seconds"])
        for kind, competitor in competitors.items():
            answer = competitor.run(_STEPS.value)
            peaks[kind] = answer.get("peak_mb")
            if i >= 0 and answer:
                rounds[kind].append(answer["seconds"] / _STEPS.value)
    for competitor in (*competitors.values(), gemm):
        competitor.stop()
    if any(len(rounds[against(kind)]) < _ROUNDS.value for kind in rounds):
        raise SystemExit("this project's own process has died; it said why above")
    return [
        {
            "model": name,
            "batch_size": int(batch_size),
            "kind": kind,
            "images_per_second": int(batch_size) / median(seconds),
            "against": against(kind),
            **ratio(seconds, rounds[against(kind)]),
            "peak_mb": peaks[kind],
            "share_of_gemm_rate": flops / median(seconds) / median(rates[1:]),
            "loss_difference": difference,
            "load": median(loads),
        }
        for kind, seconds in rounds.items()
        if len(seconds) == _ROUNDS.value  # One that has died is left out.
    ]


def main(_: list[str]) -> None:
    """Times all, prints the table and saves it."""
    if not _TORCH_PYTHON.value:
        print("Without --torch_python PyTorch is left out; --help says how to install it.")
    rows = []
    print("| model | batch | | images/s | time / ours | quartiles | peak MB | share of GEMM rate |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in _MODELS.value:
            for batch_size in _BATCH_SIZES.value:
                for row in time_model(name, batch_size, Path(folder)):
                    rows.append(row)
                    low, high = row["quartiles"]
                    print(
                        f"| {name} | {batch_size} | {row['kind']} "
                        f"| {row['images_per_second']:.0f} | {row['time_over_ours']:.2f} "
                        f"| {low:.2f} to {high:.2f} "
                        f"| {row['peak_mb']:.0f} | {row['share_of_gemm_rate']:.0%} |",
                        flush=True,
                    )
                print(f"largest loss difference: {rows[-1]['loss_difference']}", flush=True)
                print(f"load: {rows[-1]['load']:.1f}", flush=True)
                found = {"made_by": made_by(_TORCH_PYTHON.value), "rows": rows}
                Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
