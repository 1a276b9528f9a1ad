"""SGD, momentum, Adam and RMSProp, each at its best learning rate."""

from experiments.spec import SMALL, Dots, Experiment, small

_RATES = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adam": (0.0003, 0.001, 0.003, 0.01),
    "rmsprop": (0.0001, 0.0003, 0.001, 0.003),
}

EXPERIMENT = Experiment(
    question="Which optimizer reaches the best accuracy in 10 epochs?",
    variants={name: small(optim={"name": name}) for name in _RATES},
    figure=Dots(),
    rates=_RATES,
    columns=("optim.learning_rate", "test_accuracy", "test_loss", "train_accuracy", "seconds"),
    note=SMALL,
)
