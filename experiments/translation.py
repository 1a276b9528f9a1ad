"""What pooling gains: accuracy on shifted test images."""

from experiments import measures
from experiments.spec import SMALL, AgainstMeasured, Experiment, small

_COLUMNS = {f"shift {pixels}": float(pixels) for pixels in measures.SHIFTS}

EXPERIMENT = Experiment(
    question="How much accuracy does a shift of the image cost, and does pooling help?",
    variants={
        **{name: small(model={"pooling": name}) for name in ("max", "average", "stride")},
        "max_augmented": small(augment={"translate": 4}),
    },
    figure=AgainstMeasured(_COLUMNS, "shift of the test images, pixels"),
    columns=tuple(_COLUMNS),
    measured=tuple(_COLUMNS),
    measure=measures.shifted,
    note=SMALL + f" The first {measures.N_IMAGES:,} test images are shifted, with reflection at "
    "the borders; accuracies are means of the four directions. `max_augmented` was trained with "
    "random shifts of up to 4 pixels.",
)
