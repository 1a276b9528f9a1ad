import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnn_jax import config, configs
from cnn_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from cnn_jax.errors import UserError

HELP = "; --help lists the fields"


def override(*overrides: str, base: Config | None = None) -> Config:
    return config.with_overrides(base or Config(), overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        override(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", list(configs.CONFIGS))
def test_every_config_survives_json(name: str, tmp_path: Path) -> None:
    original = configs.get(name)
    assert original.name == name
    assert config.from_dict(json.loads(json.dumps(config.to_dict(original)))) == original
    config.save(original, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == original
    assert hash(config.load(tmp_path / "config.json")) == hash(original)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "section", "name", "value"),
    [
        ("data.name=cifar10", "data", "name", "cifar10"),
        ("data.dir=a=b", "data", "dir", "a=b"),
        ("data.image_size=64", "data", "image_size", 64),
        ("data.validation=0.1", "data", "validation", 0.1),
        ("data.classes=cat, dog", "data", "classes", ("cat", "dog")),
        ('data.classes=["cat","dog"]', "data", "classes", ("cat", "dog")),
        ("data.classes=1,2", "data", "classes", ("1", "2")),
        ("data.mean=0.1,0.2,0.3", "data", "mean", (0.1, 0.2, 0.3)),
        ("data.mean=[1,2,3]", "data", "mean", (1.0, 2.0, 3.0)),
        ("augment.flip=true", "augment", "flip", True),
        ("augment.flip=True", "augment", "flip", True),
        ("augment.flip=False", "augment", "flip", False),
        ("model.blocks=[[8,16]]", "model", "blocks", ((8, 16),)),
        ("model.dense=10,20", "model", "dense", (10, 20)),
        ("model.dense=", "model", "dense", ()),
        ("optim.learning_rate=1e-3", "optim", "learning_rate", 0.001),
        ("optim.learning_rate=1", "optim", "learning_rate", 1.0),
        ("optim.name=adam", "optim", "name", "adam"),
        (
            'optim.groups=[["head/.*",1],["fc1/.*",0.5],[".*",null]]',
            "optim",
            "groups",
            (("head/.*", 1.0), ("fc1/.*", 0.5), (".*", None)),
        ),
        (
            'optim.phases=[[0,[["head/.*",1],[".*",null]]],[3,[[".*",0.1]]]]',
            "optim",
            "phases",
            ((0, (("head/.*", 1.0), (".*", None))), (3, ((".*", 0.1),))),
        ),
        ("train.loss=mse", "train", "loss", "mse"),
        ("train.checkpoint_seconds=0", "train", "checkpoint_seconds", 0.0),
    ],
)
def test_override(text: str, section: str, name: str, value: Any) -> None:
    changed = override(text)
    found = getattr(getattr(changed, section), name)
    assert found == value
    assert type(found) is type(value)
    default = getattr(Config(), section)
    assert changed == replace(Config(), **{section: replace(default, **{name: value})})


def test_overrides_apply_in_order_and_are_checked_as_a_whole() -> None:
    changed = override("seed=1", "train.patience=2", "data.validation=0.1", "seed=2")
    assert (changed.seed, changed.train.patience, changed.data.validation) == (2, 2, 0.1)
    two_blocks = override("model.blocks=[[1,2],[3]]", "model.name=vgg")
    assert two_blocks.model.blocks == ((1, 2), (3,))
    assert override() == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "--set=seed: expected section.field=value"),
        ("", "--set=: expected section.field=value"),
        ("optim.nam=adam", f"unknown field optim.nam (did you mean optim.name?){HELP}"),
        ("optm.name=adam", f"unknown field optm (did you mean optim.name?){HELP}"),
        ("epochs=3", f"unknown field epochs (did you mean train.epochs?){HELP}"),
        ("zzzzzz=3", f"unknown field zzzzzz{HELP}"),
        ("name=foo", f"unknown field name (did you mean data.name?){HELP}"),
        ("train.epochs.x=1", "train.epochs is a value, not a section"),
        (
            "augment=1",
            "augment is a section; set one of its fields: flip, alternate_flip, translate, "
            "cutout, test_time",
        ),
        ("seed=x", "seed=x: expected int"),
        ("seed=1.5", "seed=1.5: expected int"),
        ("seed=true", "seed=True: expected int"),
        ("train.epochs=", "train.epochs=: expected int"),
        ("augment.flip=yes", "augment.flip=yes: expected bool"),
        ("augment.flip=1", "augment.flip=1: expected bool"),
        ("optim.learning_rate=fast", "optim.learning_rate=fast: expected float"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan: expected a finite number"),
        ("optim.learning_rate=inf", "optim.learning_rate=inf: expected a finite number"),
        (f"data.std=[1{400 * '0'},1,1]", "data.std=inf: expected a finite number"),
        ("data.mean=0.1,0.2", "data.mean=[0.1, 0.2]: expected 3 values"),
        ("data.classes=[1,2]", "data.classes=1: expected str"),
        ("model.blocks=16", "model.blocks=16: expected a list such as [1,2]"),
        ("model.blocks=[1,2]", "model.blocks=1: expected a list such as [1,2]"),
        ('model.blocks=[[1,"x"]]', "model.blocks=x: expected int"),
        (
            "optim.name=adm",
            "optim.name=adm: expected momentum|sgd|nesterov|adam|adamw|rmsprop "
            "(did you mean adam?)",
        ),
        ('optim.groups=[["head/.*"]]', "optim.groups=['head/.*']: expected 2 values"),
        ('optim.groups=[["head/.*","x"]]', "optim.groups=x: expected float"),
        ("train.loss=hinge", "train.loss=hinge: expected cross_entropy|mse"),
    ],
)
def test_mistyped_override(text: str, message: str) -> None:
    assert refusal(text) == message


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
    (DataConfig, {"std": (1.0, 0.0, 1.0)}, "data.std must be positive"),
    (DataConfig, {"classes": ("a", "b", "a")}, "data.classes names a class twice"),
    (DataConfig, {"classes": ("a",)}, "data.classes must name two classes or more"),
    (AugmentConfig, {"translate": -1}, "augment.translate must be 0 or more"),
    (AugmentConfig, {"cutout": -1}, "augment.cutout must be 0 or more"),
    (ModelConfig, {"dense": (0,)}, "model.blocks and model.dense must be positive widths"),
    (ModelConfig, {"blocks": ((4, -1),)}, "model.blocks and model.dense must be positive widths"),
    (ModelConfig, {"blocks": ()}, "model.blocks must hold a convolution in each"),
    (ModelConfig, {"blocks": ((),)}, "model.blocks must hold a convolution in each"),
    (
        ModelConfig,
        {"blocks": ((4,), (4,))},
        "model.name=simple_cnn has one block; use model.name=vgg for more",
    ),
    (ModelConfig, {"dropout": 1.0}, "model.dropout must be in [0, 1)"),
    (ModelConfig, {"dropout": -0.1}, "model.dropout must be in [0, 1)"),
    (
        ModelConfig,
        {"dropout": 0.5, "dense": ()},
        "model.dropout follows the hidden dense layers, and model.dense has none",
    ),
    (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate must be positive"),
    (OptimConfig, {"learning_rate": -0.1}, "optim.learning_rate must be positive"),
    (OptimConfig, {"momentum": 1.0}, "optim.momentum must be in [0, 1)"),
    (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay must be 0 or more"),
    (OptimConfig, {"clip_norm": -1.0}, "optim.clip_norm must be 0 (off) or more"),
    (OptimConfig, {"warmup_epochs": -1.0}, "optim.warmup_epochs must be 0 or more"),
    (OptimConfig, {"final_fraction": 1.1}, "optim.final_fraction must be in [0, 1]"),
    (OptimConfig, {"decay_factor": 0.0}, "optim.decay_factor must be in (0, 1]"),
    (OptimConfig, {"boundaries": (2.0, 1.0)}, "optim.boundaries must be rising numbers of epochs"),
    (OptimConfig, {"boundaries": (0.0,)}, "optim.boundaries must be rising numbers of epochs"),
    (
        OptimConfig,
        {"schedule": "piecewise"},
        "optim.schedule=piecewise needs optim.boundaries, such as [10,15]",
    ),
    (
        OptimConfig,
        {"groups": (("(", 1.0),)},
        "optim.groups: ( is no pattern: missing ), unterminated subpattern at position 0",
    ),
    (
        OptimConfig,
        {"groups": ((".*", 0.0),)},
        "optim.groups: .* needs a positive multiplier, or null to freeze",
    ),
    (
        OptimConfig,
        {"groups": ((".*", None),)},
        "optim.groups freezes everything; give a group a multiplier",
    ),
    (
        OptimConfig,
        {"groups": ((".*", 1.0), (".*", None))},
        "optim.groups has a pattern twice",
    ),
    (
        OptimConfig,
        {"groups": ((".*", 1.0),), "phases": ((0, ((".*", 1.0),)),)},
        "optim.phases takes the place of optim.groups",
    ),
    (
        OptimConfig,
        {"phases": ((1, ((".*", 1.0),)),)},
        "optim.phases must start at epoch 0 and then rise",
    ),
    (
        OptimConfig,
        {"phases": ((0, ((".*", 1.0),)), (0, ((".*", 1.0),)))},
        "optim.phases must start at epoch 0 and then rise",
    ),
    (
        OptimConfig,
        {"phases": ((0, ((".*", -1.0),)),)},
        "optim.phases: .* needs a positive multiplier, or null to freeze",
    ),
    (
        InitConfig,
        {"checkpoint": "runs/x", "skip": ("(",)},
        "init.skip: ( is no pattern: missing ), unterminated subpattern at position 0",
    ),
    (InitConfig, {"kind": "best"}, "init.kind is read only with init.checkpoint"),
    (InitConfig, {"skip": ("head/.*",)}, "init.skip is read only with init.checkpoint"),
    (
        ModelConfig,
        {"name": "vgg16"},
        "model.name=vgg16 has blocks of 2, 2, 3, 3 and 3 convolutions and two dense layers",
    ),
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
        AugmentConfig,
        {"flip": True, "alternate_flip": True},
        "augment.alternate_flip takes the place of augment.flip",
    ),
    (
        ModelConfig,
        {"name": "airbench"},
        "model.name=airbench has no hidden dense layers; set model.dense=[]",
    ),
    *(
        (
            ModelConfig,
            {"name": "airbench", "dense": (), **field},
            "model.name=airbench has pools and initial values of its own; leave model.pooling and "
            "model.initializer out",
        )
        for field in ({"pooling": "average"}, {"initializer": "he_uniform"})
    ),
    (
        InitConfig,
        {"checkpoint": "runs/x", "whiten": "conv1"},
        "init.whiten would replace what init.checkpoint holds; set one of them",
    ),
    (
        OptimConfig,
        {"warmup_fraction": 0.2},
        "optim.warmup_fraction is read only with optim.warmup_epochs",
    ),
    (
        OptimConfig,
        {"warmup_fraction": 1.2, "warmup_epochs": 1.0},
        "optim.warmup_fraction must be in [0, 1]",
    ),
    (
        OptimConfig,
        {"decays": ((".*", 0.1),), "weight_decay": 0.1},
        "optim.decays takes the place of optim.weight_decay",
    ),
    (OptimConfig, {"decays": ((".*", -0.1),)}, "optim.decays: .* needs a decay of 0 or more"),
    (
        OptimConfig,
        {"decays": ((".*", 0.1), (".*", 0.2))},
        "optim.decays has a pattern twice",
    ),
    (TrainConfig, {"patience": -1}, "train.patience must be 0 (off) or more"),
    (TrainConfig, {"segment_steps": 0}, "train.segment_steps must be positive"),
    (TrainConfig, {"checkpoint_seconds": -1.0}, "train.checkpoint_seconds must be 0 or more"),
    (TrainConfig, {"keep_checkpoints": 0}, "train.keep_checkpoints must be positive"),
    (TrainConfig, {"seeds": 0}, "train.seeds must be positive"),
    (
        Config,
        {"seed": 2**32 - 1, "train": TrainConfig(seeds=2)},
        "train.seeds=2 ends at seed 4294967296, past 2**32 - 1",
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
            "optim": OptimConfig(groups=(("head/.*", 1.0), (".*", None))),
            "augment": AugmentConfig(flip=True),
        },
        "train.cache_frozen sees each image once; set it to false to augment",
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
    assert str(caught.value) == message


def test_values_that_nothing_reads_are_refused() -> None:
    assert refusal("optim.name=adam", "optim.momentum=0.5") == (
        "optim.momentum is read only with optim.name=momentum or nesterov, not adam"
    )
    assert refusal("optim.final_fraction=0.1") == (
        "optim.final_fraction is read only with optim.schedule=cosine or linear, not constant"
    )
    assert refusal("optim.boundaries=1,2", "optim.schedule=cosine") == (
        "optim.boundaries is read only with optim.schedule=piecewise, not cosine"
    )
    assert refusal("optim.decay_factor=0.5") == (
        "optim.decay_factor is read only with optim.schedule=piecewise, not constant"
    )
    read = override("optim.schedule=piecewise", "optim.boundaries=1,2", "optim.decay_factor=0.5")
    assert read.optim.boundaries == (1.0, 2.0)
    assert override("optim.name=nesterov", "optim.momentum=0.5").optim.momentum == 0.5


def test_differences() -> None:
    old = configs.get("vgg3")
    assert config.differences(old, old) == []
    new = override("seed=3", "model.dense=8", "data.dir=/a", "data.cache_dir=/b", base=old)
    assert config.differences(old, new) == ["seed: 0 -> 3", "model.dense: (4096, 4096) -> (8,)"]
    assert config.differences(old, configs.get("vgg_dropout")) == [
        "name: vgg3 -> vgg_dropout",
        "model.dropout: 0.0 -> 0.5",
    ]


def test_all_fields_can_be_set() -> None:
    fields = config.all_fields()
    assert "name" not in fields
    assert fields[:2] == ["seed", "data.name"]
    flat = config.flatten(Config())
    assert fields == [name for name in flat if name != "name"]
    for name in fields:
        text = flat[name] if isinstance(flat[name], str) else json.dumps(flat[name])
        assert override(f"{name}={text}") == Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1}, "config fields missing or unknown: x"),
        ({"data": 5}, "data must be an object of fields"),
        ({"seed": "a"}, "seed=a: expected int"),
        ({"augment": {"flip": True}}, "config fields missing or unknown: augment.alternate_flip, "),
        ({"train": None}, "train must be an object of fields"),
    ],
)
def test_from_dict_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.from_dict(config.to_dict(Config()) | change)
    assert str(caught.value).startswith(message)


