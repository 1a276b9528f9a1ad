"""Random changes of the training images."""

from experiments.spec import SMALL, Bars, Experiment, small

_CHANGES = {
    "none": {},
    "flip": {"flip": True},
    "translate": {"translate": 2},
    "cutout": {"cutout": 8},
    "flip-translate": {"flip": True, "translate": 2},
    "all": {"flip": True, "translate": 2, "cutout": 8},
}

EXPERIMENT = Experiment(
    question="Which augmentation helps?",
    variants={
        name: small(augment=changes, train={"epochs": 20}) for name, changes in _CHANGES.items()
    },
    figure=Bars(("test_accuracy", "train_accuracy")),
    note=SMALL + " Here there are 20 epochs, because augmentation pays later. Shifts are by up to "
    "2 pixels, cutout hides squares of 8. Train accuracy is that on the changed images.",
)
