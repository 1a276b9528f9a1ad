"""The rate of dropout."""

from experiments.spec import SMALL, AgainstField, Experiment, small

EXPERIMENT = Experiment(
    question="How much does dropout help?",
    variants={f"{rate:g}": small(model={"dropout": rate}) for rate in (0.0, 0.1, 0.25, 0.5, 0.75)},
    figure=AgainstField("model.dropout", "probability that a unit of fc1 is dropped"),
    columns=("test_accuracy", "test_loss", "train_accuracy"),
    note=SMALL + " Training accuracy is measured with dropout on.",
)
