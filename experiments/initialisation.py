"""The distribution of the initial kernels."""

from experiments.spec import SMALL, Bars, Experiment, small

_NAMES = ("glorot_uniform", "he_uniform", "narrow_uniform")

EXPERIMENT = Experiment(
    question="How much do the initial values matter?",
    variants={name: small(model={"initializer": name}) for name in _NAMES},
    figure=Bars(("test_accuracy", "train_accuracy")),
    columns=("test_accuracy", "test_loss", "train_accuracy"),
    note=SMALL + " Kernels are drawn from U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) "
    "(Glorot and Bengio, 2010), sqrt(6 / fan_in) (He et al., 2015), and 0.01; biases are 0.",
)
