"""The sections and the named configs: what they hold, and what they refuse."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn_jax import configs, fields
from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from cnn_jax.errors import UserError


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_values_from_python_take_the_fields_types() -> None:
    given: dict[str, Any] = {"blocks": [[8, 8], [16]], "dropout": np.float64(0.5), "dense": [4]}
    model = ModelConfig(name="vgg", **given)
    assert model == ModelConfig(name="vgg", blocks=((8, 8), (16,)), dropout=0.5, dense=(4,))
    assert type(model.dropout) is float
    hash(model)
    optim = OptimConfig(learning_rate=1, groups=[["a", 1], [".*", [[0, None], [2, 1]]]])  # pyright: ignore
    assert optim.groups == (("a", 1.0), (".*", ((0, None), (2, 1.0))))
    assert type(optim.learning_rate) is float
    assert type(OptimConfig(weight_decay=0).weight_decay) is float
    assert OptimConfig(schedule=[[3, 0.5]]).schedule == ((3.0, 0.5),)  # pyright: ignore
    hash(optim)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Config, {"seed": 1.5}, "seed=1.5: expected an integer"),
        (Config, {"seed": True}, "seed=true: expected an integer"),
        (Config, {"data": 5}, "data must be a DataConfig"),
        (Config, {"data": AugmentConfig()}, "data must be a DataConfig"),
        (DataConfig, {"dir": Path("x")}, "data.dir=x: expected text"),
        (DataConfig, {"classes": "cat"}, 'data.classes=cat: expected a list such as ["a","a"]'),
        (DataConfig, {"validation": "0.1"}, "data.validation=0.1: expected a number"),
        (DataConfig, {"validation": True}, "data.validation=true: expected a number"),
        (
            DataConfig,
            {"normalize": ((0, 0), (1, 1))},
            "data.normalize=[[0,0],[1,1]]: expected a list such as [[0.5,0.5,0.5],[0.5,0.5,0.5]]",
        ),
        (AugmentConfig, {"flip": True}, "augment.flip=true: expected none|random|alternate"),
        (
            ModelConfig,
            {"activation": "swish"},
            "model.activation=swish: expected relu|tanh|sigmoid|gelu",
        ),
        (
            ModelConfig,
            {"activation": ["relu"]},
            'model.activation=["relu"]: expected relu|tanh|sigmoid|gelu (did you mean relu?)',
        ),
        (
            ModelConfig,
            {"name": "vgg61"},
            "model.name=vgg61: expected simple_cnn|vgg|vgg16|airbench|airbench_residual|"
            "resnet_small|resnet18|resnet34|resnet50|"
            "efficientnet_lite0|efficientnet_lite1|efficientnet_lite2 "
            "(did you mean vgg16?)",
        ),
        (TrainConfig, {"skip_nonfinite": 1}, "train.skip_nonfinite=1: expected true|false"),
        (TrainConfig, {"epochs": None}, "train.epochs=null: expected an integer"),
        (
            TrainConfig,
            {"loss": "my_loss:focal"},
            "train.loss=my_loss:focal: expected cross_entropy|mse|focal (did you mean focal?)",
        ),
        (
            OptimConfig,
            {"learning_rate": float("nan")},
            "optim.learning_rate=nan: expected a finite number",
        ),
        (
            OptimConfig,
            {"learning_rate": 10**400},
            "optim.learning_rate=inf: expected a finite number",
        ),
        (
            OptimConfig,
            {"groups": ((".*", "1"),)},
            "optim.groups=1: expected a number",
        ),
        (
            OptimConfig,
            {"schedule": "step"},
            "optim.schedule=step: expected constant|cosine|linear",
        ),
        (
            OptimConfig,
            {"schedule": 1},
            "optim.schedule=1: expected constant|cosine|linear",
        ),
        (
            RuntimeConfig,
            {"kernels": "gpu"},
            "runtime.kernels=gpu: expected auto|cpu|xla (did you mean cpu?)",
        ),
    ],
)
def test_values_of_another_type_are_refused(
    section: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        section(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("section", "name"),
    [(ModelConfig, "name"), (OptimConfig, "name"), (TrainConfig, "loss"), (DataConfig, "name")],
)
def test_files_of_the_user_s_own_are_names(section: type, name: str) -> None:
    value = "../my dir/my_file.py:thing"
    assert getattr(section(**{name: value}), name) == value


OUT_OF_RANGE: list[tuple[type, dict[str, Any], str]] = [
    (Config, {"seed": -1}, "seed must be in [0, 2**32)"),
    (Config, {"seed": 2**32}, "seed must be in [0, 2**32)"),
    (DataConfig, {"image_size": 7}, "data.image_size must be from 8 to 1024"),
    (DataConfig, {"image_size": 1025}, "data.image_size must be from 8 to 1024"),
    (DataConfig, {"images_per_class": -1}, "data.images_per_class must be 0 (all) or more"),
    (DataConfig, {"validation": 1.0}, "data.validation must be in [0, 1)"),
    (DataConfig, {"validation": -0.1}, "data.validation must be in [0, 1)"),
    (DataConfig, {"test_fraction": 0.0}, "data.test_fraction must be in (0, 1)"),
    (DataConfig, {"test_fraction": 1.0}, "data.test_fraction must be in (0, 1)"),
    (DataConfig, {"split_seed": -1}, "data.split_seed must be 0 or more"),
    (
        DataConfig,
        {"normalize": ((0, 0, 0), (1, 0, 1))},
        "data.normalize needs positive standard deviations",
    ),
    (DataConfig, {"classes": ("a", "b", "a")}, "data.classes names a class twice"),
    (DataConfig, {"classes": ("a",)}, "data.classes must name two classes or more"),
    (AugmentConfig, {"translate": -1}, "augment.translate must be 0 or more"),
    (AugmentConfig, {"cutout": -1}, "augment.cutout must be 0 or more"),
    (
        AugmentConfig,
        {"cutout_inside": True},
        "augment.cutout_inside is read only with augment",
    ),
    (ModelConfig, {"dense": (0,)}, "model.blocks and model.dense must be positive widths"),
    (ModelConfig, {"blocks": ((4, -1),)}, "model.blocks and model.dense must be positive widths"),
    (ModelConfig, {"blocks": ((),)}, "model.blocks must have widths in each block"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout must be in [0, 1)"),
    (ModelConfig, {"dropout": -0.1}, "model.dropout must be in [0, 1)"),
    (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate must be positive"),
    (OptimConfig, {"learning_rate": -0.1}, "optim.learning_rate must be positive"),
    (OptimConfig, {"momentum": 1.0}, "optim.momentum must be in [0, 1)"),
    (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay must be 0 or more"),
    (OptimConfig, {"muon": ("a(", 0.9, 5)}, "optim.muon: invalid regular expression a("),
    (
        OptimConfig,
        {"muon": ("a", 1.0, 5)},
        "optim.muon must have a decay of the velocity in [0, 1)",
    ),
    (OptimConfig, {"muon": ("a", 0.9, 0)}, "optim.muon must have 1 Newton-Schulz step or more"),
    (OptimConfig, {"renormalize": "a("}, "optim.renormalize: invalid regular expression a("),
    (OptimConfig, {"clip_norm": -1.0}, "optim.clip_norm must be 0 (off) or more"),
    (OptimConfig, {"warmup_epochs": -1.0}, "optim.warmup_epochs must be 0 or more"),
    (OptimConfig, {"ends": (0.0, 1.1)}, "optim.ends must be in [0, 1]"),
    (OptimConfig, {"ends": (-0.1, 0.0)}, "optim.ends must be in [0, 1]"),
    (OptimConfig, {"schedule": ((2.0, 0.0),)}, "optim.schedule must have factors in (0, 1]"),
    (OptimConfig, {"schedule": ((2.0, 1.5),)}, "optim.schedule must have factors in (0, 1]"),
    *(
        (
            OptimConfig,
            {"schedule": steps},
            "optim.schedule must have rising numbers of epochs, such as [[10,0.1],[15,0.1]]",
        )
        for steps in ((), ((2.0, 0.1), (1.0, 0.1)), ((0.0, 0.1),))
    ),
    (
        OptimConfig,
        {"schedule": ((1.0, 0.1),), "warmup_epochs": 1},
        "optim.schedule must begin after the warm-up",
    ),
    (
        OptimConfig,
        {"groups": (("(", 1.0),)},
        "optim.groups: invalid regular expression (: "
        "missing ), unterminated subpattern at position 0",
    ),
    *(
        (
            OptimConfig,
            {"groups": ((".*", multiplier),)},
            "optim.groups: .* must have a positive multiplier, or null to freeze",
        )
        for multiplier in (0.0, -1.0, ((0, 0.0), (2, 1.0)), ((0, None), (2, 0.0)))
    ),
    *(
        (
            OptimConfig,
            {"groups": (("a", 1.0), (".*", multiplier))},
            "optim.groups: .* must have rising epochs from 0 on, such as [[0,null],[3,0.1]]",
        )
        for multiplier in ((), ((1, 1.0),), ((0, 1.0), (0, 1.0)), ((0, 1.0), (5, 0.5), (3, 1.0)))
    ),
    (OptimConfig, {"groups": ((".*", None),)}, "optim.groups freezes all parameters from epoch 0"),
    (
        OptimConfig,
        {"groups": (("a", ((0, None), (4, 1.0))), (".*", ((0, 1.0), (2, None), (4, 1.0))))},
        "optim.groups freezes all parameters from epoch 2 on",
    ),
    (OptimConfig, {"groups": ((".*", 1.0), (".*", None))}, "optim.groups has a pattern twice"),
    (
        InitConfig,
        {"checkpoint": "runs/x", "skip": ("(",)},
        "init.skip: invalid regular expression (: missing ), unterminated subpattern at position 0",
    ),
    (InitConfig, {"skip": ("head/.*",)}, "init.skip is read only with init.checkpoint"),
    (TrainConfig, {"epochs": -1}, "train.epochs must be 0 or more"),
    (TrainConfig, {"batch_size": 0}, "train.batch_size must be positive"),
    (TrainConfig, {"label_smoothing": 1.0}, "train.label_smoothing must be in [0, 1)"),
    (TrainConfig, {"accumulate": 0}, "train.accumulate must divide train.batch_size"),
    (TrainConfig, {"accumulate": 3}, "train.accumulate must divide train.batch_size"),
    (TrainConfig, {"ema_decay": 1.0}, "train.ema_decay must be in [0, 1)"),
    (TrainConfig, {"lookahead_steps": -1}, "train.lookahead_steps must be 0 (off) or more"),
    (
        TrainConfig,
        {"lookahead_steps": 5, "ema_decay": 0.9},
        "train.lookahead_steps and train.ema_decay are two averages; set one",
    ),
    (
        InitConfig,
        {"checkpoint": "runs/x", "whiten": "conv1"},
        "init.whiten would overwrite parameters of init.checkpoint; set only one",
    ),
    (
        OptimConfig,
        {"weight_decay": ((".*", -0.1),)},
        "optim.weight_decay: .* needs a decay of 0 or more",
    ),
    (
        OptimConfig,
        {"weight_decay": ((".*", 0.1), (".*", 0.2))},
        "optim.weight_decay has a pattern twice",
    ),
    (TrainConfig, {"patience": -1}, "train.patience must be 0 (off) or more"),
    (RuntimeConfig, {"segment_steps": 0}, "runtime.segment_steps must be positive"),
    (RuntimeConfig, {"checkpoint_seconds": -1.0}, "runtime.checkpoint_seconds must be 0 or more"),
    (RuntimeConfig, {"seeds": 0}, "runtime.seeds must be positive"),
    (
        Config,
        {"seed": 2**32 - 1, "runtime": RuntimeConfig(seeds=2)},
        "runtime.seeds=2 ends at seed 4294967296, past 2**32 - 1",
    ),
    (
        Config,
        {"train": TrainConfig(cache_frozen=True), "optim": OptimConfig(groups=((".*", 1.0),))},
        "train.cache_frozen needs optim.groups that freeze layers",
    ),
    (
        Config,
        {
            "train": TrainConfig(cache_frozen=True),
            "optim": OptimConfig(groups=(("a", None), (".*", ((0, 1.0), (1, 0.5))))),
        },
        "train.cache_frozen needs optim.groups without lists of epochs",
    ),
    (
        Config,
        {
            "train": TrainConfig(cache_frozen=True),
            "optim": OptimConfig(groups=(("head/.*", 1.0), (".*", None))),
            "augment": AugmentConfig(flip="random"),
        },
        "train.cache_frozen=true allows no augmentation of training images",
    ),
    (
        Config,
        {"train": TrainConfig(patience=1)},
        "train.patience needs a validation split, such as data.validation=0.1",
    ),
]


@pytest.mark.parametrize(("section", "values", "message"), OUT_OF_RANGE)
def test_out_of_range(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        section(**values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "adam", "momentum": 0.5},
            "optim.momentum is read only with optim.name=momentum, nesterov or muon, not adam",
        ),
        (
            {"muon": ("fc1/kernel", 0.9, 5)},
            "optim.muon is read only with optim.name=muon, not momentum",
        ),
        (
            {"groups": (("a", ((0, 1.0), (2, 0.0))), (".*", 1.0))},
            "optim.groups: a: the end 0 is read only with optim.schedule=cosine or linear",
        ),
        (
            {"ends": (0.0, 0.1)},
            "optim.ends: the end 0.1 is read only with optim.schedule=cosine or linear",
        ),
        (
            {"ends": (0.2, 0.0)},
            "optim.ends: the start 0.2 is read only with optim.warmup_epochs",
        ),
    ],
)
def test_values_that_nothing_reads_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        OptimConfig(**values)
    assert str(caught.value) == message


def test_values_that_are_read_are_allowed() -> None:
    OptimConfig(name="nesterov", momentum=0.5)
    OptimConfig(name="my_file.py:lion", momentum=0.5)
    OptimConfig(schedule="linear", warmup_epochs=1.0, ends=(0.2, 0.1))
    ModelConfig(name="my_file.py:Net", dense=(), dropout=0.5)
    # Which networks there can be is for the functions that build them.
    ModelConfig(name="simple_cnn", blocks=((4,), (4,)))


@pytest.mark.parametrize("name", list(configs.CONFIGS))
def test_every_config_survives_json(name: str, tmp_path: Path) -> None:
    original = configs.get(name)
    assert original.name == name
    assert fields.from_dict(json.loads(json.dumps(fields.to_dict(original)))) == original
    fields.save(original, tmp_path / "config.json")
    assert fields.load(tmp_path / "config.json") == original
    assert configs.get(str(tmp_path / "config.json")) == original
    assert hash(fields.load(tmp_path / "config.json")) == hash(original)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("simpel_cnn", " (did you mean simple_cnn?)"),
        ("vgg_droput", " (did you mean vgg_dropout?)"),
        ("zzz", ""),
    ],
)
def test_unknown_config(name: str, guess: str) -> None:
    with pytest.raises(UserError) as caught:
        configs.get(name)
    known = ", ".join(configs.CONFIGS)
    message = f"unknown config {name}{guess}; known: {known}, FILE.py:NAME or FILE.json"
    assert str(caught.value) == message


def test_configs_in_a_file_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from cnn_jax.config import Config, TrainConfig\n"
        "fixed = Config(name='fixed', train=TrainConfig(loss='other.py:loss'))\n"
        "def made():\n    return Config(name='made', seed=3)\n"
        "def wrong():\n    return {'seed': 3}\n"
    )
    assert configs.get(f"{file}:made") == Config(name="made", seed=3)
    assert configs.get(f"{file}:fixed").train.loss == "other.py:loss"
    for name in ("wrong", "TrainConfig"):
        with pytest.raises(UserError, match=f"mine.py:{name} must be a Config or return one"):
            configs.get(f"{file}:{name}")
    with pytest.raises(UserError, match=r"has no mde \(did you mean made\?\)"):
        configs.get(f"{file}:mde")


def test_listing_has_a_line_for_each() -> None:
    listing = dict(configs.listing())
    assert list(listing) == list(configs.CONFIGS)
    assert listing["simple_cnn"] == "Listing 6-1: two convolutions, 3 epochs. Chapter: 64%."
    assert all(line.endswith(".") or "%" in line for line in listing.values())


CHAPTER = {
    # name: (network, convolutions, hidden units, dropout, epochs), from listings 6-1, 6-11 to 6-14
    "simple_cnn": ("simple_cnn", ((50, 50),), (512,), 0.0, 3),
    "vgg1": ("vgg", ((64, 64),), (4096, 4096), 0.0, 20),
    "vgg2": ("vgg", ((64, 64), (128, 128)), (4096, 4096), 0.0, 10),
    "vgg3": ("vgg", ((64, 64), (128, 128), (256, 256, 256)), (4096, 4096), 0.0, 10),
    "vgg_dropout": ("vgg", ((64, 64), (128, 128), (256, 256, 256)), (4096, 4096), 0.5, 10),
}


@pytest.mark.parametrize("name", list(CHAPTER))
def test_hyper_parameters_of_the_chapter(name: str) -> None:
    chosen = configs.get(name)
    model = chosen.model
    assert CHAPTER[name] == (
        model.name,
        model.blocks,
        model.dense,
        model.dropout,
        chosen.train.epochs,
    )
    assert (model.activation, model.dtype) == ("relu", "float32")
    # CIFAR-10, pixels / 255 and nothing more, no augmentation.
    plain = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert chosen.data == DataConfig(name="cifar10", normalize=plain)
    assert (chosen.data.validation, chosen.data.images_per_class, chosen.data.classes) == (0, 0, ())
    assert chosen.augment == AugmentConfig(flip="none", translate=0, cutout=0)
    # Constant 0.01 with momentum 0.9, no decay, batches of 64, mean cross-entropy.
    optim, train = chosen.optim, chosen.train
    assert (optim.name, optim.learning_rate, optim.momentum) == ("momentum", 0.01, 0.9)
    assert (optim.schedule, optim.weight_decay, optim.clip_norm) == ("constant", 0.0, 0.0)
    assert optim.warmup_epochs == 0.0
    assert (train.batch_size, train.loss, train.accumulate) == (64, "cross_entropy", 1)
    assert (train.label_smoothing, train.ema_decay, train.patience) == (0.0, 0.0, 0)


CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def test_hyper_parameters_of_airbench() -> None:
    """Those of the mean loss; the rate of norms is 64 * 1.5 = 96."""
    chosen = configs.get("airbench")
    assert chosen.data.normalize == CIFAR10
    assert chosen.augment == AugmentConfig(
        flip="alternate", translate=2, cutout=0, test_time="mirror_translate"
    )
    assert chosen.init.whiten == "whiten"
    optim, train = chosen.optim, chosen.train
    assert (optim.name, optim.learning_rate, optim.momentum) == ("nesterov", 1.5, 0.85)
    assert (optim.schedule, optim.warmup_epochs, optim.ends) == ("linear", 2.3, (0.2, 0.07))
    assert optim.weight_decay == ((".*norm./bias", 2.079e-5), (".*", 1.330e-3))
    assert optim.groups == (
        ("whiten/kernel", None),
        ("whiten/bias", ((0, 1.0), (3, None))),
        (".*norm./bias", 64.0),
        (".*", 1.0),
    )
    assert (train.epochs, train.batch_size, train.label_smoothing) == (10, 1024, 0.2)
    assert (train.lookahead_steps, train.ema_decay) == (5, 0.0)


def test_hyper_parameters_of_resnet_small() -> None:
    chosen = configs.get("resnet_small")
    assert chosen.data == DataConfig(name="cifar10", normalize=CIFAR10)
    assert chosen.augment == AugmentConfig(flip="random", translate=4)
    assert chosen.model == ModelConfig(
        name="resnet_small", blocks=((16, 16), (32, 32), (64, 64)), dense=()
    )
    assert chosen.optim == OptimConfig(
        name="momentum", learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine"
    )
    assert chosen.train == TrainConfig(epochs=20, batch_size=128)


def test_the_fine_tuning_configs_differ_in_what_they_train() -> None:
    head = ("head/.*", 1.0)
    groups = {
        "finetune_head": (head, (".*", None)),
        "finetune_last_block": (head, ("{last}/.*", 0.1), (".*", None)),
        "finetune_all": (head, (".*", 0.1)),
        "finetune_gradual": (
            head,
            ("{last}/.*", ((0, None), (3, 0.1))),
            (".*", ((0, None), (6, 0.1))),
        ),
    }
    for name, expected in groups.items():
        chosen = configs.get(name)
        assert chosen.optim.groups == expected
        assert chosen.init == InitConfig(checkpoint="runs/vgg3", skip=("head/.*",))
        base = configs.get("finetune_all")
        assert replace(chosen.optim, groups=base.optim.groups) == base.optim
    assert configs.get("finetune_head").train.cache_frozen


def test_configs_need_nothing_heavy() -> None:
    script = (
        "import sys, cnn_jax.command\n"
        "text = cnn_jax.command.help_text()\n"
        "heavy = {'jax', 'tensorflow', 'flax', 'numpy', 'sklearn', 'rich'}\n"
        "print(bool(text), sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "True []\n"
