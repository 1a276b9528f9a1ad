"""Max pooling, average pooling, and convolutions that move by two pixels in their place."""

from experiments.spec import SMALL, Dots, Experiment, small

EXPERIMENT = Experiment(
    question="How should a block end?",
    variants={name: small(model={"pooling": name}) for name in ("max", "average", "stride")},
    figure=Dots(),
    columns=("test_accuracy", "train_accuracy", "flops_per_image"),
    note=SMALL + " With `stride` nothing is pooled: the last convolution of a block moves by two "
    "pixels, and so costs a quarter.",
)
