"""A trained network with its preprocessing: logits and activations of any uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import augment, kernels, mesh, metrics
from cnn_jax.config import Config, DataConfig
from cnn_jax.data import stream
from cnn_jax.data.dataset import Images
from cnn_jax.models import inspection

# Images predicted at once, and their pixels: large enough to fill the cores, small enough that
# activations stay in a few hundred MB.
BATCH_SIZE = 250
_BATCH_PIXELS = 32 * 224 * 224


@dataclass(frozen=True, eq=False)
class Predictor:
    """All that prediction needs. Dropout is off, and batch norm uses its running statistics."""

    config: Config
    model: nn.Module
    variables: dict[str, Any]
    """The collections "params" and, with batch norm, "batch_stats"."""
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """Height, width and channels of a stored image, of which the network sees `data.crop`."""
    step: int = 0
    """The number of training steps that led to these parameters."""
    temperature: float = 1.0
    """What logits are divided by before the softmax, so that probabilities are calibrated."""

    @property
    def seen_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the network sees of an image."""
        return self.config.data.seen(self.image_shape)

    def logits(
        self, images: Images, test_time: str | None = None
    ) -> Float[np.ndarray, "n classes"]:
        """Returns the logits in float32.

        `test_time` is as in `AugmentConfig`; None stands for the config's own. With it the logits
        are averages over several views of an image.
        """
        test_time = self.config.augment.test_time if test_time is None else test_time
        return self._in_batches(_logits, images, test_time=test_time)

    def probabilities(
        self, images: Images, test_time: str | None = None
    ) -> Float[np.ndarray, "n classes"]:
        """Returns the softmax of the logits at the network's temperature, in float64.

        Raises:
            UserError: a logit is not finite, so that no class is the most likely one.
        """
        logits = self.logits(images, test_time)
        metrics.check_finite(logits)
        return metrics.softmax(logits, self.temperature)

    def activations(self, images: Images, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns what the named modules return for the images themselves: arrays [n, ...].

        A name is that of a layer, such as "block1/conv1", or of a module that holds layers, such as
        "block1". The arrays have the type that the network computes in.

        Raises:
            UserError: the network has no module of that name.
        """
        arrays = self._in_batches(_activations, images, names=tuple(names))
        return dict(zip(names, arrays, strict=True))

    def _in_batches(self, function: Callable[..., Any], images: Images, **static: Any) -> Any:
        n = len(images)
        height, width = images.shape[1:3]
        size = min(BATCH_SIZE, max(_BATCH_PIXELS // (height * width), 1), n)
        size += -size % mesh.device_count()
        own = np.array(mesh.own_places(size))
        numbers = [start + own[start + own < n] for start in range(0, n, size)]
        data = self.config.data
        static["data"] = DataConfig(crop=data.crop, normalize=data.normalize)
        results: list[Any] = []
        with kernels.use(self.config.runtime.kernels, self.config.model.precision):
            for block in stream.read_ahead(images, numbers):
                padded = np.zeros((len(own), *images.shape[1:]), np.uint8)
                padded[: len(block)] = block
                results.append(function(self.model, self.variables, mesh.divide(padded), **static))
                # Two batches are on their way; what came before them is taken off the device.
                results[-2:-1] = jax.tree.map(np.asarray, results[-2:-1])
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *results)


def forward(
    model: nn.Module,
    variables: Any,
    images: UInt8[jax.Array, "batch height width 3"],
    *,
    data: DataConfig,
    test_time: str,
) -> Float[jax.Array, "batch classes"]:
    """Returns the logits of stored images, averaged over the views that `test_time` names."""
    normal = augment.evaluation_view(images, data)
    weights, views = zip(*augment.test_time_views(normal, test_time), strict=True)
    if len(views) == 1:
        return model.apply(variables, normal)  # pyright: ignore
    each = jax.lax.map(partial(model.apply, variables), jnp.stack(views))
    return jnp.tensordot(jnp.array(weights), each, 1)  # pyright: ignore


@partial(jax.jit, static_argnames=("model", "data", "test_time"))
def _logits(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    *,
    data: DataConfig,
    test_time: str,
) -> jax.Array:
    return mesh.gather(forward(model, variables, images, data=data, test_time=test_time))


@partial(jax.jit, static_argnames=("model", "data", "names"))
def _activations(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    *,
    data: DataConfig,
    names: tuple[str, ...],
) -> list[jax.Array]:
    normal = augment.evaluation_view(images, data)
    found = inspection.outputs(model, variables, normal, names)
    return [mesh.gather(found[name]) for name in names]
