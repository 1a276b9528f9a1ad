"""What each part of the modern recipe is worth: it is left out, and all others stay."""

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


def _without_norms(groups: Any) -> Any:
    return tuple(group for group in groups if "norm" not in group[0])


_PHASES = configs.get("airbench").optim.phases
_TRAINED_FIRST_LAYER = {"phases": (), "groups": ((".*norm./bias", 64.0), (".*", 1.0))}
# With the decay of the rest: that of BatchNorm's biases is as much smaller as their rate is larger.
_ONE_RATE = {
    "phases": tuple((epoch, _without_norms(groups)) for epoch, groups in _PHASES),
    "decays": _without_norms(configs.get("airbench").optim.decays),
}

EXPERIMENT = Experiment(
    question="What is each part of the modern recipe worth?",
    variants={
        "whole": _narrow(),
        "no_whitening": _narrow(init={"whiten": ""}, optim=_TRAINED_FIRST_LAYER),
        "no_lookahead": _narrow(train={"lookahead_steps": 0}),
        "random_flip": _narrow(augment={"flip": True, "alternate_flip": False}),
        "no_flip": _narrow(augment={"alternate_flip": False}),
        "no_shifts": _narrow(augment={"translate": 0}),
        "no_test_time": _narrow(augment={"test_time": "none"}),
        "one_rate": _narrow(optim=_ONE_RATE),
        "no_decay": _narrow(optim={"decays": ()}),
        "no_smoothing": _narrow(train={"label_smoothing": 0.0}),
    },
    figure=Dots(),
    columns=("test_accuracy", "test_accuracy_plain", "train_accuracy", "test_loss", "seconds"),
    note="Airbench at a quarter of its widths, on 1,000 training images of each class, in batches "
    "of 256 at a quarter of its learning rate: 400 steps, where the whole recipe has 490. All "
    "10,000 test images are evaluated once, at the end. Without whitening the first layer starts "
    "as the others do and is trained; `random_flip` mirrors each image with probability 1/2 every "
    "time; `one_rate` gives BatchNorm's biases the rate and the decay of the rest.",
)
