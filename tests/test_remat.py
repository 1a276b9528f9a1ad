"""Blocks that are computed again in the backward pass: the same results in less memory."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.data import colours
from helpers.training import HEAD, edit, fit, initial, keys, leaves, run

from cnn_jax import capacity, models
from cnn_jax.config import Config, ModelConfig
from cnn_jax.data import ImageDataset
from cnn_jax.errors import UserError
from cnn_jax.fit import compile_segment
from cnn_jax.models import inspection
from cnn_jax.step import Setup

VGG = ModelConfig(name="vgg", blocks=((8, 8), (8, 8)), dense=(8,), dropout=0.25)
RESNET = ModelConfig(name="resnet_small", blocks=((8, 8), (8,)), dense=())
FAMILIES = [
    VGG,
    RESNET,
    ModelConfig(name="airbench", blocks=((8, 8),), dense=(), activation="gelu"),
    pytest.param(
        ModelConfig(name="resnet50", blocks=((4,), (4,)), dense=()), marks=pytest.mark.slow
    ),
    pytest.param(
        ModelConfig(name="efficientnet_lite0", blocks=((8,),) * 7, dense=()), marks=pytest.mark.slow
    ),
]
SIDE = 16


def with_and_without(config: Config) -> tuple[Config, Config]:
    return edit(config, train={"remat": True}), config


def temporary_bytes(config: Config, dataset: ImageDataset) -> int:
    """Returns the memory for intermediate results of a compiled segment, which is not run."""
    with pytest.MonkeyPatch.context() as patch:
        programs: list[jax.stages.Compiled] = []
        patch.setattr(capacity, "check_program", lambda program, _: programs.append(program))
        setup, state = Setup.of(config, dataset), initial(config, dataset)
        compile_segment(config, setup, dataset, state, keys(config)[1])
    found = programs[0].memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.name)
def test_results_are_the_same_to_rounding(tiny: Config, model: ModelConfig):
    """Losses, parameters and batch statistics after four steps of two epochs.

    In the deep networks, whose last norms see 8 pixels, rounding grows a hundredfold in a step,
    from 3e-8 after the first. They are compared after two.
    """
    is_deep = model.name in ("resnet50", "efficientnet_lite0")
    side, steps = (32, 2) if is_deep else (SIDE, 4)
    dataset = colours(22, 9, 10, side)
    config = edit(replace(tiny, model=model), optim={"learning_rate": 1e-3})
    again, kept = (run(one, dataset, steps) for one in with_and_without(config))
    np.testing.assert_allclose(again[1], kept[1], rtol=1e-5)
    ours, plain = (leaves({"p": s.params, "b": s.batch_stats}) for s, _ in (again, kept))
    assert ours.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_allclose(ours[name], array, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_it_takes_less_memory(tiny: Config):
    """Of eight blocks of one size, the layers of one are in memory at a time: 11.5 and 20.3 MB."""
    model = replace(RESNET, blocks=((8,) * 8,))
    config = edit(replace(tiny, model=model), train={"batch_size": 64, "epochs": 1})
    dataset = colours(64, 9, 10, SIDE)
    again, kept = (temporary_bytes(one, dataset) for one in with_and_without(config))
    assert again < 0.6 * kept
    expected = [
        capacity._activation_bytes(Setup.of(one, dataset)) for one in with_and_without(config)
    ]
    assert expected[0] < expected[1] / 4
    assert expected[0] <= again


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (VGG, {"block1", "block2"}),
        (RESNET, {"stage1/block1", "stage1/block2", "stage2/block1"}),
        (ModelConfig(name="simple_cnn"), set()),
    ],
)
def test_blocks_hold_layers_and_are_no_layers(model: ModelConfig, expected: set[str]):
    assert inspection.blocks(models.build(model, 3), (SIDE, SIDE, 3)) == expected


@pytest.mark.slow
def test_frozen_blocks_stay_as_in_evaluation(tiny: Config):
    """BatchNorm's statistics in them do not change, with and without."""
    config = edit(replace(tiny, model=RESNET), optim={"groups": HEAD})
    dataset = colours(22, 9, 10, SIDE)
    for one in with_and_without(config):
        found = leaves(run(one, dataset, 3)[0].batch_stats)
        for name, array in leaves(initial(one, dataset).batch_stats).items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_network_without_blocks_is_refused(tiny: Config, dataset: ImageDataset, workdir: Path):
    flat = ModelConfig(name="simple_cnn", blocks=((4,),), dense=(8,))
    config = edit(replace(tiny, model=flat), train={"remat": True})
    with pytest.raises(
        UserError, match=r"train\.remat: model\.name=simple_cnn has no blocks, only l"
    ):
        fit(config, dataset, workdir)
