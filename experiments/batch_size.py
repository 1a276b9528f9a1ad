"""The batch size, at a fixed learning rate and at one proportional to the batch size."""

from experiments.spec import SMALL, AgainstField, Experiment, small

_SIZES = (16, 32, 64, 128, 256)

EXPERIMENT = Experiment(
    question="How large should a batch be?",
    variants={
        **{f"fixed_rate-{size}": small(train={"batch_size": size}) for size in _SIZES},
        **{
            f"scaled_rate-{size}": small(
                train={"batch_size": size}, optim={"learning_rate": 0.01 * size / 64}
            )
            for size in _SIZES
        },
    },
    figure=AgainstField("train.batch_size", "batch size", logarithmic=True),
    columns=("optim.learning_rate", "test_accuracy", "train_accuracy", "steps", "seconds"),
    note=SMALL + " The scaled rate is 0.01 x batch size / 64 (Goyal et al., 2017).",
)