def test_load_refuses(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def message() -> str:
        with pytest.raises(UserError) as caught:
            config.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "TMP")

    assert message() == "TMP/config.json does not exist: TMP is not a workdir"
    path.write_text("{")
    assert message().startswith("TMP/config.json can't be read as a config: ")
    path.write_bytes(b"\xff\xfe")
    assert message().startswith("TMP/config.json can't be read as a config: ")
    path.write_text("[]")
    assert message() == "TMP/config.json: config must be an object of fields"
    path.write_text(json.dumps(config.to_dict(Config()) | {"seed": 0.5}))
    assert message() == "TMP/config.json: seed=0.5: expected int"


def test_a_save_that_fails_leaves_the_old_config(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    config.save(Config(), path)

    def fill_up(self: Path, text: str) -> None:
        self.write_bytes(text.encode()[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_up)
    with pytest.raises(OSError, match="No space left"):
        config.save(override("seed=1"), path)
    assert config.load(path) == Config()


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("vgg4", " (did you mean vgg3?)"),
        ("simple", " (did you mean simple_cnn?)"),
        ("vgg_droput", " (did you mean vgg_dropout?)"),
        ("zzz", ""),
    ],
)
def test_unknown_config(name: str, guess: str) -> None:
    with pytest.raises(UserError) as caught:
        configs.get(name)
    known = ", ".join(configs.CONFIGS)
    assert str(caught.value) == f"unknown config {name}{guess}; known: {known}"


