"""Functions of the user's own that training calls every so many steps or epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.predictor import Predictor

Hook = Callable[["Moment"], None]
"""A function that `fit.fit` calls at the end of every epoch, or as often as `every` says."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Moment:
    """What a hook gets."""

    config: Config
    step: int
    """Training steps so far."""
    epoch: float
    """The same in epochs: a whole number at an epoch's end."""
    metrics: dict[str, Any]
    """The line of metrics.jsonl for this step (see `runs.log.RunLog`)."""
    make_predictor: Callable[[], Predictor]

    @cached_property
    def predictor(self) -> Predictor:
        """The network as it is now; usable until the hook returns."""
        return self.make_predictor()


def every(*, steps: int = 0, epochs: int = 0) -> Callable[[_Function], _Function]:
    """Marks a hook to be called every so many steps or every so many epochs.

    `@every(steps=100) def log(moment): ...`; an unmarked hook is called at every epoch's end.
    """
    if (steps > 0) == (epochs > 0):
        raise UserError("every(steps=N) or every(epochs=N): set one of them, to 1 or more")

    def mark(hook: _Function) -> _Function:
        setattr(hook, "every", ("steps", steps) if steps else ("epochs", epochs))  # noqa: B010
        return hook

    return mark


def frequency(hook: Hook) -> tuple[str, int]:
    """Returns ("steps" or "epochs", how many of them lie between two calls)."""
    return getattr(hook, "every", ("epochs", 1))


def call_hooks(
    hooks: Sequence[Hook],
    config: Config,
    steps_per_epoch: int,
    line: dict[str, Any],
    make_predictor: Callable[[], Predictor],
) -> None:
    """Calls the hooks whose turn it is after the step of a line of metrics.jsonl."""
    step = line["step"]
    moment = Moment(config, step, step / steps_per_epoch, line, make_predictor)
    for hook in hooks:
        unit, n = frequency(hook)
        if step % (n if unit == "steps" else n * steps_per_epoch) == 0:
            hook(moment)
