"""The images of training's compiled segments: all there are, or streamed batch by batch."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cnn_jax import mesh
from cnn_jax.config import Config
from cnn_jax.data import ImageDataset
from cnn_jax.data.dataset import Images
from cnn_jax.data.stream import BatchStream
from cnn_jax.order import StepNumbers
from cnn_jax.step import Setup


@contextlib.contextmanager
def open_stream(
    config: Config, setup: Setup, dataset: ImageDataset, key: jax.Array, step: int
) -> Iterator[BatchStream | None]:
    """Reads the batches of streamed images from a step on, while the block runs.

    Gives None if training needs no stream of them.
    """
    images = dataset.train.images
    if isinstance(images, np.ndarray) or config.train.cache_frozen or step >= setup.total_steps:
        yield None
        return
    numbers = step_numbers(setup, len(images), key)
    most = setup.config.runtime.segment_steps
    workers = config.runtime.workers
    batches = BatchStream(images, numbers, step, setup.total_steps, workers=workers, most=most)
    with contextlib.closing(batches):
        yield batches


def step_numbers(setup: Setup, n: int, key: jax.Array) -> StepNumbers:
    """Returns the order of `n` training images in which `train_segment` goes through them."""
    order_key = jax.random.split(key, 3)[0]  # as there
    batch_size = setup.config.train.batch_size
    data = tuple(jax.random.key_data(order_key).tolist())
    return StepNumbers(data, n, batch_size, setup.passes, mesh.own_places(batch_size))


def images_of_segments(images: Images, batches: BatchStream | None) -> Callable[[int], jax.Array]:
    """Returns what gives each segment its images: all there are, or the batches of its steps."""
    if batches is not None:
        return lambda n_steps: mesh.divide(batches.take(n_steps), axis=1)
    assert isinstance(images, np.ndarray)
    whole = mesh.lend(images)
    return lambda _: whole
