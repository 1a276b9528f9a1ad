"""More convolutions in each block, and more blocks."""

from experiments.spec import SMALL, Dots, Experiment, small

_WIDTHS = (16, 32, 64)

EXPERIMENT = Experiment(
    question="Do more layers help?",
    variants={
        f"{n_blocks}x{n_convs}": small(
            model={"blocks": tuple((width,) * n_convs for width in _WIDTHS[:n_blocks])}
        )
        for n_blocks in (1, 2, 3)
        for n_convs in (1, 2)
    },
    figure=Dots(),
    columns=("test_accuracy", "train_accuracy", "param_count", "flops_per_image", "seconds"),
    note=SMALL + " In this experiment it has one to three such blocks of one or two convolutions: "
    "`2x1` has two blocks of one convolution.",
)
