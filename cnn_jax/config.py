"""The config of an experiment: sections of fields as frozen dataclasses.

The text below a field is what `--help` prints. Values are checked in the same way whether they come
from a flag, from JSON or from Python. Nothing slow is imported here, so `--help` and the messages
for mistyped flags appear at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cnn_jax.values import Choices, Section, is_user_code, require, require_patterns

Multiplier = float | None | tuple[tuple[int, float | None], ...]
"""A number, None for frozen parameters, or (first epoch, number or None) pairs."""
Groups = tuple[tuple[str, Multiplier], ...]
"""(pattern, multiplier) pairs; see `OptimConfig.groups`."""


@dataclass(frozen=True)
class DataConfig(Section, prefix="data."):
    """Which images to learn from, and how they are split and scaled."""

    name: str = "digits"
    """`digits` (bundled), `folder` (own photos), cifar10, cifar100, mnist, fashion_mnist, another
    image-classification set of tfds, or FILE.py:NAME."""
    dir: str = ""
    """The data_dir of tfds, or the folder of photos. Empty: $TFDS_DATA_DIR, else tfds' default."""
    image_size: int = 32
    """Side in pixels of the `digits` and `folder` images that the network sees; other sets keep
    their own."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How a photo becomes a square: its centre, all of it between gray borders, or all of it with
    its sides scaled differently."""
    crop: float = 1.0
    """Share of each side of the square that the network sees, from its centre. Photos are stored
    at image_size / crop, so that augment.random_crop can reach what lies around."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How photos are scaled."""
    skip_broken: bool = False
    """If a streamed photo can't be read any more, train on another one in its place and count it,
    instead of ending the run."""
    classes: tuple[str, ...] = ()
    """Class names to keep, relabelled 0, 1, ... in this order. Empty: all."""
    images_per_class: int = 0
    """Training images kept of each class, chosen by split_seed. 0: all."""
    validation: float = 0.0
    """Fraction of the training images of each class that is set aside for validation."""
    test_fraction: float = 0.2
    """Fraction of each class held out for testing if the source has no test part."""
    split_seed: int = 0
    """Determines which images are held out or kept, independently of the training seed."""
    normalize: tuple[tuple[float, float, float], tuple[float, float, float]] = (
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
    )
    """Mean and standard deviation of each channel: pixels in [0, 1] become (x - mean) / std. The
    chapter leaves pixels as they are."""

    def seen(self, stored: Sequence[int]) -> tuple[int, int, int]:
        """Returns the shape [height, width, channels] of what the network sees of stored images."""
        height, width, channels = stored
        return round(self.crop * height), round(self.crop * width), channels

    def check(self) -> None:
        """Refuses values that are out of range."""
        require(8 <= self.image_size <= 1024, "data.image_size must be from 8 to 1024")
        require(0 < self.crop <= 1, "data.crop must be in (0, 1]")
        require(self.images_per_class >= 0, "data.images_per_class must be 0 (all) or more")
        require(0 <= self.validation < 1, "data.validation must be in [0, 1)")
        require(0 < self.test_fraction < 1, "data.test_fraction must be in (0, 1)")
        require(self.split_seed >= 0, "data.split_seed must be 0 or more")
        require(min(self.normalize[1]) > 0, "data.normalize needs positive standard deviations")
        require(len(set(self.classes)) == len(self.classes), "data.classes names a class twice")
        require(len(self.classes) != 1, "data.classes must name two classes or more")


