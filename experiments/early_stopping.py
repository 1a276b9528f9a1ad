"""Stopping when the validation accuracy no longer improves."""

from experiments.spec import SMALL, Bars, Experiment, small

_PATIENCE = (0, 1, 2, 4, 8)

EXPERIMENT = Experiment(
    question="What does early stopping save, and what does it cost?",
    variants={
        ("off" if not patience else f"patience-{patience}"): small(
            data={"validation": 0.04}, train={"epochs": 20, "patience": patience}
        )
        for patience in _PATIENCE
    },
    figure=Bars(("test_accuracy", "train_accuracy")),
    columns=("test_accuracy", "test_loss", "train_accuracy", "epochs_run", "best_epoch", "seconds"),
    note=SMALL + " In this experiment it is trained for at most 20 epochs, and 2,000 images are "
    "held out for validation in every variant. With patience, the parameters with the best "
    "validation accuracy are evaluated, and the training accuracy is that of their epoch.",
)
