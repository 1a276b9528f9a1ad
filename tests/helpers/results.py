"""What runs leave in their folders, read back, and lines of metrics as a run writes them."""

import json
from pathlib import Path

import numpy as np


def line(step: int, **extra) -> dict:
    """Returns the metrics of one step."""
    return {"step": step, "loss": 1.0 / step, "accuracy": 0.5, "learning_rate": 0.1, **extra}


def lines(workdir: Path) -> list[dict]:
    """Returns the metrics of each step."""
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> np.ndarray:
    """Returns the loss of each step."""
    return np.array([line["loss"] for line in lines(workdir)])


def summary(workdir: Path) -> dict:
    """Returns the summary of a finished run."""
    return json.loads((workdir / "summary.json").read_text())


def result(workdir: Path) -> tuple[str, list[dict]]:
    """Returns the hash of the parameters, and the metrics without what a segment's end adds."""
    added = ("images_per_second", "grad_norm")
    plain = [{k: v for k, v in line.items() if k not in added} for line in lines(workdir)]
    return summary(workdir)["params_sha256"], plain
