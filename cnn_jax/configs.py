"""The configs that `--config` names, each built from another by `replace`.

Hyper-parameters are those of the chapter's listings ("Deep Learning with Azure", chapter 6).
A docstring's first line, with the chapter's test accuracy, is what `--help` prints.
"""

from collections.abc import Callable
from dataclasses import replace

from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    nearest,
)
from cnn_jax.errors import UserError

_NEW_HEAD, _FROZEN = ("head/.*", 1.0), (".*", None)
_LAST_BLOCK = (r"(fc\d+|block{last})/.*", 0.1)
_BLOCK1, _BLOCK2, _BLOCK3 = (64, 64), (128, 128), (256, 256, 256)


def quickstart() -> Config:
    """Small CNN on scikit-learn's bundled digits: no download."""
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

    Listing 6-14; dropout follows fc1 and fc2. The Keras twin of the listing trains for 30 epochs.
    """
    base = vgg3()
    return replace(base, name="vgg_dropout", model=replace(base.model, dropout=0.5))


def finetune_all() -> Config:
    """All layers of init.checkpoint, 10 epochs.

    They learn at a tenth of the new head's rate. The network, the size of the images and their
    normalisation are the checkpoint's; data.name=folder, which it starts from, needs data.dir.
    """
    return Config(
        name="finetune_all",
        data=DataConfig(name="folder"),
        init=InitConfig(checkpoint="runs/vgg3", skip=("head/.*",)),
        optim=OptimConfig(learning_rate=0.01, schedule="cosine", groups=(_NEW_HEAD, (".*", 0.1))),
        train=TrainConfig(epochs=10, batch_size=32),
    )


def finetune_head() -> Config:
    """A new head on frozen layers, 100 epochs.

    What the frozen layers make of an image is computed once, so the epochs cost next to nothing.
    """
    base = finetune_all()
    return replace(
        base,
        name="finetune_head",
        optim=replace(base.optim, groups=(_NEW_HEAD, _FROZEN)),
        train=replace(base.train, epochs=100, cache_frozen=True),
    )


def finetune_last_block() -> Config:
    """The last block and all above, 10 epochs."""
    base = finetune_all()
    return replace(
        base,
        name="finetune_last_block",
        optim=replace(base.optim, groups=(_NEW_HEAD, _LAST_BLOCK, _FROZEN)),
    )


def finetune_gradual() -> Config:
    """Unfreezes from the head down, 10 epochs.

    The head alone, from epoch 3 with the last block and the dense layers, from epoch 6 all layers.
    Gradual unfreezing after Howard and Ruder, "Universal Language Model Fine-tuning" (2018).
    """
    base = finetune_all()
    phases = (
        (0, (_NEW_HEAD, _FROZEN)),
        (3, (_NEW_HEAD, _LAST_BLOCK, _FROZEN)),
        (6, (_NEW_HEAD, (".*", 0.1))),
    )
    return replace(
        base, name="finetune_gradual", optim=replace(base.optim, groups=(), phases=phases)
    )


def airbench() -> Config:
    """A modern recipe, 10 epochs. Its author: 94.0%.

    airbench94 of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), which stops
    after 9.9 epochs and drops each one's last short batch: 476 steps, where here they are 490.
    Its rates and decays are those of the mean loss over a batch, not of its sum.
    """
    base = simple_cnn()
    frozen, norms = ("whiten/kernel", None), (".*norm./bias", 64.0)
    return replace(
        base,
        name="airbench",
        data=replace(base.data, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        augment=AugmentConfig(alternate_flip=True, translate=2, test_time="mirror_translate"),
        model=ModelConfig(
            name="airbench",
            blocks=((64, 64), (256, 256), (256, 256)),
            dense=(),
            activation="gelu",
        ),
        init=InitConfig(whiten="whiten"),
        optim=OptimConfig(
            name="nesterov",
            learning_rate=1.5,
            momentum=0.85,
            schedule="linear",
            warmup_epochs=2.3,
            warmup_fraction=0.2,
            final_fraction=0.07,
            decays=((".*norm./bias", 2.079e-5), (".*", 1.330e-3)),
            phases=(
                (0, (frozen, norms, (".*", 1.0))),
                (3, (("whiten/.*", None), norms, (".*", 1.0))),
            ),
        ),
        train=TrainConfig(epochs=10, batch_size=1024, label_smoothing=0.2, lookahead_steps=5),
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
        airbench,
        finetune_head,
        finetune_last_block,
        finetune_all,
        finetune_gradual,
    )
}


def get(name: str) -> Config:
    """Returns the config of that name.

    Raises:
        UserError: no config has the name; the message has the nearest that does.
    """
    if name not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise UserError(f"unknown config {name}{nearest(name, CONFIGS)}; known: {known}")
    return CONFIGS[name]()


def listing() -> str:
    """Returns one line a config: its name and the first line of its docstring."""
    return "\n".join(
        f"  {name:<19} {(make.__doc__ or '').splitlines()[0]}" for name, make in CONFIGS.items()
    )
