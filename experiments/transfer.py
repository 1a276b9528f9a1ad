"""Pretraining where images are few: five classes of CIFAR-10 are learned after the other five."""

from dataclasses import replace

from cnn_jax import configs
from cnn_jax.config import (
    AugmentConfig,
    Config,
    InitConfig,
    ModelConfig,
    Multiplier,
    TrainConfig,
)
from cnn_jax.data import ImageDataset
from cnn_jax.predictor import Predictor
from cnn_jax.tools import features
from experiments.spec import PRETRAINED, AgainstField, Experiment

_OLD = ("airplane", "automobile", "bird", "cat", "deer")
_NEW = ("dog", "frog", "horse", "ship", "truck")
# Epochs by images per class: smaller sets need more epochs for as many steps.
_EPOCHS = {20: 100, 100: 50, 500: 20}
_METHODS = (
    "scratch",
    "finetune_head",
    "finetune_last_block",
    "finetune_all",
    "finetune_gradual",
)
_CLASSIFIERS = ("svm", "random_forest", "mlp")
_RATES = (0.01, 0.03, 0.1, 0.3)


def _pretraining() -> Config:
    base = configs.get("vgg3")
    return replace(
        base,
        name="custom",
        data=replace(base.data, classes=_OLD),
        augment=AugmentConfig(flip="random", translate=2),
        model=ModelConfig(
            name="vgg", blocks=((32, 32), (64, 64), (128, 128)), dense=(256,), dropout=0.5
        ),
        optim=replace(base.optim, learning_rate=0.02, schedule="cosine", weight_decay=5e-4),
        train=TrainConfig(epochs=30, batch_size=128),
    )


def _learning(method: str, images_per_class: int) -> Config:
    """Returns the config that learns the new classes from so many images of each."""
    source, epochs = _pretraining(), _EPOCHS[images_per_class]
    base = configs.get("finetune_head" if method == "scratch" else method)
    base = replace(
        base,
        name="custom",
        data=replace(source.data, classes=_NEW, images_per_class=images_per_class),
        model=source.model,
        init=replace(base.init, checkpoint=PRETRAINED),
        train=replace(base.train, epochs=epochs),
    )
    if method == "scratch":
        optim = replace(base.optim, groups=())
        return replace(
            base, init=InitConfig(), optim=optim, train=replace(base.train, cache_frozen=False)
        )
    # Of the 10 epochs of the config, the starts of its phases are as many tenths of these.
    groups = tuple((pattern, _stretched(rate, epochs)) for pattern, rate in base.optim.groups)
    return replace(base, optim=replace(base.optim, groups=groups))


def _stretched(multiplier: Multiplier, epochs: int) -> Multiplier:
    if not isinstance(multiplier, tuple):
        return multiplier
    return tuple((epochs * start // 10, value) for start, value in multiplier)


def _tuning(config: Config) -> Config:
    """Returns the config with a validation part, and images that no seed of the results has."""
    return replace(config, seed=1000, data=replace(config.data, validation=0.05, split_seed=1000))


def _classify(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracies of classifiers on the penultimate layer's features.

    They are computed where everything below the head is as pretrained.
    """
    if not predictor.config.train.cache_frozen or dataset.validation:
        return {}
    found = features.extract(predictor, dataset, "")
    results = {name: features.classify(found, name, predictor.config.seed) for name in _CLASSIFIERS}
    return {name: result["test_accuracy"] for name, result in results.items()}


EXPERIMENT = Experiment(
    question="Does pretraining help where images are few?",
    variants={
        f"{method}-{images}": _learning(method, images) for method in _METHODS for images in _EPOCHS
    },
    figure=AgainstField(
        "data.images_per_class",
        "training images per class",
        logarithmic=True,
        measured=_CLASSIFIERS,
    ),
    split_by_seed=True,
    rates={
        f"{method}-{images}": _RATES if images == 100 else f"{method}-100"
        for method in _METHODS
        for images in _EPOCHS
    },
    tuning=_tuning,
    pretraining=_pretraining(),
    columns=("train.epochs", "optim.learning_rate", "test_accuracy", *_CLASSIFIERS),
    measured=_CLASSIFIERS,
    measure=_classify,
    note=f"The pretrained network learned {', '.join(_OLD)} from all their images. "
    f"{', '.join(_NEW)} are then learned from 20, 100 or 500 images of each class: from scratch, "
    "by the four ways of fine-tuning, and by scikit-learn's classifiers on the features of the "
    "layer before the head, which are in the rows of `finetune_head` because it leaves that layer "
    "as pretrained. The seed chooses the images, the initial values and their order. Learning "
    "rates are chosen at 100 images of each class.",
)
