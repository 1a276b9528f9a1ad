"""What the chapter says CNNs lack: accuracy on rotated test images."""

from experiments import measures
from experiments.spec import SMALL, AgainstMeasured, Experiment, small

_COLUMNS = {f"{degrees} degrees": float(degrees) for degrees in measures.DEGREES}

EXPERIMENT = Experiment(
    question="How much accuracy does a rotation of the image cost?",
    variants={
        "plain": small(),
        "average_pooling": small(model={"pooling": "average"}),
        "augmented": small(augment={"flip": "random", "translate": 4}),
    },
    figure=AgainstMeasured(_COLUMNS, "rotation of the test images, degrees"),
    columns=tuple(_COLUMNS),
    measured=tuple(_COLUMNS),
    measure=measures.rotated,
    note=SMALL + f" The first {measures.N_IMAGES:,} test images are rotated, with reflection at "
    "the borders; accuracies are means of both directions. `augmented` was trained with random "
    "mirroring and shifts of up to 4 pixels. No training image is rotated.",
)
