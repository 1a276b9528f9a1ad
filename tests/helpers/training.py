"""Training in the test's own process: single steps, whole runs, and runs stopped at some step."""

import io
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from cnn_jax import fit as fitting
from cnn_jax import step as stepping
from cnn_jax import trees
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.fit import Hook, Result, compile_segment
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.log import RunLog
from cnn_jax.runs.stop import Stopped
from cnn_jax.step import Setup, TrainState, enter_phase, init_state
from cnn_jax.tools.train import train

HEAD = (("head/.*", 1.0), (".*", None))
"""Groups of parameters of which only the head is trained."""


def edit(config: Config, **sections: dict) -> Config:
    """Returns `config` with fields of its sections replaced."""
    return replace(config, **{k: replace(getattr(config, k), **v) for k, v in sections.items()})


def no_dropout(config: Config) -> Config:
    return edit(config, model={"dropout": 0.0})


def quiet(workdir: Path) -> RunLog:
    """Returns a log that writes its files and prints nothing."""
    return RunLog(workdir, Console(file=io.StringIO()))


def leaves(tree) -> dict[str, np.ndarray]:
    """Returns the arrays of a tree on the host, by name."""
    return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}


def keys(config: Config) -> tuple[jax.Array, jax.Array]:
    """Returns the keys that `fit` draws the initial parameters and everything else from."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    return init_key, train_key


def initial(config: Config, dataset: ImageDataset) -> TrainState:
    """Returns the state before the first step."""
    return init_state(Setup.of(config, dataset), keys(config)[0])


def run(config: Config, dataset: ImageDataset, steps: int) -> tuple[TrainState, np.ndarray]:
    """Returns the state and the mean losses after so many steps from the start, in memory."""
    whole = Setup.of(config, dataset)
    state, train_key = initial(config, dataset), keys(config)[1]
    most, per_epoch = config.runtime.segment_steps, whole.steps_per_epoch
    seen: list[float] = []
    phase, segment = whole, None
    while len(seen) < steps:
        done = len(seen)
        setup = whole.at(done // per_epoch)
        if segment is None or setup != phase:
            state = enter_phase(setup, state) if done else state
            segment, phase = compile_segment(config, setup, dataset, state, train_key), setup
        end = min(most - done % per_epoch % most, per_epoch - done % per_epoch, steps - done)
        state, history = segment(state, end)
        seen += (history.sums.loss / history.sums.count).tolist()
    return state, np.array(seen)


def fit(
    config: Config, dataset: ImageDataset, workdir: Path, hooks: tuple[Hook, ...] = (), **options
) -> Result:
    """Calls `fit` with a folder that prints nothing."""
    return fitting.fit(config, dataset, RunFolder(workdir, quiet), hooks, **options)


def train_run(config: Config, dataset: ImageDataset, workdir: Path) -> dict:
    """Trains in a folder of its own as the command does; returns the summary."""
    return dict(train(config, dataset, workdir, make_log=quiet).summary)


def fit_until(
    step: int,
    config: Config,
    dataset: ImageDataset,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: int = signal.SIGTERM,
) -> None:
    """Trains until a signal comes in the segment that ends with `step`, and stops there."""

    def interrupted(*args):
        segment = compile_segment(*args)

        def run(state, n_steps):
            state, history = segment(state, n_steps)
            if int(state.step) == step:
                os.kill(os.getpid(), signum)
            return state, history

        return run

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"after step {step}"):
        patch.setattr(fitting, "compile_segment", interrupted)
        fit(config, dataset, workdir)


def change_gradients(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """Makes `change(step, grads)` the gradients of every step that is traced from now on."""
    train_step, accumulated = stepping.train_step, stepping._accumulated
    traced: list[jax.Array] = []

    def remember_step(setup, state, *rest):
        traced.append(state.step)
        return train_step(setup, state, *rest)

    def changed(setup, gradient):
        def run(*args):
            grads, others = accumulated(setup, gradient)(*args)
            return change(traced[-1], grads), others

        return run

    monkeypatch.setattr(stepping, "train_step", remember_step)
    monkeypatch.setattr(stepping, "_accumulated", changed)
    jax.clear_caches()  # Programs are kept by their setup, which is the same without the change.
