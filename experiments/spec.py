"""What an experiment is: named configs, the number of seeds of each, and what is reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cnn_jax import configs, fields
from cnn_jax.config import Config, ModelConfig, TrainConfig
from cnn_jax.errors import UserError, nearest
from experiments.charts import AgainstField, AgainstMeasured, Bars, Chart, Curves, Dots, Points
from experiments.tables import DERIVED, RESULTS, TEXTS

# All that the file of an experiment needs can be imported from here.
__all__ = ["AgainstField", "AgainstMeasured", "Bars", "Curves", "Dots", "Experiment", "Points"]
__all__ += ["PRETRAINED", "SMALL", "edit", "small"]

PRETRAINED = "{pretrained}"
"""As `init.checkpoint` of a variant, the network that `Experiment.pretraining` trains."""


def hold_out(config: Config) -> Config:
    """Returns the config with 10% of the training images held out for validation."""
    return replace(config, data=replace(config.data, validation=0.1))


@dataclass(frozen=True)
class Experiment:
    """Variants of a config that are trained, each with seeds 0, 1, ..., and compared."""

    question: str
    """The title of the report."""
    variants: Mapping[str, Config]
    """By a name that is valid as a file name, in the order of training and of the report."""
    figure: Chart
    """The kind of figure; see `charts`."""
    seeds: int = 3
    split_by_seed: bool = False
    """Whether `data.split_seed` is the seed too, so that each seed trains on other images."""
    rates: Mapping[str, tuple[float, ...] | str] = field(default_factory=dict)
    """Learning rates to choose from, by variant, smallest first: the one with the best validation
    accuracy is used. A name stands for the rate that is chosen for that variant."""
    tuning: Callable[[Config], Config] = hold_out
    """Returns the config that the rates of a variant are compared with, from the variant's own."""
    pretraining: Config | None = None
    """A network to train first, which variants start from by `init.checkpoint=PRETRAINED`."""
    columns: tuple[str, ...] = ("test_accuracy", "train_accuracy")
    """Columns of the table: those of results.csv, `tables.DERIVED`, or fields of the config by
    their dotted names."""
    measured: tuple[str, ...] = ()
    """Names of the shares, in [0, 1], that `measure` returns."""
    measure: Callable[..., dict[str, float]] | None = None
    """A function of a trained `predictor.Predictor` and its `data.ImageDataset`."""
    borrowed: tuple[str, ...] = ()
    """Variants of another experiment that are shown for comparison, with the seeds that it has
    reported, or with seed 0."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Test accuracies that the chapter reports, by variant."""
    note: str = ""
    """What a reader must know to judge the results."""

    def __post_init__(self) -> None:
        for name in ("rates", "borrowed", "reference"):
            for variant in getattr(self, name):
                self._check_known(f"{name}: there is no variant", variant, self.variants)
        for source in self.rates.values():
            if isinstance(source, str):
                known = [v for v, rates in self.rates.items() if not isinstance(rates, str)]
                self._check_known("rates: no rate is chosen for", source, known)
        if not self.pretraining:
            for variant, config in self.variants.items():
                if config.init.checkpoint == PRETRAINED:
                    raise UserError(f"{self.question} {variant} needs the field `pretraining`")
        columns = [*RESULTS, *DERIVED, *self.measured]
        numbers = [name for name in columns if name not in TEXTS]
        for name in (*self.columns, *self.figure.columns):
            if "." in name:
                self._check_known("There is no field", name, fields.all_fields())
            else:
                self._check_known("There is no column", name, numbers)

    def _check_known(self, problem: str, name: str, known: Any) -> None:
        if name not in known:
            raise UserError(f"{self.question} {problem} {name}{nearest(name, known)}")


SMALL = (
    "The network is a small VGG: three blocks of one convolution each, with 16, 32 and 64 filters, "
    "and a dense layer of 128 units. Unless stated otherwise it is trained on 1,000 images of each "
    "class for 10 epochs with batches of 64 images, by SGD with momentum at a learning rate of "
    "0.01. Most runs take a minute or less on one core; the ranking of the variants may be "
    "different for large networks. All 10,000 test images are evaluated once, after training. "
    "Seeds change the initial values and the order of the images, but not which images are used."
)


def small(**changes: Any) -> Config:
    """Returns the config that ablations start from, with fields of its sections changed.

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
    sections = {name: replace(getattr(base, name), **values) for name, values in changes.items()}
    return replace(base, **sections)
