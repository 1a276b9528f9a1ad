"""The exported predictor, run by a process that has JAX and not this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from test_main import SMALL, command

from cnn_jax import evaluate, export, layers, models

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


def test_the_predictor_runs_without_the_project(tmp_path: Path):
    """Wide enough for what a CPU computes in its own way inside the project."""
    small = (*SMALL, "--set=model.blocks=[[16,16]]", "--set=data.mean=0.5,0.4,0.3")
    small = (*small, "--set=augment.test_time=mirror_translate")
    assert command(*small, "--workdir=run", cwd=tmp_path).returncode == 0
    result = command("--mode=export", "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    alone = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout) == [["cpu", "cuda"], []]
    found = np.load(tmp_path / "found.npy")
    from cnn_jax import config, runs

    trained = runs.load_trained(tmp_path / "run", config.load(tmp_path / "run/config.json"))
    settings = {"mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0), "test_time": "mirror_translate"}
    logits = evaluate.logits(trained.model, trained.variables, images, **settings)
    np.testing.assert_allclose(found, evaluate.softmax(logits), atol=1e-5)
    about = json.loads((tmp_path / "run/export/predictor.json").read_text())
    assert about["class_names"] == list("0123456789")
    assert about["input"] == ["uint8", ["n", 8, 8, 3]]


def test_vgg16_is_exported_for_both_platforms():
    model = models.VGG16(n_classes=3, blocks=((4,), (16, 16)), dense=(8,), dropout=0.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "test_time": "none"}
    loaded = jax.export.deserialize(
        bytearray(export.predictor(model, variables, (32, 32, 3), **unit))
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    expected = evaluate.softmax(evaluate.logits(model, variables, images, **unit))
    np.testing.assert_allclose(loaded.call(images), expected, atol=1e-5)
    assert loaded.platforms == ("cpu", "cuda")


def test_portable_ends_with_its_block():
    with layers.portable():
        assert not layers.on_cpu()
    assert layers.on_cpu() == (jax.default_backend() == "cpu")
