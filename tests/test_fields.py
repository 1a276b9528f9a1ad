"""Fields by their dotted names: from text, compared, and in JSON of this version and of 0.1.0."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cnn_jax
from cnn_jax import configs, fields, upgrade, values
from cnn_jax.config import Config, ModelConfig, OptimConfig, RuntimeConfig
from cnn_jax.errors import UserError

HELP = "; --help lists the fields"


def change(*texts: str, base: Config | None = None) -> Config:
    pairs = (text.partition("=") for text in texts)
    return fields.with_values(base or Config(), {name: value for name, _, value in pairs})


def refusal(*texts: str) -> str:
    with pytest.raises(UserError) as caught:
        change(*texts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "section", "name", "value"),
    [
        ("data.name=cifar10", "data", "name", "cifar10"),
        ("data.dir=a=b", "data", "dir", "a=b"),
        ("data.dir=[1]", "data", "dir", "[1]"),
        ("data.image_size=64", "data", "image_size", 64),
        ("data.validation=0.1", "data", "validation", 0.1),
        ("data.classes=cat, dog", "data", "classes", ("cat", "dog")),
        ('data.classes=["cat","dog"]', "data", "classes", ("cat", "dog")),
        ("data.classes=1,2", "data", "classes", ("1", "2")),
        (
            "data.normalize=[[0,1,2],[0.5,1,2]]",
            "data",
            "normalize",
            ((0.0, 1.0, 2.0), (0.5, 1.0, 2.0)),
        ),
        ("augment.flip=random", "augment", "flip", "random"),
        ("model.blocks=[[8,16]]", "model", "blocks", ((8, 16),)),
        ("model.dense=10,20", "model", "dense", (10, 20)),
        ("model.dense=", "model", "dense", ()),
        ("model.name=my_net.py:Net", "model", "name", "my_net.py:Net"),
        ("optim.learning_rate=1e-3", "optim", "learning_rate", 0.001),
        ("optim.learning_rate=1", "optim", "learning_rate", 1.0),
        ("optim.name=adam", "optim", "name", "adam"),
        ("optim.weight_decay=0.1", "optim", "weight_decay", 0.1),
        ("optim.weight_decay=1", "optim", "weight_decay", 1.0),
        (
            'optim.weight_decay=[["head/.*",0.1],[".*",0]]',
            "optim",
            "weight_decay",
            (("head/.*", 0.1), (".*", 0.0)),
        ),
        ("optim.schedule=cosine", "optim", "schedule", "cosine"),
        ("optim.schedule=[[10,0.1],[15,0.5]]", "optim", "schedule", ((10.0, 0.1), (15.0, 0.5))),
        (
            'optim.groups=[["head/.*",1],["fc1/.*",[[0,null],[3,0.5]]],[".*",null]]',
            "optim",
            "groups",
            (("head/.*", 1.0), ("fc1/.*", ((0, None), (3, 0.5))), (".*", None)),
        ),
        ("train.loss=mse", "train", "loss", "mse"),
        ("train.skip_nonfinite=true", "train", "skip_nonfinite", True),
        ("train.skip_nonfinite=True", "train", "skip_nonfinite", True),
        ("train.skip_nonfinite=False", "train", "skip_nonfinite", False),
        ("runtime.checkpoint_seconds=0", "runtime", "checkpoint_seconds", 0.0),
    ],
)
def test_a_field_is_read_from_text(text: str, section: str, name: str, value: Any) -> None:
    changed = change(text)
    found = getattr(getattr(changed, section), name)
    assert found == value
    assert type(found) is type(value)
    default = getattr(Config(), section)
    assert changed == replace(Config(), **{section: replace(default, **{name: value})})


def test_fields_are_checked_together() -> None:
    changed = change("seed=1", "train.patience=2", "data.validation=0.1")
    assert (changed.seed, changed.train.patience, changed.data.validation) == (1, 2, 0.1)
    assert change() == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.nam=adam", f"unknown field optim.nam (did you mean optim.name?){HELP}"),
        ("optm.name=adam", f"unknown field optm.name (did you mean optim.name?){HELP}"),
        ("optim.lr=1", f"unknown field optim.lr (did you mean optim.learning_rate?){HELP}"),
        ("train.lr=1", f"unknown field train.lr (did you mean optim.learning_rate?){HELP}"),
        ("epochs=3", f"unknown field epochs (did you mean train.epochs?){HELP}"),
        ("zzzzzz=3", f"unknown field zzzzzz{HELP}"),
        ("=3", f"unknown field {HELP}"),
        ("name=foo", f"unknown field name (did you mean data.name?){HELP}"),
        ("train.epochs.x=1", f"unknown field train.epochs.x (did you mean train.epochs?){HELP}"),
        ("seed=x", "seed=x: expected an integer"),
        ("seed=1.5", "seed=1.5: expected an integer"),
        ("seed=true", "seed=true: expected an integer"),
        ("train.epochs=", "train.epochs=: expected an integer"),
        ("train.skip_nonfinite=yes", "train.skip_nonfinite=yes: expected true|false"),
        ("train.skip_nonfinite=1", "train.skip_nonfinite=1: expected true|false"),
        ("optim.learning_rate=fast", "optim.learning_rate=fast: expected a number"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan: expected a finite number"),
        ("optim.learning_rate=inf", "optim.learning_rate=inf: expected a finite number"),
        (f"optim.ends=[1{400 * '0'},0]", "optim.ends=inf: expected a finite number"),
        ("optim.ends=0.1", "optim.ends=[0.1]: expected a list such as [0.5,0.5]"),
        ("data.classes=[1,2]", "data.classes=1: expected text"),
        (
            "model.blocks=16",
            "model.blocks=[16]: expected a list such as [[1,1],[1,1]] (did you mean [[16]]?)",
        ),
        (
            "model.blocks=[1,2]",
            "model.blocks=[1,2]: expected a list such as [[1,1],[1,1]] (did you mean [[1,2]]?)",
        ),
        (
            "model.blocks=50,60",
            "model.blocks=[50,60]: expected a list such as [[1,1],[1,1]] (did you mean [[50,60]]?)",
        ),
        ("model.dense=[[3]]", "model.dense=[[3]]: expected a list such as [1,1]"),
        ('model.blocks=[[1,"x"]]', "model.blocks=x: expected an integer"),
        ("model.blocks=[[1", "model.blocks=[[1: expected a list such as [[1,1],[1,1]]"),
        (
            "optim.name=adm",
            "optim.name=adm: expected momentum|sgd|nesterov|adam|adamw|rmsprop|muon "
            "(did you mean adam?)",
        ),
        (
            "optim.schedule=cosin",
            "optim.schedule=cosin: expected constant|cosine|linear (did you mean cosine?)",
        ),
        (
            'optim.groups=[["head/.*"]]',
            'optim.groups=[["head/.*"]]: expected a list such as [["a",0.5],["a",0.5]]',
        ),
        (
            'optim.groups=["head/.*",1]',
            'optim.groups=["head/.*",1]: expected a list such as [["a",0.5],["a",0.5]] '
            '(did you mean [["head/.*",1.0]]?)',
        ),
        (
            "optim.schedule=[10,0.1]",
            "optim.schedule=[10,0.1]: expected a list such as [[0.5,0.5],[0.5,0.5]] "
            "(did you mean [[10.0,0.1]]?)",
        ),
        ("train.loss=hinge", "train.loss=hinge: expected cross_entropy|mse|focal"),
    ],
)
def test_mistyped_text_is_refused(text: str, message: str) -> None:
    assert refusal(text) == message


def test_every_field_has_documentation_and_is_read_from_its_own_text() -> None:
    found = fields.all_fields()
    assert len(found) == 71
    assert list(found)[:2] == ["seed", "data.name"]
    assert "name" not in found
    flat = fields.flatten(Config())
    assert list(found) == [name for name in flat if name != "name"]
    for name, field in found.items():
        assert field.name == name
        assert re.fullmatch(r"\S.*[.\w*]", field.doc), name
        assert field.default == flat[name]
        assert field.section in ("", *fields.sections())
        assert change(f"{name}={values.to_text(flat[name])}") == Config()


def test_differences_are_those_that_change_a_result() -> None:
    old = configs.get("vgg3")
    assert fields.differences(old, old) == []
    other_runtime = RuntimeConfig(kernels="xla", cache_dir="/b", seeds=3, segment_steps=7)
    moved = replace(old, name="x", data=replace(old.data, dir="/a"), runtime=other_runtime)
    assert fields.differences(old, moved) == []
    assert fields.identity(old) == fields.identity(moved)
    new = change("seed=3", "model.dense=8", "optim.schedule=cosine", base=moved)
    assert fields.differences(old, new) == [
        "seed: 0 -> 3",
        "model.dense: [4096,4096] -> [8]",
        "optim.schedule: constant -> cosine",
    ]
    for name in fields.all_fields():
        is_part = not name.startswith(("runtime.", "data.dir", "data.skip_broken"))
        assert (name in fields.identity(old)) == is_part


def test_json_names_the_version() -> None:
    tree = fields.to_dict(Config())
    assert tree["version"] == cnn_jax.__version__
    assert "version" not in fields.flatten(Config())


def test_missing_fields_take_their_defaults() -> None:
    tree = {"version": cnn_jax.__version__, "seed": 3, "model": {"name": "vgg"}}
    assert fields.from_dict(tree) == Config(seed=3, model=ModelConfig(name="vgg"))
    assert fields.from_dict({}) == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 5}, "data must be an object of fields"),
        ({"seed": "a"}, "seed=a: expected an integer"),
        ({"train": None}, "train must be an object of fields"),
        ({"optim": {"learning_rate": "1"}}, "optim.learning_rate=1: expected a number"),
        (
            {"x": 1},
            f"version {cnn_jax.__version__} does not know the fields x of a config that was "
            f"written by version {cnn_jax.__version__}",
        ),
        (
            {"version": "9.1.0", "augment": {"warp": 1, "flip": "none", "blur": 2}},
            f"version {cnn_jax.__version__} does not know the fields augment.warp, augment.blur "
            "of a config that was written by version 9.1.0",
        ),
    ],
)
def test_from_dict_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        fields.from_dict(fields.to_dict(Config()) | changes)
    assert str(caught.value) == message


def test_load_refuses(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def message() -> str:
        with pytest.raises(UserError) as caught:
            fields.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "TMP")

    assert message() == "TMP/config.json does not exist: TMP is not a workdir"
    path.write_text("{")
    assert message().startswith("TMP/config.json can't be read as a config: ")
    path.write_bytes(b"\xff\xfe")
    assert message().startswith("TMP/config.json can't be read as a config: ")
    path.write_text("[]")
    assert message() == "TMP/config.json: config must be an object of fields"
    path.write_text(json.dumps(fields.to_dict(Config()) | {"seed": 0.5}))
    assert message() == "TMP/config.json: seed=0.5: expected an integer"


# Each was written by `config.save` of version 0.1.0 (commit 4b79609): the named configs, those of
# fine-tuning with the network of vgg3, one in which every field is set that is elsewhere now, and
# the pretraining of experiments/results/transfer.json.
OLD = json.loads((Path(__file__).parent / "configs_of_0_1_0.json").read_text())
NAMED = [name for name in OLD if name in configs.CONFIGS]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_config_of_version_0_1_0_is_today_s(name: str) -> None:
    expected = configs.get(name)
    if name.startswith("finetune"):
        expected = replace(expected, model=configs.get("vgg3").model)
    assert fields.from_dict(OLD[name]) == expected


def test_every_field_that_has_moved_since_version_0_1_0() -> None:
    base = configs.get("vgg3")
    assert fields.from_dict(OLD["every moved field"]) == replace(
        base,
        seed=3,
        data=replace(
            base.data, dir="/d", validation=0.1, normalize=((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
        ),
        augment=replace(base.augment, flip="random"),
        optim=replace(
            base.optim,
            schedule=((4.0, 0.2), (8.5, 0.2)),
            warmup_epochs=1.0,
            ends=(0.25, 0.0),
            weight_decay=0.001,
        ),
        train=replace(base.train, patience=2),
        runtime=RuntimeConfig(
            cache_dir="/c", seeds=4, segment_steps=7, checkpoint_seconds=3.0, deterministic=True
        ),
    )


def test_the_pretraining_of_the_committed_results_is_read() -> None:
    found = fields.from_dict(OLD["pretraining"])
    assert found.augment.flip == "random"
    assert found.data.classes == ("airplane", "automobile", "bird", "cat", "deer")
    assert (found.optim.weight_decay, found.optim.schedule) == (0.0005, "cosine")
    assert found == fields.from_dict(json.loads(json.dumps(fields.to_dict(found))))


def old(**sections: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of vgg3 by version 0.1.0, with fields of its sections replaced."""
    return OLD["vgg3"] | {name: OLD["vgg3"][name] | fields for name, fields in sections.items()}