@dataclass(frozen=True)
class AugmentConfig(Section, prefix="augment."):
    """Changes made to images on the device, all off by default as in the chapter."""

    flip: Literal["none", "random", "alternate"] = "none"
    """Mirror training images left to right: `random`, each with probability 1/2; `alternate`, a
    random half of them, chosen once, in even epochs and the other half in odd ones."""
    translate: int = 0
    """Shift by up to this many pixels in each direction, reflecting at the border."""
    random_crop: float = 0.0
    """Train on a random rectangle of each image, scaled to the network's size: the smallest share
    of the area that it may have, its sides between 3:4 and 4:3 (Szegedy et al., 2015). 0: off."""
    color: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest changes of brightness, contrast and saturation, as factors from 1 - x to 1 + x, and
    of hue, as a fraction of the colour circle up to 0.5."""
    randaugment: tuple[int, float] = (0, 9.0)
    """Number of random operations on each image, and their strength from 0 to 10 (Cubuk et al.,
    2020)."""
    cutout: int = 0
    """Side in pixels of a square that is zeroed in each image (DeVries and Taylor, 2017)."""
    cutout_inside: bool = False
    """Keep the square of cutout wholly inside the image, instead of its centre."""
    erase: float = 0.0
    """Probability that a random rectangle of an image is replaced by noise (Zhong et al., 2020)."""
    mixup: float = 0.0
    """Mix images and labels in pairs, with weights from Beta(x, x) (Zhang et al., 2018). 0: off."""
    cutmix: float = 0.0
    """Put a rectangle of another image, with its share of the label, into each image, its area from
    Beta(x, x) (Yun et al., 2019). With mixup, each batch gets one of the two at random. 0: off."""
    test_time: Literal["none", "mirror", "mirror_translate"] = "none"
    """Average a trained network's logits over the image and its mirror image; `mirror_translate`
    adds two shifts of both by one pixel, with half the weight."""

    @property
    def changes_training(self) -> bool:
        """Whether training images are changed."""
        off = AugmentConfig(
            test_time=self.test_time,
            randaugment=(0, self.randaugment[1]),
            cutout_inside=self.cutout_inside,
        )
        return self != off

    def check(self) -> None:
        """Refuses values that are out of range."""
        require(self.translate >= 0, "augment.translate must be 0 or more")
        require(self.cutout >= 0, "augment.cutout must be 0 or more")
        read = self.cutout or not self.cutout_inside
        require(bool(read), "augment.cutout_inside is read only with augment.cutout")
        require(0 <= self.random_crop <= 1, "augment.random_crop must be in [0, 1]")
        *factors, hue = self.color
        require(all(0 <= x <= 1 for x in factors), "augment.color must have factors in [0, 1]")
        require(0 <= hue <= 0.5, "augment.color must have a hue in [0, 0.5]")
        operations, strength = self.randaugment
        require(operations >= 0, "augment.randaugment must have 0 operations or more")
        require(0 <= strength <= 10, "augment.randaugment must have a strength in [0, 10]")
        require(0 <= self.erase <= 1, "augment.erase must be in [0, 1]")
        require(self.mixup >= 0, "augment.mixup must be 0 (off) or more")
        require(self.cutmix >= 0, "augment.cutmix must be 0 (off) or more")


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model."):
    """The network. `models.build` turns it into a linen module."""

    name: Annotated[
        str,
        Choices(
            "simple_cnn",
            "vgg",
            "vgg16",
            "airbench",
            "airbench_residual",
            "resnet_small",
            "resnet18",
            "resnet34",
            "resnet50",
            "efficientnet_lite0",
            "efficientnet_lite1",
            "efficientnet_lite2",
        ),
    ] = "simple_cnn"
    """`simple_cnn` and `vgg` are the chapter's; `vgg16` averages the last feature maps to 7x7, as
    the ImageNet network does; `airbench` and `airbench_residual` are Jordan's (2024), of airbench94
    and airbench96; `resnet_small` is that of He et
    al. (2015), section 4.2, `resnet18` to `resnet50` those of table 1; `efficientnet_lite0` to
    `lite2` are made for phones. FILE.py:NAME is a function of this section and the number of
    classes that returns a linen module."""
    blocks: tuple[tuple[int, ...], ...] = ((50, 50),)
    """Filters of each 3x3 convolution, one list per block; each block halves the side. In residual
    networks, filters of each residual block, one list per stage. Empty: as in the network's paper,
    where its name stands for one size."""
    pooling: Literal["max", "average", "stride"] = "max"
    """Downsampling at the end of each block of a VGG: 2x2 max or average pooling, or stride 2 in
    the block's last convolution."""
    dense: tuple[int, ...] = (512,)
    """Units of each hidden dense layer."""
    activation: Literal["relu", "tanh", "sigmoid", "gelu"] = "relu"
    """The activation function after every layer but the last."""
    dropout: float = 0.0
    """Probability that a hidden dense unit is dropped in training; in networks without hidden dense
    layers, an input of the head."""
    initializer: Literal["glorot_uniform", "he_uniform", "narrow_uniform"] = "glorot_uniform"
    """Kernels are drawn from U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), sqrt(6 / fan_in) or
    0.01; residual networks and `airbench` have their own initial values."""
    mean_head: bool = False
    """Divide the logits by the number of the head's inputs, and start the head's kernel with a
    standard deviation of 1 (Jordan's recipe with Muon)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the arithmetic; parameters are always float32."""
    precision: Literal["default", "highest"] = "default"
    """How a GPU multiplies float32 numbers: `default` rounds them to TF32 (10 bits of fraction),
    which is several times as fast, `highest` does not. On a CPU, both give the same bits."""

    def check(self) -> None:
        """Refuses what no network can have; `models.build` refuses what the chosen one can't."""
        widths = [*(w for block in self.blocks for w in block), *self.dense]
        require(all(w > 0 for w in widths), "model.blocks and model.dense must be positive widths")
        require(all(self.blocks), "model.blocks must have widths in each block")
        require(0 <= self.dropout < 1, "model.dropout must be in [0, 1)")


