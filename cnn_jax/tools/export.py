"""--mode=export: a trained network as one file that needs only jax and flatbuffers to run."""

import jax
import jax.export  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp

from cnn_jax import kernels, trees
from cnn_jax.models import weights
from cnn_jax.predictor import Predictor, forward
from cnn_jax.runs.folder import check_config
from cnn_jax.runs.outcome import load_predictor, versions, write_json
from cnn_jax.tools import Request

PLATFORMS = ("cpu", "cuda")


def run(request: Request) -> None:
    """Writes predictor.jax and its description predictor.json to `export` in the workdir.

    For vgg16 a file of weights for other frameworks, vgg16.safetensors, is written as well.

    Raises:
        UserError: the workdir holds no trained network.
    """
    workdir, config = request.workdir, request.config
    check_config(workdir, config)
    predictor = load_predictor(workdir, config, request.checkpoint)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    (folder / "predictor.jax").write_bytes(serialize(predictor))
    description = {
        "class_names": predictor.class_names,
        "input": ["uint8", ["n", *predictor.image_shape]],
        "output": ["float32", ["n", len(predictor.class_names)]],
        "platforms": PLATFORMS,
        "params_sha256": trees.sha256(predictor.variables["params"]),
        "jax": versions()["jax"],
    }
    write_json(folder / "predictor.json", description)
    written = ["predictor.jax", "predictor.json"]
    if config.model.name == "vgg16":
        weights.write(predictor.variables["params"], folder / "vgg16.safetensors")
        written.append("vgg16.safetensors")
    print(f"{', '.join(written)} in {folder}")


def serialize(predictor: Predictor) -> bytes:
    """Returns a function from pixels to probabilities in JAX's export format, parameters included.

    It takes uint8 [n, height, width, 3] for any n and returns float32 [n, classes]; normalisation
    and the averages of `augment.test_time` are part of it. Run it on a CPU or with CUDA by
    `jax.export.deserialize(data).call(images)`.
    """
    config = predictor.config

    def predict(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(
            forward(
                predictor.model,
                predictor.variables,
                images,
                normalization=config.data.normalize,
                test_time=config.augment.test_time,
            )
        )

    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *predictor.image_shape), jnp.uint8)
    with kernels.use("xla"):
        exported = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())