def groups_of(**optim: Any) -> Any:
    return fields.from_dict(old(optim=optim)).optim.groups


def test_groups_of_version_0_1_0() -> None:
    frozen = [".*", None]
    head = ["head/.*", 1]
    assert groups_of(groups=[head, frozen]) == (("head/.*", 1.0), (".*", None))
    assert groups_of(groups=[["block{last}/.*", 1], frozen]) == (("block3/.*", 1.0), (".*", None))
    expected = (("{last}/.*", 0.5), (".*", None))
    assert groups_of(groups=[[r"(fc\d+|block{last})/.*", 0.5], frozen]) == expected
    # In a phase without a pattern, its parameters have the multiplier of the one that they match.
    assert groups_of(phases=[[0, [head, frozen]], [2, [["fc1/.*", 0.5], [".*", 1]]]]) == (
        ("head/.*", 1.0),
        ("fc1/.*", ((0, None), (2, 0.5))),
        (".*", ((0, None), (2, 1.0))),
    )


PATTERNS = ["head/.*", "block1/.*", "block{last}/.*", r"fc\d+/.*", ".*bias", "block[12]/.*"]


def first(groups: Any, name: str) -> Any:
    return next(m for pattern, m in groups if re.fullmatch(pattern, name))


@pytest.mark.parametrize("early", PATTERNS)
@pytest.mark.parametrize("late", PATTERNS)
def test_phases_are_read_exactly_or_refused(early: str, late: str) -> None:
    phases = [[0, [[early, 0.5], [".*", 1.0]]], [3, [[late, None], [".*", 0.25]]]]
    names = [f"{layer}/{p}" for layer in LAYERS for p in ("kernel", "bias")]
    try:
        groups = groups_of(phases=phases)
    except UserError as error:
        assert "can't be written as one pattern of optim.groups" in str(error)
        assert early != late
        return
    for epoch, of_phase in phases:
        of_phase = [(pattern.replace("{last}", "3"), m) for pattern, m in of_phase]
        for name in names:
            found = first(groups, name)
            if isinstance(found, tuple):
                found = [m for start, m in found if start <= epoch][-1]
            assert found == first(of_phase, name), name


