"""Every named recipe that starts from a trained network, with every network of the registry."""

import re
from dataclasses import replace
from functools import partial

import pytest

from cnn_jax import configs, models, optim
from cnn_jax.config import ModelConfig
from cnn_jax.models import inspection

RECIPES = [name for name in configs.CONFIGS if configs.get(name).init.checkpoint]
VGG16 = ModelConfig(name="vgg16", blocks=((4,) * 2, (4,) * 2, (4,) * 3, (4,) * 3, (4,) * 3))
NETWORKS = {
    "simple_cnn": configs.get("simple_cnn").model,
    "vgg": configs.get("quickstart").model,
    "vgg16": replace(VGG16, dense=(8, 8)),
    "airbench": configs.get("airbench").model,
    "airbench_residual": configs.get("airbench96").model,
    "resnet_small": configs.get("resnet_small").model,
}
NETWORKS |= {
    name: ModelConfig(name=name, blocks=(), dense=())
    for name in models.NETWORKS
    if name not in NETWORKS
}


def test_all_are_tried():
    assert set(NETWORKS) == set(models.NETWORKS)
    assert {"finetune_last_block", "finetune_gradual", "photos", "photos_features"} <= set(RECIPES)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_recipe_trains_a_part_of_every_network(network: str):
    model = models.build(NETWORKS[network], 3)
    names = inspection.param_names(model, (32, 32, 3))
    for recipe in RECIPES:
        config = configs.get(recipe)
        phases = optim.make_phases(config.optim, partial(models.last_block, model))
        for _, groups in phases:
            optim.check_groups("optim.groups", groups, names)
            trained = {name for name in names if optim.multiplier(groups, name) is not None}
            assert any(name.startswith("head/") for name in trained), recipe
            if recipe in ("finetune_head", "photos_features"):
                assert all(name.startswith("head/") for name in trained)
        if recipe == "finetune_last_block":
            assert 2 < len(trained) < len(names) or network == "simple_cnn"
        for pattern in config.init.skip:
            assert any(re.fullmatch(pattern, name) for name in names)
