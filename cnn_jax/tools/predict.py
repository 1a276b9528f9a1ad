"""--mode=predict: the most likely class of image files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnn_jax.data import photos
from cnn_jax.errors import UserError, printable
from cnn_jax.runs.folder import check_config
from cnn_jax.runs.outcome import load_predictor
from cnn_jax.tools import Request


def run(request: Request) -> None:
    """Prints the most likely class of each image file, or of every image below a folder.

    An unreadable image is an error if it was named, and skipped in a folder.

    Raises:
        UserError: no image was named, none can be read, or the workdir holds no trained network.
    """
    if not request.paths:
        raise UserError("--mode=predict needs image files or folders after the flags")
    check_config(request.workdir, request.config)
    predictor = load_predictor(request.workdir, request.config, request.checkpoint)
    layout = replace(photos.Layout.of(predictor.config.data), side=predictor.image_shape[0])
    files, images = _read_images(request.paths, layout)
    predictions = [
        {
            "file": str(file),
            "class": predictor.class_names[int(row.argmax())],
            "probability": round(float(row.max()), 4),
        }
        for file, row in zip(files, predictor.probabilities(images), strict=True)
    ]
    if request.json:
        print(json.dumps(predictions, indent=2))
        return
    for p in predictions:
        print(printable(f"{p['file']}: {p['class']} ({p['probability']:.1%})"))


def _read_images(paths: tuple[str, ...], layout: photos.Layout) -> tuple[list[Path], np.ndarray]:
    files: list[Path] = []
    images: list[np.ndarray] = []
    for path in map(Path, paths):
        for file in photos.list_images(path):
            try:
                images.append(photos.load_image(file, layout))
            except UserError as error:
                if file == path:
                    raise
                print(printable(f"skipped: {error}"), file=sys.stderr)
                continue
            files.append(file)
    if not files:
        raise UserError(f"no readable image in {', '.join(paths)}")
    return files, np.stack(images)