LAYERS = [
    *("block1/conv1", "block1/conv2", "block2/conv1", "block2/conv2"),
    *("block3/conv1", "block3/conv2", "block3/conv3", "fc1", "fc2", "head"),
]


@pytest.mark.parametrize(
    ("name", "blocks", "dense", "expected"),
    [
        ("simple_cnn", ((4, 4),), (8,), ["conv1/bias", "conv2/bias", "fc1/bias", "head/bias"]),
        ("vgg", ((4,), (4, 4)), (), ["block1/conv1/bias", "block2/conv1/bias", "head/bias"]),
        ("airbench", ((4, 4),), (), ["whiten/bias", "group1/norm1/bias", "group1/norm2/bias"]),
    ],
)
def test_phases_apply_to_the_parameters_of_each_network(
    name: str, blocks: Any, dense: Any, expected: list[str]
) -> None:
    # Every layer of its own pattern, in the first phase alone: all must be found.
    model = {"name": name, "blocks": blocks, "dense": dense}
    own = [[pattern, 0.5] for pattern in expected]
    phases = [[0, [*own, [".*", 1.0]]], [1, [[".*", 1.0]]]]
    found = dict(fields.from_dict(old(model=model, optim={"phases": phases})).optim.groups)
    assert {pattern: found[pattern] for pattern in expected} == dict.fromkeys(
        expected, ((0, 0.5), (1, 1.0))
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"init": {"kind": "best"}}, "does not know the fields init.kind of a config"),
        ({"data": {"mean": [1, 2]}}, "data.mean=[1,2]: expected a list such as [0.5,0.5,0.5]"),
        ({"augment": {"alternate_flip": 1}}, "augment.alternate_flip=1: expected true|false"),
        ({"optim": {"phases": [1]}}, "optim.phases=[1]: expected a list such as"),
        (
            {"optim": {"phases": [[0, [["(", 1]]], [1, [[".*", 1]]]]}},
            "optim.phases: invalid regular expression: missing )",
        ),
        ({"model": {"blocks": 3}, "optim": {"groups": []}}, "model.blocks=3: expected a list"),
        ({"train": {"speed": 3}}, "train.speed of a config that was written by version 0.1.0"),
    ],
)
def test_damaged_files_of_version_0_1_0_are_refused(sections: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        fields.from_dict(old(**sections))
    assert message in str(caught.value)


def test_flips_of_version_0_1_0() -> None:
    def flip(**augment: bool) -> str:
        return fields.from_dict(old(augment=augment)).augment.flip

    assert flip() == "none"
    assert flip(flip=True) == "random"
    assert flip(alternate_flip=True) == "alternate"


def test_a_file_without_a_version_may_have_today_s_fields() -> None:
    tree = fields.to_dict(configs.get("airbench"))
    del tree["version"]
    assert fields.from_dict(tree) == configs.get("airbench")
    assert upgrade.from_0_1({}) == {"augment": {"flip": "none"}}


def test_decays_of_version_0_1_0() -> None:
    found = fields.from_dict(old(optim={"decays": [["head/.*", 0.1], [".*", 0]]}))
    assert found.optim == OptimConfig(
        learning_rate=0.01, weight_decay=(("head/.*", 0.1), (".*", 0.0))
    )
