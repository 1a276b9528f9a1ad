"""What an experiment is: frozen dataclasses, dotted overrides, and JSON both ways.

Imports neither JAX nor anything slow, so `--help` and every mistyped flag answer at once.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cnn_jax import files
from cnn_jax.errors import UserError

NOT_OF_A_RUN = ("data.dir", "data.cache_dir", "features.")
"""Where the data lies, and what is done with a run afterwards."""

Groups = tuple[tuple[str, float | None], ...]
"""(pattern, learning-rate multiplier or None) pairs; see `OptimConfig.groups`."""

Decays = tuple[tuple[str, float], ...]
"""(pattern, weight decay) pairs; see `OptimConfig.decays`."""


@dataclass(frozen=True)
class DataConfig:
    """Which images to learn from, and how they are split and scaled."""

    name: str = "digits"
    """`digits` (bundled), `folder` (own photos), or a tfds image-classification data set."""
    dir: str = ""
    """The tfds data_dir, or the folder of photos. Empty: $TFDS_DATA_DIR, else tfds' own default."""
    cache_dir: str = ""
    """Where decoded images are kept. Empty: the user's cache folder."""
    image_size: int = 32
    """Side in pixels that `digits` and `folder` images are scaled to; tfds sets keep their own."""
    classes: tuple[str, ...] = ()
    """Class names to keep, relabelled 0, 1, ... in this order. Empty: all."""
    images_per_class: int = 0
    """Training images kept of each class (chosen by split_seed). 0: all."""
    validation: float = 0.0
    """Fraction of the training images, class by class, set aside for validation."""
    test_fraction: float = 0.2
    """Held-out fraction of each class where the source has no test part (`digits`, `folder`)."""
    split_seed: int = 0
    """Fixes which images are held out or kept, independently of the training seed."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Per-channel mean subtracted from pixels in [0, 1]; the chapter subtracts nothing."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Per-channel divisor, after the mean."""

    def __post_init__(self) -> None:
        _check(8 <= self.image_size <= 1024, "data.image_size must be from 8 to 1024")
        _check(self.images_per_class >= 0, "data.images_per_class must be 0 (all) or more")
        _check(0 <= self.validation < 1, "data.validation must be in [0, 1)")
        _check(0 < self.test_fraction < 1, "data.test_fraction must be in (0, 1)")
        _check(self.split_seed >= 0, "data.split_seed must be 0 or more")
        _check(min(self.std) > 0, "data.std must be positive")
        _check(len(set(self.classes)) == len(self.classes), "data.classes names a class twice")
        _check(len(self.classes) != 1, "data.classes must name two classes or more")


@dataclass(frozen=True)
class AugmentConfig:
    """Changes made to images on the device, all off by default as in the chapter."""

    flip: bool = False
    """Mirror training images left to right with probability 1/2."""
    alternate_flip: bool = False
    """Mirror half of the training images, chosen once, and in every other epoch the other half."""
    translate: int = 0
    """Shift by up to this many pixels in each direction, reflecting at the border."""
    cutout: int = 0
    """Side in pixels of a square hidden in each image (DeVries and Taylor, 2017)."""
    test_time: Literal["none", "mirror", "mirror_translate"] = "none"
    """Wherever a trained network is used, its logits are averaged over the image and its mirror
    image; and with `mirror_translate` over two shifts of both by a pixel, which count half."""

    @property
    def of_training(self) -> bool:
        """Whether training images are changed."""
        return bool(self.flip or self.alternate_flip or self.translate or self.cutout)

    def __post_init__(self) -> None:
        _check(self.translate >= 0, "augment.translate must be 0 or more")
        _check(self.cutout >= 0, "augment.cutout must be 0 or more")
        both = self.flip and self.alternate_flip
        _check(not both, "augment.alternate_flip takes the place of augment.flip")


