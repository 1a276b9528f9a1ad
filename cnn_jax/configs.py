"""The configs that `--config` names, each derived from another by `replace`; see also `recipes`.

Hyper-parameters are those of the chapter's listings ("Deep Learning with Azure", chapter 6).
`--help` prints the first line of each docstring, with the test accuracy that the source reports.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cnn_jax import fields, recipes, user_code
from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from cnn_jax.errors import UserError, nearest
from cnn_jax.recipes import FROZEN, NEW_HEAD
from cnn_jax.values import is_user_code

_LAST_BLOCK = ("{last}/.*", 0.1)
_BLOCK1, _BLOCK2, _BLOCK3 = (64, 64), (128, 128), (256, 256, 256)


def quickstart() -> Config:
    """A small VGG on scikit-learn's bundled digits; needs no download."""
    return Config(
        name="quickstart",
        model=ModelConfig(name="vgg", blocks=((16, 16), (32, 32)), dense=(128,), dropout=0.25),
        optim=OptimConfig(learning_rate=0.02, schedule="cosine"),
        train=TrainConfig(epochs=12, batch_size=64),
    )


def simple_cnn() -> Config:
    """Listing 6-1: two convolutions, 3 epochs. Chapter: 64%."""
    return Config(
        name="simple_cnn",
        data=DataConfig(name="cifar10"),
        model=ModelConfig(name="simple_cnn", blocks=((50, 50),), dense=(512,)),
        optim=OptimConfig(name="momentum", learning_rate=0.01, momentum=0.9),
        train=TrainConfig(epochs=3, batch_size=64),
    )


def vgg1() -> Config:
    """Model 1: one VGG block, 20 epochs. Chapter: 72.1%.

    Listing 6-11; training accuracy reaches 100%.
    """
    base = simple_cnn()
    return replace(
        base,
        name="vgg1",
        model=ModelConfig(name="vgg", blocks=(_BLOCK1,), dense=(4096, 4096)),
        train=replace(base.train, epochs=20),
    )


def vgg2() -> Config:
    """Model 2: two VGG blocks, 10 epochs. Chapter: 75.5%.

    Listing 6-12; the figure is the chapter's notebook's.
    """
    base = vgg1()
    return replace(
        base,
        name="vgg2",
        model=replace(base.model, blocks=(_BLOCK1, _BLOCK2)),
        train=replace(base.train, epochs=10),
    )


def vgg3() -> Config:
    """Model 3: three VGG blocks, 10 epochs. Chapter: 76%.

    Listing 6-13; the figure is the chapter's notebook's.
    """
    base = vgg2()
    return replace(base, name="vgg3", model=replace(base.model, blocks=(_BLOCK1, _BLOCK2, _BLOCK3)))


def vgg_dropout() -> Config:
    """Model 4: vgg3 with dropout 0.5, 10 epochs. Chapter: 80%.

    Listing 6-14; dropout follows fc1 and fc2. The same network in Keras is trained for 30 epochs.
    """
    base = vgg3()
    return replace(base, name="vgg_dropout", model=replace(base.model, dropout=0.5))


def finetune_all() -> Config:
    """Trains a new head and all layers of init.checkpoint, 10 epochs.

    The learning rate of the old layers is a tenth of the head's. Network, image size and
    normalisation are those of the checkpoint. The photos are in data.dir.
    """
    return Config(
        name="finetune_all",
        data=DataConfig(name="folder"),
        init=InitConfig(checkpoint="runs/vgg3", skip=("head/.*",)),
        optim=OptimConfig(learning_rate=0.01, schedule="cosine", groups=(NEW_HEAD, (".*", 0.1))),
        train=TrainConfig(epochs=10, batch_size=32),
    )


def finetune_head() -> Config:
    """Trains a new head on the frozen layers of init.checkpoint, 100 epochs.

    The outputs of the frozen layers are computed only once, so an epoch takes little time.
    """
    base = finetune_all()
    return replace(
        base,
        name="finetune_head",
        optim=replace(base.optim, groups=(NEW_HEAD, FROZEN)),
        train=replace(base.train, epochs=100, cache_frozen=True),
    )


def finetune_last_block() -> Config:
    """Trains a new head, the hidden dense layers and the last block, 10 epochs."""
    base = finetune_all()
    return replace(
        base,
        name="finetune_last_block",
        optim=replace(base.optim, groups=(NEW_HEAD, _LAST_BLOCK, FROZEN)),
    )


def finetune_gradual() -> Config:
    """Trains a new head, then more and more layers, 10 epochs.

    The last block and the hidden dense layers train from epoch 3 on, all layers from epoch 6 on:
    gradual unfreezing as in Howard and Ruder, "Universal Language Model Fine-tuning" (2018).
    """
    base = finetune_all()
    last = ("{last}/.*", ((0, None), (3, 0.1)))
    groups = (NEW_HEAD, last, (".*", ((0, None), (6, 0.1))))
    return replace(base, name="finetune_gradual", optim=replace(base.optim, groups=groups))


def resnet_small() -> Config:
    """A residual network of 14 layers with BatchNorm, 20 epochs.

    Network, augmentation, momentum, learning rate and batch size are those of He et al., "Deep
    Residual Learning for Image Recognition" (2015), section 4.2. The paper has no network of this
    depth, trains for 164 epochs with a step schedule, and has a weight decay of 1e-4.
    """
    base = simple_cnn()
    return replace(
        base,
        name="resnet_small",
        data=replace(base.data, normalize=recipes.CIFAR10),
        augment=AugmentConfig(flip="random", translate=4),
        model=ModelConfig(name="resnet_small", blocks=((16, 16), (32, 32), (64, 64)), dense=()),
        optim=OptimConfig(learning_rate=0.1, schedule="cosine", weight_decay=5e-4),
        train=TrainConfig(epochs=20, batch_size=128),
    )


CONFIGS: dict[str, Callable[[], Config]] = {
    make.__name__: make
    for make in (
        quickstart,
        simple_cnn,
        vgg1,
        vgg2,
        vgg3,
        vgg_dropout,
        resnet_small,
        recipes.airbench,
        recipes.airbench_muon,
        recipes.airbench96,
        finetune_head,
        finetune_last_block,
        finetune_all,
        finetune_gradual,
        recipes.photos,
        recipes.photos_features,
    )
}


def get(name: str) -> Config:
    """Returns a named config, the config in a .json file, or one of the user's own.

    "my_file.py:my_config" names a `Config`, or a function without arguments that returns one.

    Raises:
        UserError: there is no such config; for a mistyped name, the message has the nearest one.
    """
    if name.endswith(".json"):
        return fields.load(Path(name).expanduser())
    if is_user_code(name):
        found = user_code.load(name)
        found = found() if callable(found) else found
        if not isinstance(found, Config):
            raise UserError(f"--config={name} must be a Config or return one")
        return found
    if name not in CONFIGS:
        known = f"known: {', '.join(CONFIGS)}, FILE.py:NAME or FILE.json"
        raise UserError(f"unknown config {name}{nearest(name, CONFIGS)}; {known}")
    return CONFIGS[name]()


def listing() -> list[tuple[str, str]]:
    """Returns the name of each config and the first line of its docstring."""
    return [(name, (make.__doc__ or "").splitlines()[0]) for name, make in CONFIGS.items()]
