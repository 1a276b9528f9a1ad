"""The exported network, run by a process that has JAX and not this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.export
import numpy as np
from helpers.cli import SMALL, finish
from helpers.data import noise
from helpers.predictors import random_predictor

from cnn_jax import fields
from cnn_jax.config import Config, ModelConfig
from cnn_jax.runs.outcome import load_predictor
from cnn_jax.tools import export

VGG16 = ModelConfig(
    name="vgg16", blocks=((4, 4), (4, 4), *((16, 16, 16),) * 3), dense=(8, 8), dropout=0.5
)
ALONE = """
import json, sys
import jax, jax.export
import numpy as np
loaded = jax.export.deserialize(open("run/export/predictor.jax", "rb").read())
images = np.load("images.npy")
parts = [np.asarray(loaded.call(images[:n])) for n in (1, 3, 7)]
np.save("found.npy", parts[-1])
assert np.allclose(parts[0], parts[-1][:1], atol=1e-6)
assert np.allclose(parts[1], parts[-1][:3], atol=1e-6)
ours = sorted({name.split(".")[0] for name in sys.modules} & {"cnn_jax", "flax"})
print(json.dumps([list(loaded.platforms), ours]))
"""


def test_an_exported_network_runs_without_the_project(tmp_path: Path):
    """Wide enough for the CPU kernels, which can't be exported for any batch size."""
    small = (*SMALL, "--model.blocks=[[16,16]]", "--data.normalize=[[0.5,0.4,0.3],[1,1,1]]")
    finish(*small, "--augment.test_time=mirror_translate", "--workdir=run", cwd=tmp_path)
    finish("--mode=export", "--workdir=run", cwd=tmp_path)
    images = noise(7, 8, 8, 3)
    np.save(tmp_path / "images.npy", images)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    alone = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout) == [["cpu", "cuda"], []]
    found = np.load(tmp_path / "found.npy")
    predictor = load_predictor(tmp_path / "run", fields.load(tmp_path / "run/config.json"))
    np.testing.assert_allclose(found, predictor.probabilities(images), atol=1e-5)
    about = json.loads((tmp_path / "run/export/predictor.json").read_text())
    assert about["class_names"] == list("0123456789")
    assert about["input"] == ["uint8", ["n", 8, 8, 3]]


def test_vgg16_and_residual_networks_are_exported_for_both_platforms():
    for model in (
        VGG16,
        ModelConfig(name="resnet_small", blocks=((4, 4), (8,)), dense=()),
    ):
        predictor = random_predictor(Config(model=model), image_shape=(32, 32, 3))
        loaded = jax.export.deserialize(bytearray(export.serialize(predictor)))
        images = noise(2, 32, 32, 3)
        np.testing.assert_allclose(loaded.call(images), predictor.probabilities(images), atol=1e-5)
        assert loaded.platforms == ("cpu", "cuda")