def test_listing_has_a_line_for_each() -> None:
    lines = configs.listing().splitlines()
    assert [line.split()[0] for line in lines] == list(configs.CONFIGS)
    assert "  simple_cnn          Listing 6-1: two convolutions, 3 epochs. Chapter: 64%." in lines
    assert all(len(line.split()) > 3 for line in lines)


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
    assert chosen.data == DataConfig(name="cifar10", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (chosen.data.validation, chosen.data.images_per_class, chosen.data.classes) == (0, 0, ())
    assert chosen.augment == AugmentConfig(flip=False, translate=0, cutout=0)
    # Constant 0.01 with momentum 0.9, no decay, batches of 64, mean cross-entropy.
    optim, train = chosen.optim, chosen.train
    assert (optim.name, optim.learning_rate, optim.momentum) == ("momentum", 0.01, 0.9)
    assert (optim.schedule, optim.weight_decay, optim.clip_norm) == ("constant", 0.0, 0.0)
    assert optim.warmup_epochs == 0.0
    assert (train.batch_size, train.loss, train.accumulate) == (64, "cross_entropy", 1)
    assert (train.label_smoothing, train.ema_decay, train.patience) == (0.0, 0.0, 0)


def test_hyper_parameters_of_airbench() -> None:
    """Those of the mean loss; the rate of norms is 64 * 1.5 = 96."""
    chosen = configs.get("airbench")
    assert chosen.data.mean == (0.4914, 0.4822, 0.4465)
    assert chosen.data.std == (0.2470, 0.2435, 0.2616)
    assert chosen.augment == AugmentConfig(
        flip=False, alternate_flip=True, translate=2, cutout=0, test_time="mirror_translate"
    )
    assert chosen.init.whiten == "whiten"
    optim, train = chosen.optim, chosen.train
    assert (optim.name, optim.learning_rate, optim.momentum) == ("nesterov", 1.5, 0.85)
    assert (optim.schedule, optim.warmup_epochs) == ("linear", 2.3)
    assert (optim.warmup_fraction, optim.final_fraction) == (0.2, 0.07)
    assert optim.decays == ((".*norm./bias", 2.079e-5), (".*", 1.330e-3))
    norms, others = (".*norm./bias", 64.0), (".*", 1.0)
    assert optim.phases == (
        (0, (("whiten/kernel", None), norms, others)),
        (3, (("whiten/.*", None), norms, others)),
    )
    assert (train.epochs, train.batch_size, train.label_smoothing) == (10, 1024, 0.2)
    assert (train.lookahead_steps, train.ema_decay) == (5, 0.0)


def test_help_needs_nothing_heavy() -> None:
    script = (
        "import sys, cnn_jax.config, cnn_jax.configs\n"
        "text = cnn_jax.configs.listing()\n"
        "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'flax', 'numpy', 'sklearn'}\n"
        "print(bool(text), sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "True []\n"
