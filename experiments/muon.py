"""Muon in the recipe airbench_muon: without renormalised kernels, with other steps and rates."""

from dataclasses import replace
from typing import Any

from cnn_jax import configs
from cnn_jax.config import Config, Multiplier
from experiments.spec import Dots, Experiment, edit

_WIDTH, _BATCH = 4, 4
"""By how much the network is narrower, and the batches are smaller, than the recipe's."""


def _narrow(rate: float = 0.24, **muon: Any) -> Config:
    """Returns airbench_muon at a quarter of its widths, Muon with another rate or other fields.

    The rates of the biases and the head stay the same, whatever Muon's is.
    """
    base = configs.get("airbench_muon")
    others = base.optim.learning_rate / rate / _BATCH

    def scaled(pattern: str, multiplier: Multiplier) -> Multiplier:
        if isinstance(multiplier, tuple):
            return tuple((epoch, value and value * others) for epoch, value in multiplier)
        if multiplier is None or pattern == ".*":
            return multiplier
        return multiplier * others / (_WIDTH if pattern.startswith("head") else 1)

    groups = tuple((pattern, scaled(pattern, value)) for pattern, value in base.optim.groups)
    return edit(
        replace(base, name="custom"),
        data={"images_per_class": 1000},
        model={"blocks": ((16, 16), (64, 64), (64, 64))},
        optim={"learning_rate": rate, "groups": groups} | muon,
        train={"batch_size": base.train.batch_size // _BATCH},
    )


_KERNELS, _MOMENTUM, _ = configs.get("airbench_muon").optim.muon

EXPERIMENT = Experiment(
    question="What does each part of Muon contribute?",
    variants={
        "whole": _narrow(),
        "not_renormalized": _narrow(renormalize=""),
        "steps-1": _narrow(muon=(_KERNELS, _MOMENTUM, 1)),
        "steps-5": _narrow(muon=(_KERNELS, _MOMENTUM, 5)),
        **{f"rate-{rate:g}": _narrow(rate) for rate in (0.06, 0.12, 0.48)},
    },
    figure=Dots(),
    columns=(
        "optim.learning_rate",
        "test_accuracy",
        "test_accuracy_plain",
        "train_accuracy",
        "test_loss",
        "seconds",
    ),
    note="The config `airbench_muon` at a quarter of its widths, on 1,000 training images of each "
    "class, in batches of 500: 160 steps, where the whole recipe has 200. `whole` has the recipe's "
    "three Newton-Schulz steps and its learning rate for Muon, 0.24. The learning rates of the "
    "biases and the head are a quarter of the recipe's, as the batches are, and that of the head "
    "is divided by 4 again, since it averages a quarter of the inputs. All 10,000 test images are "
    "evaluated once, after training.",
)
