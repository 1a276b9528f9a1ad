"""Max pooling, average pooling, and convolutions with a stride of 2 instead."""

from experiments.spec import SMALL, Dots, Experiment, small

EXPERIMENT = Experiment(
    question="How should a block end?",
    variants={name: small(model={"pooling": name}) for name in ("max", "average", "stride")},
    figure=Dots(),
    columns=("test_accuracy", "train_accuracy", "flops_per_image"),
    note=SMALL + " With `stride` there is no pool: the last convolution of each block has a stride "
    "of 2, which costs a quarter of its FLOPs.",
)