@dataclass(frozen=True)
class InitConfig(Section, prefix="init."):
    """Initial parameters that are not drawn at random."""

    checkpoint: str = ""
    """A run's workdir, a file of weights (.safetensors), or hf:REPO of the Hugging Face hub. Its
    network, image size and normalisation are used, except for fields that are set explicitly.
    Empty: all parameters are drawn at random."""
    skip: tuple[str, ...] = ()
    """Regular expressions: parameters whose full names match are not loaded. Example: head/.*"""
    whiten: str = ""
    """Name of the first convolution, to initialise it with filters that whiten the patches of the
    training images. Empty: it is drawn at random, as the others are."""

    def check(self) -> None:
        """Refuses values that do not fit together."""
        require_patterns("init.skip", self.skip)
        if not self.checkpoint:
            require(not self.skip, "init.skip is read only with init.checkpoint")
        both = self.checkpoint and self.whiten
        require(not both, "init.whiten would overwrite parameters of init.checkpoint; set only one")


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim."):
    """The optimizer and its learning-rate schedule."""

    name: Annotated[
        str, Choices("momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop", "muon")
    ] = "momentum"
    """`muon` makes the steps of kernels orthogonal matrices (Jordan, 2024), and is `nesterov` for
    all other parameters. FILE.py:NAME is a function of this section that returns an optax
    transformation with a learning rate of 1."""
    learning_rate: float = 0.01
    """Peak learning rate."""
    momentum: float = 0.9
    """Decay of the velocity of `momentum` and `nesterov`; for the latter's part of `muon` too."""
    muon: tuple[str, float, int] = ("(?!head/|whiten/).*kernel", 0.95, 5)
    """The kernels that `muon` makes orthogonal, as a regular expression for their full names; the
    decay of their velocity; and the number of Newton-Schulz steps. A first layer that init.whiten
    sets, and the head, should not be among them."""
    renormalize: str = ""
    """Regular expression: before each step, kernels whose full names match are scaled to a norm of
    sqrt(outputs), as Jordan does with those that BatchNorm follows. Empty: none."""
    weight_decay: float | tuple[tuple[str, float], ...] = 0.0
    """A number applies to all kernels and to no bias. (pattern, decay) pairs apply to parameters
    whose full names match; the first match wins. Decoupled in `adamw` and for the kernels that
    `muon` makes orthogonal, otherwise added to the gradient."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient. 0: no clipping."""
    schedule: Literal["constant", "cosine", "linear"] | tuple[tuple[float, float], ...] = "constant"
    """The learning rate after warm-up. (epoch, factor) pairs such as [[10,0.1],[15,0.1]] multiply
    it by a factor after each of these epochs."""
    warmup_epochs: float = 0.0
    """Epochs in which the rate rises linearly to its peak, before the schedule begins."""
    ends: tuple[float, float] = (0.0, 0.0)
    """Where the warm-up starts and where `cosine` and `linear` end, as fractions of the peak."""
    groups: Groups = ()
    """(pattern, multiplier) pairs such as [["head/.*",1],["{last}/.*",0.1],[".*",null]]: the first
    pattern that matches a parameter's full name gives the multiplier of its learning rate. null
    freezes it; [[0,null],[3,0.1]] freezes it and trains it from epoch 3 on; [[0,1],[3,0]] takes it
    through the whole schedule in 3 epochs and then freezes it. "{last}" matches the last block and
    the hidden dense layers above it. Empty: all parameters are trained alike."""

    def check(self) -> None:
        """Refuses values that are out of range or do not fit together."""
        require(self.learning_rate > 0, "optim.learning_rate must be positive")
        require(0 <= self.momentum < 1, "optim.momentum must be in [0, 1)")
        require(self.clip_norm >= 0, "optim.clip_norm must be 0 (off) or more")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs must be 0 or more")
        require(all(0 <= end <= 1 for end in self.ends), "optim.ends must be in [0, 1]")
        start, end = self.ends
        require(
            not start or self.warmup_epochs > 0,
            f"optim.ends: the start {start:g} is read only with optim.warmup_epochs",
        )
        require(
            not end or self.schedule in ("cosine", "linear"),
            f"optim.ends: the end {end:g} is read only with optim.schedule=cosine or linear",
        )
        reads_momentum = self.name in ("momentum", "nesterov", "muon") or is_user_code(self.name)
        require(
            reads_momentum or self.momentum == OptimConfig.momentum,
            "optim.momentum is read only with optim.name=momentum, nesterov or muon, not "
            f"{self.name}",
        )
        self._check_muon()
        self._check_schedule()
        self._check_weight_decay()
        self._check_groups()

    def _check_muon(self) -> None:
        kernels, momentum, steps = self.muon
        require_patterns("optim.muon", [kernels])
        require(0 <= momentum < 1, "optim.muon must have a decay of the velocity in [0, 1)")
        require(steps > 0, "optim.muon must have 1 Newton-Schulz step or more")
        require(
            self.name == "muon" or is_user_code(self.name) or self.muon == OptimConfig.muon,
            f"optim.muon is read only with optim.name=muon, not {self.name}",
        )
        require_patterns("optim.renormalize", [self.renormalize])

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            return
        epochs = [epoch for epoch, _ in self.schedule]
        rising = all(a < b for a, b in zip([0.0, *epochs], epochs, strict=False))
        require(
            bool(epochs) and rising,
            "optim.schedule must have rising numbers of epochs, such as [[10,0.1],[15,0.1]]",
        )
        require(epochs[0] > self.warmup_epochs, "optim.schedule must begin after the warm-up")
        factors_fit = all(0 < factor <= 1 for _, factor in self.schedule)
        require(factors_fit, "optim.schedule must have factors in (0, 1]")

    def _check_weight_decay(self) -> None:
        if not isinstance(self.weight_decay, tuple):
            require(self.weight_decay >= 0, "optim.weight_decay must be 0 or more")
            return
        require_patterns("optim.weight_decay", [pattern for pattern, _ in self.weight_decay])
        for pattern, decay in self.weight_decay:
            require(decay >= 0, f"optim.weight_decay: {pattern} needs a decay of 0 or more")

    def _check_groups(self) -> None:
        require_patterns("optim.groups", [pattern for pattern, _ in self.groups])
        steps = [m if isinstance(m, tuple) else ((0, m),) for _, m in self.groups]
        for (pattern, _), of_pattern in zip(self.groups, steps, strict=True):
            at = f"optim.groups: {pattern}"
            rates = [rate for _, rate in of_pattern]
            ends = rates[1:] and rates[-1] == 0 and rates[-2] is not None
            positive = all(rate is None or rate > 0 for rate in (rates[:-1] if ends else rates))
            require(positive, f"{at} must have a positive multiplier, or null to freeze")
            require(
                not ends or self.schedule in ("cosine", "linear"),
                f"{at}: the end 0 is read only with optim.schedule=cosine or linear",
            )
            epochs = [epoch for epoch, _ in of_pattern]
            rising = epochs[:1] == [0] and epochs == sorted(set(epochs))
            require(rising, f"{at} must have rising epochs from 0 on, such as [[0,null],[3,0.1]]")
        for now in sorted({epoch for of_pattern in steps for epoch, _ in of_pattern}):
            values = [[v for epoch, v in of_pattern if epoch <= now][-1] for of_pattern in steps]
            frozen = not any(values)
            require(not frozen, f"optim.groups freezes all parameters from epoch {now} on")


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train."):
    """The training run: how long, and on what loss."""

    epochs: int = 3
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, on all devices together."""
    min_epoch_steps: int = 0
    """Least steps in an epoch: a smaller training set is passed through several times in each."""
    loss: Annotated[str, Choices("cross_entropy", "mse", "focal")] = "cross_entropy"
    """`focal` is cross-entropy with less weight on examples that are predicted well (Lin et al.,
    2017, gamma = 2). FILE.py:NAME is a function of logits [batch, classes] and labels [batch], or
    with mixup or cutmix probabilities [batch, classes], that returns one value per example."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: weigh examples inversely to the number of training images of their class."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target probabilities (Szegedy et al., 2016)."""
    accumulate: int = 1
    """Parts into which a batch is divided, computed one after the other to save memory."""
    remat: bool = False
    """To save memory, keep of each block of the network its result alone and compute its layers
    again in the backward pass, which takes up to as long as one more forward pass."""
    cache_frozen: bool = False
    """Compute the outputs of the frozen layers once per image and keep them in memory. This does
    not change the result. Needs optim.groups and no augmentation."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the variables, which is then evaluated; less in the
    first steps, so that a short run's average is not its start. 0: none."""
    lookahead_steps: int = 0
    """Steps after which training continues from a slow average of the variables, which is also
    what is evaluated (Zhang et al., 2019; Jordan, 2024). 0: never."""
    patience: int = 0
    """Stop after this many epochs in which train.monitor is no better, and keep the best ones'
    parameters. 0: never."""
    monitor: Literal["accuracy", "balanced_accuracy", "macro_f1", "loss"] = "accuracy"
    """The validation figure by which the best epoch is chosen."""
    skip_nonfinite: bool = False
    """Skip and count steps whose loss or gradient is not finite, instead of ending the run."""

    @property
    def reported_kind(self) -> Literal["latest", "best"]:
        """The checkpoint that is evaluated at the end: with early stopping, the best."""
        return "best" if self.patience else "latest"

    def check(self) -> None:
        """Refuses values that are out of range or do not fit together."""
        require(self.epochs >= 0, "train.epochs must be 0 or more")
        require(self.batch_size > 0, "train.batch_size must be positive")
        require(0 <= self.label_smoothing < 1, "train.label_smoothing must be in [0, 1)")
        require(
            self.accumulate > 0 and self.batch_size % self.accumulate == 0,
            "train.accumulate must divide train.batch_size",
        )
        require(0 <= self.ema_decay < 1, "train.ema_decay must be in [0, 1)")
        require(self.lookahead_steps >= 0, "train.lookahead_steps must be 0 (off) or more")
        both = self.ema_decay and self.lookahead_steps
        require(not both, "train.lookahead_steps and train.ema_decay are two averages; set one")
        require(self.patience >= 0, "train.patience must be 0 (off) or more")
        require(self.min_epoch_steps >= 0, "train.min_epoch_steps must be 0 or more")


