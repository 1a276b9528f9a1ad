"""Cross-entropy and mean squared error, each at its best learning rate."""

from experiments.spec import SMALL, Dots, Experiment, small

_RATES = {"cross_entropy": (0.003, 0.01, 0.03, 0.1), "mse": (0.03, 0.1, 0.3, 1.0)}

EXPERIMENT = Experiment(
    question="Is cross-entropy better than mean squared error for classification?",
    variants={name: small(train={"loss": name}) for name in _RATES},
    figure=Dots(),
    rates=_RATES,
    columns=("optim.learning_rate", "test_accuracy", "train_accuracy"),
    note=SMALL + " The squared error is that of the softmax probabilities, averaged over classes. "
    "Its gradients are smaller, so larger learning rates are tried.",
)
