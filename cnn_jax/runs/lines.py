"""The lines of metrics.jsonl: one for each step of a segment, refused if not finite."""

import math
from typing import Any

from cnn_jax import trees
from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.step import History, TrainState


class NotFinite(UserError):
    """A run whose loss, gradient or state is no longer finite."""


def lines_of(step: int, history: History) -> list[dict[str, Any]]:
    """Returns a line for each step of a segment that began after `step` steps."""
    columns = {
        "loss": history.sums.loss / history.sums.count,
        "accuracy": history.sums.correct / history.sums.count,
        "learning_rate": history.learning_rate,
        "grad_norm": history.grad_norm,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [
        {"step": number, **dict(zip(columns, row, strict=True))}
        for number, row in enumerate(rows, start=step + 1)
    ]
    for line in lines:
        if line["grad_norm"] == -1:
            del line["grad_norm"]
    return lines


def mark_skipped(config: Config, lines: list[dict[str, Any]], state: TrainState) -> int:
    """Marks the lines of skipped steps and returns their number.

    A gradient that is not finite shows in its own step's norm where that was computed, else in the
    next step's loss; or in the state, where an infinite bias before a ReLU hides from the losses.

    Raises:
        NotFinite: the run can't go on. Nothing of the segment has been recorded or saved.
    """
    figures = ("loss", "grad_norm")
    bad = [x for x in lines if not all(math.isfinite(x[k]) for k in figures if k in x)]
    finite = bool(trees.all_finite(state))
    if finite and (config.train.skip_nonfinite or not bad):
        for line in bad:
            line |= {"loss": None, "accuracy": None, "grad_norm": None, "skipped": True}
        return len(bad)
    line = (bad or lines[-1:])[0]
    raise NotFinite(
        f"loss {line['loss']:g}, learning rate {line['learning_rate']:g}, gradient norm "
        f"{line.get('grad_norm', math.nan):g} at step {line['step']}: no longer finite, and not "
        "saved; lower optim.learning_rate, or set optim.clip_norm or train.skip_nonfinite"
    )
