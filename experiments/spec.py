"""What an experiment is: named configs, how many seeds of each, and what is reported of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cnn_jax import configs
from cnn_jax.config import Config, ModelConfig, TrainConfig, nearest
from cnn_jax.errors import UserError

TUNING_FRACTION = 0.1
"""Of all training images, what learning rates are chosen by."""


@dataclass(frozen=True)
class Curves:
    """A figure of the accuracy on the training and the test set by epoch; needs `watch_test`."""


@dataclass(frozen=True)
class Bars:
    """A figure with a bar a variant for each of `columns`, which are shares."""

    columns: tuple[str, ...]


@dataclass(frozen=True)
class Dots:
    """A figure with a row a variant: the test accuracy of each seed, and their mean."""


@dataclass(frozen=True)
class AgainstField:
    """A figure of the test accuracy against a number in the config, such as "model.dropout".

    A variant's point belongs to the line that its name up to the last "-" gives.
    """

    name: str
    label: str
    logarithmic: bool = False


@dataclass(frozen=True)
class AgainstMeasured:
    """A figure of measured columns against the number that each stands for, a line a variant."""

    columns: Mapping[str, float]
    label: str


@dataclass(frozen=True)
class Points:
    """A figure of the test accuracy against another column of the table, a point a variant."""

    column: str


@dataclass(frozen=True)
class Experiment:
    """Variants of a config that are trained, each with seeds 0, 1, ..., and compared."""

    question: str
    """The title of the report."""
    variants: Mapping[str, Config]
    """By a name that can stand in a file's, in the order of the report."""
    figure: Curves | Bars | Dots | AgainstField | AgainstMeasured | Points
    seeds: int = 3
    order: tuple[str, ...] = ()
    """The order of running, where it is another than that of the report."""
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Rising learning rates to choose from, by variant. Each is tried once, with seed 0 and
    `TUNING_FRACTION` of the images held out; that of the best accuracy on them is the variant's.
    """
    columns: tuple[str, ...] = ("test_accuracy", "train_accuracy")
    """Of the table: columns of results.csv, `rows.DERIVED`, `rows.EPOCHS_RUN`, or dotted names of
    fields of the config."""
    measured: tuple[str, ...] = ()
    """Names of the shares, in [0, 1], that `measure` takes from a trained network."""
    measure: Callable[..., dict[str, float]] | None = None
    """Of a `runs.TrainedModel` and its `data.ImageDataset`."""
    borrowed: tuple[str, ...] = ()
    """Variants of another experiment, shown beside this one's: with the seeds that it has reported,
    or with seed 0."""
    watch_test: bool = False
    """Evaluate the test images after every epoch as well, for a curve: nothing is chosen by it."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Test accuracies of the chapter, by variant."""
    note: str = ""
    """What a reader must know to judge the results."""

    def __post_init__(self) -> None:
        for name in ("order", "rates", "borrowed", "reference"):
            for variant in getattr(self, name):
                if variant not in self.variants:
                    guess = nearest(variant, self.variants)
                    raise UserError(f"{self.question} {name}: there is no variant {variant}{guess}")
        if self.order and sorted(self.order) != sorted(self.variants):
            raise UserError(f"{self.question} order must name every variant once")
        if isinstance(self.figure, Curves) and not self.watch_test:
            raise UserError(f"{self.question} Curves are of the test set too: set watch_test")


SMALL = (
    "A small VGG (three blocks of one convolution, 16, 32 and 64 filters, then fc128) on 1,000 "
    "training images of each class, for 10 epochs of batches of 64, by momentum SGD at a learning "
    "rate of 0.01 where nothing else is said: small enough for most runs to take a minute or less "
    "on one core, so large networks may order the variants otherwise. All 10,000 test images are "
    "evaluated once, at the end. Seeds differ in initial values and in the order of the images, "
    "not in which images they are."
)


def small(**changes: Any) -> Config:
    """Returns the config that ablations start from, with sections' fields changed.

    `small(model={"dropout": 0.5})` changes one field of one section.
    """
    base = configs.get("simple_cnn")
    base = replace(
        base,
        name="custom",
        data=replace(base.data, images_per_class=1000),
        model=ModelConfig(name="vgg", blocks=((16,), (32,), (64,)), dense=(128,)),
        train=TrainConfig(epochs=10, batch_size=64),
    )
    return edit(base, **changes)


def edit(base: Config, **changes: Any) -> Config:
    """Returns a config with fields of its sections replaced: `edit(base, train={"epochs": 3})`."""
    sections = {name: replace(getattr(base, name), **fields) for name, fields in changes.items()}
    return replace(base, **sections)
