"""What CNNs lack, as the chapter says: accuracy on test images that are turned."""

from experiments import measures
from experiments.spec import SMALL, AgainstMeasured, Experiment, small

_COLUMNS = {f"{degrees} degrees": float(degrees) for degrees in measures.DEGREES}

EXPERIMENT = Experiment(
    question="How much does turning the image cost?",
    variants={
        "plain": small(),
        "average_pooling": small(model={"pooling": "average"}),
        "augmented": small(augment={"flip": True, "translate": 4}),
    },
    figure=AgainstMeasured(_COLUMNS, "degrees that the test images are turned by"),
    columns=tuple(_COLUMNS),
    measured=tuple(_COLUMNS),
    measure=measures.rotated,
    note=SMALL + f" The first {measures.N_IMAGES:,} test images, turned in both directions and "
    "reflected outside, mean of the two. `augmented` was trained on images mirrored and shifted at "
    "random by up to 4 pixels: nothing in training turns an image.",
)
