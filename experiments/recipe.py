"""What each part of the modern recipe contributes: one at a time is left out."""

from dataclasses import replace
from typing import Any

from cnn_jax import configs
from cnn_jax.config import Config
from experiments.spec import Dots, Experiment, edit


def _narrow(**changes: Any) -> Config:
    """Returns airbench at a quarter of its widths, with sections' fields changed."""
    base = configs.get("airbench")
    base = replace(
        base,
        name="custom",
        data=replace(base.data, images_per_class=1000),
        model=replace(base.model, blocks=((16, 16), (64, 64), (64, 64))),
        optim=replace(base.optim, learning_rate=base.optim.learning_rate / 4),
        train=replace(base.train, batch_size=base.train.batch_size // 4),
    )
    return edit(base, **changes)


def _without_norms(pairs: Any) -> Any:
    return tuple(pair for pair in pairs if "norm" not in pair[0])


_OPTIM = configs.get("airbench").optim
_TRAINED_FIRST_LAYER = {"groups": ((".*norm./bias", 64.0), (".*", 1.0))}
# The decay changes too: that of BatchNorm's biases is smaller by the factor of their larger rate.
_ONE_RATE = {
    "groups": _without_norms(_OPTIM.groups),
    "weight_decay": _without_norms(_OPTIM.weight_decay),
}

EXPERIMENT = Experiment(
    question="How much does each part of the modern recipe contribute?",
    variants={
        "whole": _narrow(),
        "no_whitening": _narrow(init={"whiten": ""}, optim=_TRAINED_FIRST_LAYER),
        "no_lookahead": _narrow(train={"lookahead_steps": 0}),
        "random_flip": _narrow(augment={"flip": "random"}),
        "no_flip": _narrow(augment={"flip": "none"}),
        "no_shifts": _narrow(augment={"translate": 0}),
        "no_test_time": _narrow(augment={"test_time": "none"}),
        "one_rate": _narrow(optim=_ONE_RATE),
        "no_decay": _narrow(optim={"weight_decay": 0.0}),
        "no_smoothing": _narrow(train={"label_smoothing": 0.0}),
    },
    figure=Dots(),
    columns=("test_accuracy", "test_accuracy_plain", "train_accuracy", "test_loss", "seconds"),
    note="Airbench at a quarter of its widths, on 1,000 training images of each class, in batches "
    "of 256 at a quarter of its learning rate: 400 steps, where the whole recipe has 490. All "
    "10,000 test images are evaluated once, after training. Without whitening the first layer has "
    "random initial values like the others and is trained. `random_flip` mirrors each image with "
    "probability 1/2 in every epoch. `one_rate` gives BatchNorm's biases the learning rate and the "
    "weight decay of all other parameters.",
)
