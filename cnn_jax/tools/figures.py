"""--mode=figures: all figures of a finished run, and its report."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from rich.console import Console

from cnn_jax import augment, mixing, saliency
from cnn_jax.errors import printable
from cnn_jax.models import inspection
from cnn_jax.runs.folder import RunFolder, check_config
from cnn_jax.tools import Request, report
from cnn_jax.tools.evaluate import load_dataset
from cnn_jax.tools.report import FinishedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXPLAINED = 3
"""Images for which heat maps are drawn."""
_LAYERS = 8
"""Layers of which feature maps are drawn."""
_SAMPLES = 10
"""Training images of each class that are drawn."""
_TRAINED_ON, _VIEWS = 6, 6
"""Training images, and views of each, that show augmentation."""


def run(request: Request) -> None:
    """Draws a finished run in the folder `figures` of its workdir, and writes its report.html.

    The report is left alone where `--checkpoint` names another one than the run reported on.

    Raises:
        UserError: the run is not finished, or a file can't be written.
    """
    workdir, config = request.workdir, request.config
    console = Console(highlight=False, markup=False, soft_wrap=True)
    check_config(workdir, config)
    dataset = load_dataset(config, console)
    finished = report.load_finished(workdir, config, dataset, request.checkpoint)
    with RunFolder(workdir).claim(config):
        for path in write_pictures(workdir, finished):
            console.print(printable(path))
        if request.checkpoint in ("", config.train.reported_kind):
            report.write(workdir, finished)
            console.print(printable(str(workdir / "report.html")))


def write_pictures(workdir: Path, run: FinishedRun) -> Iterator[str]:
    """Writes each picture to `figures`, and yields its path.

    Raises:
        UserError: the disk is full or read-only.
    """
    from cnn_jax import drawing  # imports matplotlib, which takes half a second

    for name, figure in _pictures(run):
        path = workdir / "figures" / f"{name}.png"
        report.write_file(path, drawing.png(figure))
        yield str(path)


def _pictures(run: FinishedRun) -> Iterator[tuple[str, "Figure"]]:
    from cnn_jax import drawing

    yield from report.pictures(run)
    names, shape = run.dataset.class_names, run.predictor.seen_shape
    kernels = report.conv_kernels(run.predictor)
    if len(kernels) > 1:
        last = next(reversed(kernels))
        yield "filters_last", drawing.filters(kernels[last], last)
    rows = inspection.summarize(run.predictor.model, shape)
    yield "architecture", drawing.architecture(rows, shape, run.predictor.config.name)
    train, test = run.dataset.train, run.dataset.test
    first = _of_each_class(train.labels, _SAMPLES)
    yield "samples", drawing.samples(train.images[first], train.labels[first], names, _SAMPLES)
    if run.predictor.config.augment.changes_training:
        yield "training_views", drawing.training_views(*training_views(run))
    image = test.images[explained_images(run)[0]]
    if maps := feature_maps(run, image):
        yield "feature_maps", drawing.feature_maps(image, maps)
    if kernels:
        yield "heat_maps", heat_maps(run, saliency.last_maps(run.predictor))
    worked = drawing.CHAPTER_IMAGE, drawing.CHAPTER_KERNEL
    yield "convolution", drawing.worked_convolution(*worked)
    yield "activation_functions", drawing.activation_functions()


def explained_images(run: FinishedRun) -> np.ndarray:
    """Returns indices of test images of different classes, all classified correctly if any are."""
    labels = run.dataset.test.labels
    correct = np.flatnonzero(run.test.logits.argmax(axis=1) == labels)
    _, first = np.unique(labels[correct], return_index=True)
    chosen = correct[np.sort(first)][:_EXPLAINED]
    return chosen if len(chosen) else np.arange(min(_EXPLAINED, len(labels)))


def training_views(run: FinishedRun) -> tuple[np.ndarray, np.ndarray]:
    """Returns a few training images of different classes, and what the network was shown of them.

    Each column of views is what the images would be as one batch, mixed with each other if batches
    are. Erased and hidden parts have the pixels that stand for their values.

    Returns:
        Pixels, uint8: of the images [n, stored_height, stored_width, 3], and of the views
        [n, views, height, width, 3].
    """
    config, train = run.predictor.config, run.dataset.train
    chosen = _of_each_class(train.labels, _TRAINED_ON)[:_TRAINED_ON]
    stored, labels = train.images[chosen], train.labels[chosen]
    n_classes = len(run.dataset.class_names)

    @jax.jit
    def view(images: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.key(config.seed)
        if config.augment.flip == "alternate":
            images = augment.alternate_flip(images, key, jnp.asarray(chosen), number)
        key = jax.random.fold_in(key, number)
        seen = augment.training_view(images, key, config.data, config.augment)
        mixup, cutmix = config.augment.mixup, config.augment.cutmix
        if mixup or cutmix:
            seen, _ = mixing.mix(seen, jnp.asarray(labels), key, n_classes, mixup, cutmix)
        return denormalize(seen, config.data.normalize)

    return stored, np.stack([view(stored, jnp.int32(i)) for i in range(_VIEWS)], axis=1)


def _of_each_class(labels: np.ndarray, n: int) -> np.ndarray:
    """Returns the indices of the first label of each class, then of the second, up to the n-th."""
    places = [np.flatnonzero(labels == label)[:n] for label in np.unique(labels)]
    number = np.concatenate([np.arange(len(of_class)) for of_class in places])
    return np.concatenate(places)[np.argsort(number, kind="stable")]


def feature_maps(run: FinishedRun, image: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what layers return for an image, [height, width, channels] by name.

    Of a deep network a few layers are chosen at equal distances.
    """
    rows = inspection.summarize(run.predictor.model, run.predictor.seen_shape)
    names = [row.name for row in rows if len(row.output_shape) == 3 and row.kind != "Dropout"]
    chosen = np.linspace(0, len(names) - 1, min(_LAYERS, len(names))).round().astype(int)
    maps = run.predictor.activations(image[None], [names[i] for i in chosen])
    return {name: np.asarray(values[0], np.float32) for name, values in maps.items()}


def heat_maps(run: FinishedRun, layer: str) -> "Figure":
    """Draws occlusion and Grad-CAM of the predicted class for each explained image.

    `layer` is the module whose feature maps Grad-CAM weighs.
    """
    from cnn_jax import drawing

    chosen = explained_images(run)
    images = run.dataset.test.images[chosen]
    # Not predicted from the image alone, since logits may be averages over several views.
    probabilities = run.probabilities[chosen]
    targets = probabilities.argmax(axis=1)
    pairs = zip(images, targets.tolist(), strict=True)
    occluded = [saliency.occlusion(run.predictor, image, target) for image, target in pairs]
    cam = saliency.grad_cam(run.predictor, images, targets, layer)
    shares = zip(targets.tolist(), probabilities.max(axis=1), strict=True)
    names = [f"{run.dataset.class_names[target]}, {share:.1%}" for target, share in shares]
    square = saliency.square(*images.shape[1:3])
    seen = run.predictor.seen_shape[:2]
    return drawing.heat_maps(images, names, np.stack(occluded), square, cam, seen)


def denormalize(
    images: Float[Array, "batch height width channels"], normalization: augment.Normalization
) -> UInt8[Array, "batch height width channels"]:
    """Returns the pixels that `augment.normalize` takes to these values, cut to [0, 255]."""
    mean, std = (jnp.reshape(jnp.array(x), (1, 1, 1, len(x))) for x in normalization)
    return jnp.clip(jnp.round((images * std + mean) * 255), 0, 255).astype(jnp.uint8)
