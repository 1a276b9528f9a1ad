"""Configs of recipes that are newer than the chapter: own photos, and Jordan's for CIFAR-10."""

from dataclasses import replace

from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Mean and standard deviation of the channels of CIFAR-10's training images."""
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NEW_HEAD, FROZEN = ("head/.*", 1.0), (".*", None)
"""Groups of `optim.groups`: the head at the full rate, and all others frozen."""


def photos() -> Config:
    """Own photos, from weights of ImageNet: a new head, then all layers, 7 epochs.

    Network and preprocessing are those of init.checkpoint, the photos are in data.dir. An epoch of
    few photos goes through them several times.
    """
    return Config(
        name="photos",
        data=DataConfig(
            name="folder", image_size=224, crop=0.875, interpolation="bicubic", normalize=_HALF
        ),
        augment=AugmentConfig(flip="random", random_crop=0.35),
        model=ModelConfig(name="efficientnet_lite0", blocks=(), dense=(), dropout=0.2),
        init=InitConfig(checkpoint="tf_efficientnet_lite0.safetensors", skip=("head/.*",)),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            weight_decay=0.02,
            schedule="cosine",
            warmup_epochs=0.3,
            groups=(
                NEW_HEAD,
                ("{last}/.*", ((0, None), (1, 1.0))),
                (".*", ((0, None), (1, 0.5))),
            ),
        ),
        train=TrainConfig(epochs=7, batch_size=32, min_epoch_steps=50, label_smoothing=0.1),
    )


def photos_features() -> Config:
    """Own photos, from weights of ImageNet: a new head alone, in minutes on a laptop.

    The frozen layers' outputs are computed only once, so the images are not changed at random.
    """
    base = photos()
    return replace(
        base,
        name="photos_features",
        augment=AugmentConfig(),
        optim=replace(base.optim, groups=(NEW_HEAD, FROZEN), warmup_epochs=0.0),
        train=replace(base.train, epochs=30, label_smoothing=0.0, cache_frozen=True),
    )


def airbench() -> Config:
    """A fast modern network with its training recipe, 10 epochs. Its author: 94.0%.

    airbench94 of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024). The original
    drops the short last batch of each epoch and stops after 9.9 epochs: 476 steps; here it is 490.
    Learning rates and weight decays are converted from the summed loss to the mean loss.
    """
    norms = ".*norm./bias"
    return Config(
        name="airbench",
        data=DataConfig(name="cifar10", normalize=CIFAR10),
        augment=AugmentConfig(flip="alternate", translate=2, test_time="mirror_translate"),
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
            ends=(0.2, 0.07),
            weight_decay=((norms, 2.079e-5), (".*", 1.330e-3)),
            groups=(
                ("whiten/kernel", None),
                ("whiten/bias", ((0, 1.0), (3, None))),
                (norms, 64.0),
                (".*", 1.0),
            ),
        ),
        train=TrainConfig(epochs=10, batch_size=1024, label_smoothing=0.2, lookahead_steps=5),
    )


def airbench_muon() -> Config:
    """`airbench` with Muon, 8 epochs of 25 steps. Its author: 94.0%.

    airbench94_muon of Jordan (2024), in the repository KellerJordan/cifar10-airbench. Kernels of
    convolutions are renormalised and trained by Muon, the biases and the head by Nesterov momentum.
    The latter's learning rates and weight decays are converted from the summed to the mean loss.
    """
    base = airbench()
    batch_size, rate, of_biases, of_head = 2000, 0.24, 0.053, 0.67
    convolutions, norms = "group./conv./kernel", ".*norm./bias"
    biases, head = of_biases * batch_size / rate, of_head * batch_size / rate
    return replace(
        base,
        name="airbench_muon",
        model=replace(base.model, mean_head=True),
        optim=OptimConfig(
            name="muon",
            learning_rate=rate,
            momentum=0.85,
            muon=(convolutions, 0.6, 3),
            renormalize=convolutions,
            schedule="linear",
            weight_decay=((".*bias", 2e-6 / of_biases), ("head/.*", 2e-6 / of_head), (".*", 0.0)),
            groups=(
                ("whiten/kernel", None),
                ("whiten/bias", ((0, biases), (3, 0.0))),
                (norms, biases),
                ("head/.*", head),
                (".*", 1.0),
            ),
        ),
        train=TrainConfig(epochs=8, batch_size=batch_size, label_smoothing=0.2),
    )


def airbench96() -> Config:
    """A wider, residual `airbench`, 37 epochs. Its author: 96.0%. Not run yet: for a GPU.

    airbench96 of Jordan (2024), in the repository KellerJordan/cifar10-airbench. As in `airbench`,
    the last batch of an epoch is not dropped: 1813 steps instead of 1776. No full run has been
    made: it takes 14 times the computation of `airbench`, hours on a CPU.
    """
    base = airbench()
    norms = ".*norm./bias"
    return replace(
        base,
        name="airbench96",
        augment=replace(base.augment, translate=4, cutout=12, cutout_inside=True),
        model=replace(
            base.model, name="airbench_residual", blocks=((128,) * 3, (384,) * 3, (512,) * 3)
        ),
        optim=replace(
            base.optim,
            learning_rate=1.174,
            warmup_epochs=3.7,
            ends=(0.2, 0.0),
            weight_decay=((norms, 2.083e-5), (".*", 1.333e-3)),
        ),
        train=replace(base.train, epochs=37),
    )
