"""Augmentation of the training images."""

from experiments.spec import SMALL, Bars, Experiment, small

_CHANGES = {
    "none": {},
    "flip": {"flip": "random"},
    "translate": {"translate": 2},
    "cutout": {"cutout": 8},
    "flip-translate": {"flip": "random", "translate": 2},
    "all": {"flip": "random", "translate": 2, "cutout": 8},
}

EXPERIMENT = Experiment(
    question="Which augmentation helps?",
    variants={
        name: small(augment=changes, train={"epochs": 20}) for name, changes in _CHANGES.items()
    },
    figure=Bars(("test_accuracy", "train_accuracy")),
    note=SMALL + " In this experiment it is trained for 20 epochs, since augmentation helps later "
    "in training. Shifts are by up to 2 pixels; cutout hides a square with sides of 8 pixels. "
    "Training accuracy is that on the augmented images.",
)
