"""--mode=export: a trained network as one file for other programs, with all that surrounds it."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.export  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cnn_jax import kernels, models, trees
from cnn_jax.data import photos
from cnn_jax.errors import UserError
from cnn_jax.models import weights
from cnn_jax.predictor import Predictor, forward
from cnn_jax.runs.folder import check_config
from cnn_jax.runs.outcome import load_predictor, versions, write_json
from cnn_jax.tools import Request

PLATFORMS = ("cpu", "cuda")
TOLERANCE = 1e-4
"""Largest difference between the probabilities of an exported file and of the network itself."""

_GOLDEN_SIZE = (320, 240)
"""Width and height of the golden photo, once it is upright."""


def run(request: Request) -> None:
    """Writes the network to `export` in the workdir: predictor.jax or, by --format, predictor.onnx.

    Beside it lie predictor.json, which says how to get from a photo to the file's input, a golden
    photo with its input, and, for networks that PyTorch's libraries have, their .safetensors file.

    Raises:
        UserError: the workdir holds no trained network, or onnx is not installed or lacks an
            operation of the network.
    """
    if request.format == "onnx" and not importlib.util.find_spec("onnxruntime"):
        raise UserError("--format=onnx needs two packages: .venv/bin/pip install onnx onnxruntime")
    workdir, config = request.workdir, request.config
    check_config(workdir, config)
    predictor = load_predictor(workdir, config, request.checkpoint)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    path = folder / f"predictor.{request.format}"
    path.write_bytes(to_onnx(predictor) if request.format == "onnx" else serialize(predictor))
    pixels = write_golden(folder, layout(predictor))
    golden = run_exported(path, pixels)
    difference = float(np.abs(golden - predictor.probabilities(pixels)).max())
    # A GPU rounds the products of a float32 network to TF32, if nothing asks for more.
    on_cpu, precise = jax.default_backend() == "cpu", config.model.precision == "highest"
    exact = config.model.dtype == "float32" and (on_cpu or precise)
    if exact and difference > TOLERANCE:
        raise UserError(f"{path} gives other probabilities than the network, by {difference:.1e}")
    write_json(folder / "predictor.json", describe(predictor, golden) | {"format": request.format})
    written = [path.name, "predictor.json", "golden.jpg", "golden.png"]
    if weights.is_known(config.model):
        written.append(f"{config.model.name}.safetensors")
        weights.write(predictor.variables, config.model, folder / written[-1])
    print(f"{', '.join(written)} in {folder}")
    print(f"{path.name} gives the network's probabilities of golden.png, to {difference:.0e}")


def layout(predictor: Predictor) -> photos.Layout:
    """Returns how a photo becomes what the network's file takes."""
    side = predictor.image_shape[0]
    return replace(photos.Layout.of(predictor.config.data), side=side)


def describe(predictor: Predictor, golden: np.ndarray) -> dict[str, Any]:
    """Returns the contents of predictor.json; `golden` are the probabilities of golden.png."""
    data, height_width = predictor.config.data, list(predictor.seen_shape[:2])
    return {
        "class_names": predictor.class_names,
        "photo": {
            "rotation": "as the EXIF orientation says",
            "colors": "RGB, transparent pixels over white",
            **asdict(layout(predictor)),
        },
        "input": ["uint8", ["n", *predictor.image_shape]],
        "inside": {
            "centre": height_width,
            "normalize": data.normalize,
            "test_time": predictor.config.augment.test_time,
            "temperature": predictor.temperature,
        },
        "output": ["float32", ["n", len(predictor.class_names)]],
        "golden": {
            "photo": "golden.jpg",
            "input": "golden.png",
            "output": [round(float(p), 6) for p in golden[0]],
        },
        "platforms": PLATFORMS,
        "params_sha256": trees.sha256(predictor.variables["params"]),
        "jax": versions()["jax"],
    }


def write_golden(folder: Path, layout: photos.Layout) -> np.ndarray:
    """Writes golden.jpg, a photo, and golden.png, what becomes of it.

    The photo is drawn: it differs in all corners, lies on its side by its EXIF orientation, and is
    no square, so that a program that leaves out a step gets other pixels than golden.png's.

    Returns:
        These pixels, uint8 [1, side, side, 3].
    """
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    photo = Image.fromarray(coarse).resize(_GOLDEN_SIZE, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "golden.jpg", quality=95, exif=exif)
    pixels = photos.load_image(folder / "golden.jpg", layout)
    Image.fromarray(pixels).save(folder / "golden.png")
    return pixels[None]


def run_exported(path: Path, images: np.ndarray) -> np.ndarray:
    """Returns the probabilities that predictor.jax or predictor.onnx gives for images.

    It does so as another program would, without this project.
    """
    if path.suffix == ".jax":
        return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def serialize(predictor: Predictor) -> bytes:
    """Returns a function from pixels to probabilities in JAX's export format, parameters included.

    It takes uint8 [n, height, width, 3] for any n and returns float32 [n, classes]; the centre
    crop, normalisation, the averages of `augment.test_time` and the temperature are part of it. Run
    it on a CPU or with CUDA by `jax.export.deserialize(data).call(images)`.
    """
    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *predictor.image_shape), jnp.uint8)
    predict = jax.jit(_prediction(predictor))
    with kernels.use("xla", predictor.config.model.precision):
        exported = jax.export.export(predict, platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def to_onnx(predictor: Predictor) -> bytes:
    """Returns the same function as an ONNX model, whose input is "images".

    It computes in float32 whatever `model.dtype` is, since few programs compute in bfloat16.

    Raises:
        UserError: the network uses an operation that is not known.
    """
    from cnn_jax import onnx_writer  # needs a package that is optional

    config = replace(predictor.config.model, dtype="float32")
    model = models.build(config, len(predictor.class_names))
    predict = _prediction(replace(predictor, model=model))
    with kernels.use("xla"):
        return onnx_writer.convert(predict, predictor.image_shape).SerializeToString()


def _prediction(predictor: Predictor) -> Callable[[jax.Array], jax.Array]:
    config = predictor.config

    def predict(images: jax.Array) -> jax.Array:
        logits = forward(
            predictor.model,
            predictor.variables,
            images,
            data=config.data,
            test_time=config.augment.test_time,
        )
        return jax.nn.softmax(logits / predictor.temperature)

    return predict
