"""Logits of a whole split, and what is counted from them on the host, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cnn_jax import augment, devices, models

# Large enough to fill the cores, small enough that activations of VGG stay in a few hundred MB.
BATCH_SIZE = 250


def mean_logits(
    model: nn.Module,
    variables: Any,
    images: Float[jax.Array, "batch height width channels"],
    test_time: str,
) -> Float[jax.Array, "batch classes"]:
    """Returns the logits of normalised images, averaged over the views that `test_time` names."""
    weights, views = zip(*augment.test_time_views(images, test_time), strict=True)
    if len(views) == 1:
        return model.apply(variables, images)  # pyright: ignore
    each = jax.lax.map(partial(model.apply, variables), jnp.stack(views))
    return jnp.tensordot(jnp.array(weights), each, 1)  # pyright: ignore


@partial(jax.jit, static_argnames=("model", "layer", "mean", "std", "test_time"))
def _batched(
    model: nn.Module,
    variables: Any,
    batches: jax.Array,
    *,
    layer: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    test_time: str,
) -> jax.Array:
    def forward(images: jax.Array) -> jax.Array:
        images = augment.normalize(devices.spread(images), mean, std)
        if layer:
            return models.layer_inputs(model, variables, images)[layer]
        return mean_logits(model, variables, images, test_time)

    return devices.gather(jax.lax.map(forward, batches))


def logits(
    model: nn.Module,
    variables: Any,
    images: UInt8[np.ndarray, "n height width 3"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    test_time: str,
) -> Float[np.ndarray, "n classes"]:
    """Returns the float32 logits of every image, dropout off, running statistics in use.

    `test_time` is `AugmentConfig.test_time`: they may be averages over several views of an image.
    """
    return _in_batches(model, variables, images, layer="", mean=mean, std=std, test_time=test_time)


def layer_inputs(
    model: nn.Module,
    variables: Any,
    images: UInt8[np.ndarray, "n height width 3"],
    layer: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[np.ndarray, "n *shape"]:
    """Returns what a layer is given for every image; for the name "" the logits."""
    return _in_batches(model, variables, images, layer=layer, mean=mean, std=std, test_time="none")


def _in_batches(
    model: nn.Module, variables: Any, images: UInt8[np.ndarray, "n height width 3"], **settings: Any
) -> np.ndarray:
    n = len(images)
    batch_size = min(BATCH_SIZE, n)
    batch_size += -batch_size % devices.count()
    n_batches = -(-n // batch_size)
    padded = np.zeros((n_batches * batch_size, *images.shape[1:]), np.uint8)
    padded[:n] = images
    batches = devices.replicate(padded.reshape(n_batches, batch_size, *images.shape[1:]))
    out = _batched(model, variables, batches, **settings)
    return np.asarray(out).reshape(n_batches * batch_size, *out.shape[2:])[:n]


@partial(jax.jit, static_argnames=("model", "mean", "std"))
def every_layer_input(
    model: nn.Module,
    variables: Any,
    images: UInt8[jax.Array, "n height width 3"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, jax.Array]:
    """Returns what each layer is given, by its name, for images few enough to be one batch."""
    return models.layer_inputs(model, variables, augment.normalize(images, mean, std))


def softmax(values: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Returns probabilities for logits, in float64."""
    shifted = np.exp(values.astype(np.float64) - values.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def most_wrong(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], limit: int
) -> Int[np.ndarray, "wrong"]:
    """Returns the misclassified examples, those first whose label was thought least likely."""
    of_label = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(of_label[wrong], kind="stable")][:limit]


def tell_mistakes(
    wrong: Int[np.ndarray, "wrong"],
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, "n"],
    files: Sequence[str],
    class_names: Sequence[str],
) -> list[str]:
    """Returns a line for each of the misclassified examples: file, class, and what it seemed."""
    lines = []
    for i in wrong.tolist():
        predicted = int(probabilities[i].argmax())
        taken = f"{class_names[predicted]} ({probabilities[i, predicted]:.1%})"
        lines.append(f"{files[i]}: {class_names[int(labels[i])]}, taken for {taken}")
    return lines


def most_taken_for(
    confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]
) -> list[str]:
    """Returns, for each class, the other one it is most often taken for and how often, or "-"."""
    mistakes = confusion - np.diag(np.diag(confusion))
    pairs = zip(mistakes.argmax(axis=1).tolist(), mistakes.max(axis=1).tolist(), strict=True)
    return [f"{class_names[most]} ({count})" if count else "-" for most, count in pairs]


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a labelled split."""

    loss: float
    """Mean of the training loss, label smoothing included, dropout off."""
    accuracy: float
    """Share of images whose largest logit is that of the label, in [0, 1]."""
    confusion: Int[np.ndarray, "classes classes"]
    """Number of images by label (row) and prediction (column)."""
    logits: Float[np.ndarray, "n classes"]


def score(
    values: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], losses: Any
) -> Evaluation:
    """Counts logits against labels; `losses(logits, labels)` gives one value an example."""
    n_classes = values.shape[1]
    predicted = values.argmax(axis=1)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    each = np.asarray(losses(values, labels), np.float64)
    accuracy = float(np.mean(predicted == labels))
    return Evaluation(float(each.mean()), accuracy, confusion, values)