@dataclass(frozen=True)
class ModelConfig:
    """The network. `models.build` turns it into a linen module."""

    name: Literal["simple_cnn", "vgg", "vgg16", "airbench"] = "simple_cnn"
    """`vgg16` averages the last feature maps to 7x7, as the ImageNet network does; `airbench` is
    the network of Jordan (2024), with BatchNorm."""
    blocks: tuple[tuple[int, ...], ...] = ((50, 50),)
    """Filters of each 3x3 convolution, a tuple per block; each block ends by halving the side, in
    `airbench` after its first convolution."""
    pooling: Literal["max", "average", "stride"] = "max"
    """How it does: by a 2x2 pool, or by moving the block's last convolution by two pixels."""
    dense: tuple[int, ...] = (512,)
    """Units of each hidden dense layer."""
    activation: Literal["relu", "tanh", "sigmoid", "gelu"] = "relu"
    dropout: float = 0.0
    """Probability that a hidden dense unit is dropped in training."""
    initializer: Literal["glorot_uniform", "he_uniform", "narrow_uniform"] = "glorot_uniform"
    """What kernels are drawn from: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), sqrt(6 / fan_in)
    or 0.01."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the arithmetic; parameters are always float32."""

    def __post_init__(self) -> None:
        widths = [*(w for block in self.blocks for w in block), *self.dense]
        _check(all(w > 0 for w in widths), "model.blocks and model.dense must be positive widths")
        _check(
            bool(self.blocks) and all(self.blocks), "model.blocks must hold a convolution in each"
        )
        _check(
            self.name != "simple_cnn" or len(self.blocks) == 1,
            "model.name=simple_cnn has one block; use model.name=vgg for more",
        )
        _check(
            self.name != "airbench" or not self.dense,
            "model.name=airbench has no hidden dense layers; set model.dense=[]",
        )
        default = (ModelConfig.pooling, ModelConfig.initializer)
        _check(
            self.name != "airbench" or (self.pooling, self.initializer) == default,
            "model.name=airbench has pools and initial values of its own; leave model.pooling and "
            "model.initializer out",
        )
        sizes = (*map(len, self.blocks), len(self.dense))
        _check(
            self.name != "vgg16" or sizes == (2, 2, 3, 3, 3, 2),
            "model.name=vgg16 has blocks of 2, 2, 3, 3 and 3 convolutions and two dense layers",
        )
        _check(0 <= self.dropout < 1, "model.dropout must be in [0, 1)")
        _check(
            not self.dropout or bool(self.dense),
            "model.dropout follows the hidden dense layers, and model.dense has none",
        )


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from that are not drawn by the seed."""

    checkpoint: str = ""
    """A run's workdir, a file of VGG16 weights (.safetensors), or hf:REPO of the Hugging Face hub.
    The network, the size of the images and their normalisation come with it unless they are set
    as well. Empty: all parameters start from the seed."""
    kind: Literal["", "latest", "best"] = ""
    """Which parameters of the workdir. Empty: those that its run reported on."""
    skip: tuple[str, ...] = ()
    """Patterns of whole names that start from the seed, such as head/.*; all others must match."""
    whiten: str = ""
    """The first convolution's name, to start it from filters that whiten the training images'
    patches. Empty: it starts as the others do."""

    def __post_init__(self) -> None:
        for pattern in self.skip:
            _check_pattern("init.skip", pattern)
        if not self.checkpoint:
            _check(not self.kind, "init.kind is read only with init.checkpoint")
            _check(not self.skip, "init.skip is read only with init.checkpoint")
        both = self.checkpoint and self.whiten
        _check(not both, "init.whiten would replace what init.checkpoint holds; set one of them")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["momentum", "sgd", "nesterov", "adam", "adamw", "rmsprop"] = "momentum"
    learning_rate: float = 0.01
    """Peak learning rate."""
    momentum: float = 0.9
    """Decay of the velocity of `momentum` and `nesterov`."""
    weight_decay: float = 0.0
    """Decay of kernels, never of biases: decoupled in `adamw`, else added to the gradient."""
    decays: Decays = ()
    """In place of weight_decay, pairs of a pattern and the decay of the parameters that it matches
    whole; the first match wins. Such as [["head/.*",0.001],[".*",0]]."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient. 0: no clipping."""
    schedule: Literal["constant", "cosine", "piecewise", "linear"] = "constant"
    warmup_epochs: float = 0.0
    """Epochs of linear rise to the peak, before any schedule."""
    warmup_fraction: float = 0.0
    """Of the peak, what the rise starts at."""
    final_fraction: float = 0.0
    """Of the peak, what `cosine` and `linear` end at."""
    boundaries: tuple[float, ...] = ()
    """Epochs after which `piecewise` multiplies the rate by `decay_factor`."""
    decay_factor: float = 0.1
    groups: Groups = ()
    """Pairs of a pattern and what the learning rate of the parameters that it matches whole is
    multiplied by, or null to freeze them; the first match wins, and "{last}" is the number of the
    last block. Such as [["head/.*",1],["block{last}/.*",0.1],[".*",null]]. Empty: all at 1."""
    phases: tuple[tuple[int, Groups], ...] = ()
    """Groups by the epoch they hold from: [[0,[["head/.*",1],[".*",null]]],[3,[[".*",0.1]]]]."""

    def __post_init__(self) -> None:
        _check(self.learning_rate > 0, "optim.learning_rate must be positive")
        _check(0 <= self.momentum < 1, "optim.momentum must be in [0, 1)")
        _check(self.weight_decay >= 0, "optim.weight_decay must be 0 or more")
        _check(self.clip_norm >= 0, "optim.clip_norm must be 0 (off) or more")
        _check(self.warmup_epochs >= 0, "optim.warmup_epochs must be 0 or more")
        _check(0 <= self.warmup_fraction <= 1, "optim.warmup_fraction must be in [0, 1]")
        no_rise = self.warmup_fraction and not self.warmup_epochs
        _check(not no_rise, "optim.warmup_fraction is read only with optim.warmup_epochs")
        _check(0 <= self.final_fraction <= 1, "optim.final_fraction must be in [0, 1]")
        _check(0 < self.decay_factor <= 1, "optim.decay_factor must be in (0, 1]")
        rising = all(a < b for a, b in zip((0.0, *self.boundaries), self.boundaries, strict=False))
        _check(rising, "optim.boundaries must be rising numbers of epochs")
        _check(
            not self.boundaries or self.boundaries[0] > self.warmup_epochs,
            "optim.boundaries must lie after optim.warmup_epochs",
        )
        _check_read(self, "momentum", "name", ("momentum", "nesterov"))
        _check_read(self, "final_fraction", "schedule", ("cosine", "linear"))
        _check_read(self, "boundaries", "schedule", ("piecewise",))
        _check_read(self, "decay_factor", "schedule", ("piecewise",))
        _check(
            self.schedule != "piecewise" or bool(self.boundaries),
            "optim.schedule=piecewise needs optim.boundaries, such as [10,15]",
        )
        _check(not (self.groups and self.phases), "optim.phases takes the place of optim.groups")
        epochs = [epoch for epoch, _ in self.phases]
        in_order = not epochs or (epochs[0] == 0 and epochs == sorted(set(epochs)))
        _check(in_order, "optim.phases must start at epoch 0 and then rise")
        if self.groups:
            _check_groups("optim.groups", self.groups)
        for _, groups in self.phases:
            _check_groups("optim.phases", groups)
        both = self.decays and self.weight_decay
        _check(not both, "optim.decays takes the place of optim.weight_decay")
        _check_patterns("optim.decays", [pattern for pattern, _ in self.decays])
        for pattern, decay in self.decays:
            _check(decay >= 0, f"optim.decays: {pattern} needs a decay of 0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """The training run: how long, on what loss, and what is kept of it."""

    epochs: int = 3
    batch_size: int = 64
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    label_smoothing: float = 0.0
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    cache_frozen: bool = False
    """Compute what the layers below the lowest trainable one make of each image once, and keep it
    in memory: the same result, and no step runs them. Needs optim.groups and no augmentation."""
    ema_decay: float = 0.0
    """Decay per step of the averaged variables that are evaluated. 0: no average."""
    lookahead_steps: int = 0
    """Steps after which training goes on from an average of the variables, which grows slower as
    it proceeds and is what is evaluated (Zhang et al., 2019; Jordan, 2024). 0: never."""
    patience: int = 0
    """Stop after so many epochs without a better validation accuracy. 0: never."""
    skip_nonfinite: bool = False
    """Pass over steps whose loss or gradient is not finite, and count them, instead of stopping."""
    deterministic: bool = False
    """On a GPU, let XLA use only kernels that give the same bits every time. Costs speed there."""
    segment_steps: int = 50
    """Steps run on the device between two looks of the host. Changes no result."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints inside an epoch; each epoch's end saves too."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept; the best one is kept beside them."""
    seeds: int = 1
    """Runs, with seeds from `seed` on, in subfolders of the workdir: on several GPUs one on each,
    side by side, and otherwise one after the other."""

    @property
    def reported_kind(self) -> Literal["latest", "best"]:
        """Which of its checkpoints a run reports on: with early stopping, the best."""
        return "best" if self.patience else "latest"

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "train.epochs must be 0 or more")
        _check(self.batch_size > 0, "train.batch_size must be positive")
        _check(0 <= self.label_smoothing < 1, "train.label_smoothing must be in [0, 1)")
        _check(
            self.accumulate > 0 and self.batch_size % self.accumulate == 0,
            "train.accumulate must divide train.batch_size",
        )
        _check(0 <= self.ema_decay < 1, "train.ema_decay must be in [0, 1)")
        _check(self.lookahead_steps >= 0, "train.lookahead_steps must be 0 (off) or more")
        both = self.ema_decay and self.lookahead_steps
        _check(not both, "train.lookahead_steps and train.ema_decay are two averages; set one")
        _check(self.patience >= 0, "train.patience must be 0 (off) or more")
        _check(self.segment_steps > 0, "train.segment_steps must be positive")
        _check(self.checkpoint_seconds >= 0, "train.checkpoint_seconds must be 0 or more")
        _check(self.keep_checkpoints > 0, "train.keep_checkpoints must be positive")
        _check(self.seeds > 0, "train.seeds must be positive")


@dataclass(frozen=True)
class FeaturesConfig:
    """What `--mode=features` takes from a network and what learns from it; changes no run."""

    layer: str = ""
    """The layer whose activations are taken, as the next layer is given them. Empty: what the
    head is given."""
    classifier: Literal["", "svm", "random_forest", "mlp", "logistic", "knn"] = ""
    """Trained on them with scikit-learn. Empty: none, they are only written."""


@dataclass(frozen=True)
class Config:
    """A whole experiment. Two equal configs on one machine give bitwise equal parameters."""

    name: str = "custom"
    """The entry of `configs.CONFIGS` that it was made from."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, "seed must be in [0, 2**32)")
        last = self.seed + self.train.seeds - 1
        _check(last < 2**32, f"train.seeds={self.train.seeds} ends at seed {last}, past 2**32 - 1")
        _check(
            not self.train.patience or self.data.validation > 0,
            "train.patience needs a validation split, such as data.validation=0.1",
        )
        if self.train.cache_frozen:
            frozen = any(multiplier is None for _, multiplier in self.optim.groups)
            _check(frozen, "train.cache_frozen needs optim.groups that freeze layers")
            plain = not self.augment.of_training
            _check(plain, "train.cache_frozen sees each image once; set it to false to augment")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_read(section: OptimConfig, name: str, selector: str, readers: tuple[str, ...]) -> None:
    """Refuses a value that the chosen option would never look at."""
    default = next(f.default for f in dataclasses.fields(section) if f.name == name)
    chosen = getattr(section, selector)
    if getattr(section, name) != default and chosen not in readers:
        allowed = " or ".join(readers)
        raise UserError(f"optim.{name} is read only with optim.{selector}={allowed}, not {chosen}")


def _check_pattern(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field_name}: {pattern} is no pattern: {error}") from None


def _check_patterns(field_name: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        _check_pattern(field_name, pattern)
    _check(len(set(patterns)) == len(patterns), f"{field_name} has a pattern twice")


def _check_groups(field_name: str, groups: Groups) -> None:
    _check_patterns(field_name, [pattern for pattern, _ in groups])
    for pattern, multiplier in groups:
        positive = multiplier is None or multiplier > 0
        _check(positive, f"{field_name}: {pattern} needs a positive multiplier, or null to freeze")
    trains = any(multiplier is not None for _, multiplier in groups)
    _check(trains, f"{field_name} freezes everything; give a group a multiplier")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with each `section.field=value` applied, in order, then checked as a whole.

    Values are read as the field's type; tuples are JSON lists or comma-separated words.

    Raises:
        UserError: an unknown field, a value of another type, or values that do not fit together.
    """
    tree = to_dict(config)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set={override}: expected section.field=value")
        _set(tree, Config, path, text)
    return from_dict(tree)


def _set(tree: dict[str, Any], cls: type, path: str, text: str) -> None:
    names = path.split(".")
    for depth, name in enumerate(names):
        types_by_name = typing.get_type_hints(cls)
        if name not in types_by_name or (cls is Config and name == "name"):
            prefix = ".".join([*names[:depth], ""])
            guess = nearest(path, all_fields()) or nearest(name, types_by_name)
            raise UserError(f"unknown field {prefix}{name}{guess}; --help lists the fields")
        kind = types_by_name[name]
        if dataclasses.is_dataclass(kind):
            if depth == len(names) - 1:
                fields = ", ".join(f.name for f in dataclasses.fields(kind))
                raise UserError(f"{path} is a section; set one of its fields: {fields}")
            tree, cls = tree[name], typing.cast(type, kind)
        elif depth < len(names) - 1:
            raise UserError(f"{'.'.join(names[: depth + 1])} is a value, not a section")
        else:
            tree[name] = _parse(text, kind, path)


def _parse(text: str, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is str or origin is Literal:
        return _convert(text, kind, path)
    if origin is tuple and text[:1] != "[":
        text = json.dumps([word.strip() for word in text.split(",") if word.strip()])
        if typing.get_args(kind)[0] is not str:
            text = text.replace('"', "")
    words = {"True": "true", "False": "false"}
    try:
        value = float(text) if kind is float else json.loads(words.get(text, text))
    except (ValueError, RecursionError):
        value = text
    return _convert(value, kind, path)


def _convert(value: Any, kind: Any, path: str) -> Any:
    """Checks a value that came from text or JSON against a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{path}={value}: expected {'|'.join(args)}{nearest(str(value), args)}")
    if origin is types.UnionType:
        if value is None:
            return None
        kind = next(a for a in args if a is not type(None))
        return _convert(value, kind, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value}: expected a list such as [1,2]")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{path}={value}: expected {len(args)} values")
        kinds = args if args[-1] is not Ellipsis else [args[0]] * len(value)
        return tuple(_convert(v, k, path) for v, k in zip(value, kinds, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:
        raise UserError(f"{path}={value}: expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path}={value}: expected a finite number")
    return value


def all_fields() -> list[str]:
    """Returns the dotted name of every field that an override can set."""
    return [name for name in flatten(Config()) if name != "name"]


def flatten(config: Config) -> dict[str, Any]:
    """Returns every value of `config` by its dotted name."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": v for key, v in value.items()}
        else:
            flat[name] = value
    return flat


def differences(old: Config, new: Config) -> list[str]:
    """Returns "field: old -> new" for each field that differs and that a run depends on."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a[k]} -> {b[k]}" for k in a if a[k] != b[k] and not k.startswith(NOT_OF_A_RUN)]


def to_dict(config: Config) -> dict[str, Any]:
    """Returns `config` as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """Returns the config that `to_dict` came from.

    Raises:
        UserError: a missing, unknown or ill-typed field; every value is checked.
    """
    return _from_dict(tree, Config, "")


def _from_dict(tree: Any, cls: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.') or 'config'} must be an object of fields")
    hints = typing.get_type_hints(cls)
    if odd := set(tree) ^ set(hints):
        names = ", ".join(prefix + name for name in sorted(odd))
        raise UserError(f"config fields missing or unknown: {names}")
    values = {}
    for name, kind in hints.items():
        path = prefix + name
        nested = dataclasses.is_dataclass(kind)
        values[name] = (
            _from_dict(tree[name], kind, path + ".") if nested else _convert(tree[name], kind, path)
        )
    return cls(**values)


def save(config: Config, path: Path) -> None:
    """Writes `config` as indented JSON, as a whole or not at all."""
    files.write(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads a config that `save` wrote.

    Raises:
        UserError: the file is missing, is not JSON, or is not a config of this version.
    """
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is not a workdir") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as a config: {error}") from None
    try:
        return from_dict(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
