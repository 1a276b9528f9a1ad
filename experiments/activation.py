"""ReLU, tanh and sigmoid: accuracy, and the share of units that pass no gradient."""

from experiments import measures
from experiments.spec import SMALL, Bars, Experiment, small

_LAYERS = ("block1/conv1", "block2/conv1", "block3/conv1", "fc1")
_MEASURED = tuple(f"{layer} {share}" for layer in _LAYERS for share in ("dead", "flat"))
_RATES = (0.003, 0.01, 0.03, 0.1)
_NAMES = ("relu", "tanh", "sigmoid")
_HIGHER = (0.3, 1.0)  # with sigmoid the network does not learn at any of the rates above

EXPERIMENT = Experiment(
    question="What does the activation function change?",
    variants={name: small(model={"activation": name}) for name in _NAMES},
    figure=Bars(("test_accuracy", *(f"{layer} flat" for layer in _LAYERS))),
    rates={"relu": _RATES, "tanh": _RATES, "sigmoid": _RATES + _HIGHER},
    columns=("optim.learning_rate", "test_accuracy", "train_accuracy", *_MEASURED),
    measured=_MEASURED,
    measure=measures.units,
    note=SMALL + " An output is flat if the slope of the activation function there is under 1% of "
    "its maximum, so that hardly any gradient passes. A unit (in a convolution: a filter) is dead "
    "if its outputs for 500 training images are flat at every position.",
)
