"""What pooling buys: accuracy on test images that are shifted."""

from experiments import measures
from experiments.spec import SMALL, AgainstMeasured, Experiment, small

_COLUMNS = {f"shift {pixels}": float(pixels) for pixels in measures.SHIFTS}

EXPERIMENT = Experiment(
    question="How much does a shift of the image cost, and what does pooling do about it?",
    variants={
        **{name: small(model={"pooling": name}) for name in ("max", "average", "stride")},
        "max_augmented": small(augment={"translate": 4}),
    },
    figure=AgainstMeasured(_COLUMNS, "pixels that the test images are shifted by"),
    columns=tuple(_COLUMNS),
    measured=tuple(_COLUMNS),
    measure=measures.shifted,
    note=SMALL + f" The first {measures.N_IMAGES:,} test images, shifted to each of the four sides "
    "and reflected at the border, mean of the four. `max_augmented` was trained on images shifted "
    "at random by up to 4 pixels.",
)
