"""Own photos: from scratch, on the features of ImageNet's network, and by fine-tuning it."""

from dataclasses import replace

from cnn_jax import configs
from cnn_jax.config import Config, InitConfig, Multiplier
from cnn_jax.data import ImageDataset
from cnn_jax.predictor import Predictor
from cnn_jax.tools import features
from experiments.spec import AgainstField, Experiment

# Relative to the current folder, so that results do not depend on where they were made.
_FOLDER = "clothing"
_FEW = 20
_EPOCHS = 4
_CLASSIFIERS = ("logistic", "svm", "random_forest", "knn")
_RATES = (3e-4, 1e-3, 3e-3)
_METHODS = ("scratch", "head", "last_stage", "all", "photos")


def _config(method: str, images_per_class: int) -> Config:
    base = configs.get("photos_features" if method == "head" else "photos")
    data = replace(base.data, dir=_FOLDER, images_per_class=images_per_class)
    base = replace(base, name="custom", data=data)
    if method in ("photos", "head"):
        return base
    # As photos, but for what is trained: everything from the first step on, at one rate.
    train = replace(base.train, epochs=_EPOCHS)
    base = replace(base, train=train, optim=replace(base.optim, groups=()))
    if method == "scratch":
        return replace(base, init=InitConfig(), train=replace(train, epochs=5 * _EPOCHS))
    groups: tuple[tuple[str, Multiplier], ...] = (("head/.*|{last}/.*", 1.0), (".*", None))
    return base if method == "all" else replace(base, optim=replace(base.optim, groups=groups))


def _tuning(config: Config) -> Config:
    """Returns the config with another seed; the set has a validation part of its own."""
    return replace(config, seed=1000, data=replace(config.data, split_seed=1000))


def _classify(predictor: Predictor, dataset: ImageDataset) -> dict[str, float]:
    """Returns the test accuracies of classifiers on the pretrained network's features."""
    if not predictor.config.train.cache_frozen:
        return {}
    found = features.extract(predictor, dataset, "")
    results = {name: features.classify(found, name, predictor.config.seed) for name in _CLASSIFIERS}
    return {name: result["test_accuracy"] for name, result in results.items()}


EXPERIMENT = Experiment(
    question="What do ImageNet's weights buy on own photos?",
    variants={
        f"{method}-{images or 'all'}": _config(method, images)
        for images in (_FEW, 0)
        for method in _METHODS
    },
    figure=AgainstField(
        "data.images_per_class", "training images per class (0: all)", measured=_CLASSIFIERS
    ),
    split_by_seed=True,
    rates={
        f"{method}-{images}": _RATES
        for images in (_FEW, "all")
        for method in _METHODS
        if method != "photos"
    },
    tuning=_tuning,
    columns=("train.epochs", "optim.learning_rate", "test_accuracy", "seconds", *_CLASSIFIERS),
    measured=_CLASSIFIERS,
    measure=_classify,
    note="The photos are those of clothing (small), ten classes of clothes; the network is "
    "EfficientNet-Lite0 at 224x224. In the current folder, `clothing` holds the photos, and timm's "
    "`tf_efficientnet_lite0.safetensors` is ImageNet's weights. `photos` is the config of that "
    "name as it is; `head` is `photos_features`; `last_stage` and `all` train the last stage with "
    "the head, or all layers, from the first step on at one rate; `scratch` has five times the "
    "epochs and no weights. scikit-learn's classifiers are in the rows of `head`, which leaves the "
    "features as they are. The seed chooses initial values, order, changes of the images and, "
    "where they are 20 of each class, the images.",
)