@dataclass(frozen=True)
class RuntimeConfig(Section, prefix="runtime."):
    """How a run is computed. A run can be resumed with other values of these fields."""

    kernels: Literal["auto", "cpu", "xla"] = "auto"
    """Convolutions, pools and dense layers use this project's CPU kernels (`cpu`) or XLA's own
    operations (`xla`); `auto` is `cpu` on a CPU and `xla` elsewhere. Results agree to rounding."""
    storage: Literal["auto", "memory", "stream"] = "auto"
    """Keep decoded images in memory, or decode photos again whenever they are needed; `auto`
    streams what would fill more than a quarter of the free memory. Results are the same."""
    workers: int = 0
    """Processes that decode streamed photos. 0: threads instead."""
    cache_dir: str = ""
    """The folder of decoded images and compiled programs. Empty: the user's cache folder."""
    seeds: int = 1
    """Number of runs, with seeds from `seed` on, each in a subfolder of the workdir."""
    segment_steps: int = 50
    """Steps that the device runs before the host updates the log and looks for signals. Results do
    not depend on it."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints within an epoch. One more is saved after every epoch."""
    deterministic: bool = False
    """On a GPU, restrict XLA to operations that are deterministic, which may be slower."""

    def check(self) -> None:
        """Refuses values that are out of range."""
        require(self.segment_steps > 0, "runtime.segment_steps must be positive")
        require(self.checkpoint_seconds >= 0, "runtime.checkpoint_seconds must be 0 or more")
        require(self.seeds > 0, "runtime.seeds must be positive")
        require(self.workers >= 0, "runtime.workers must be 0 or more")


@dataclass(frozen=True)
class Config(Section):
    """An experiment. On one machine, equal configs give bitwise equal parameters."""

    name: str = "custom"
    """The named config that this one was made from."""
    seed: int = 0
    """Determines initial parameters, the order of examples, dropout and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def check(self) -> None:
        """Refuses sections that do not fit together."""
        require(0 <= self.seed < 2**32, "seed must be in [0, 2**32)")
        last = self.seed + self.runtime.seeds - 1
        require(
            last < 2**32, f"runtime.seeds={self.runtime.seeds} ends at seed {last}, past 2**32 - 1"
        )
        require(
            not self.train.patience or self.data.validation > 0,
            "train.patience needs a validation split, such as data.validation=0.1",
        )
        if self.train.cache_frozen:
            frozen = any(multiplier is None for _, multiplier in self.optim.groups)
            require(frozen, "train.cache_frozen needs optim.groups that freeze layers")
            fixed = all(not isinstance(m, tuple) for _, m in self.optim.groups)
            require(fixed, "train.cache_frozen needs optim.groups without lists of epochs")
            plain = not self.augment.changes_training
            require(plain, "train.cache_frozen=true allows no augmentation of training images")
