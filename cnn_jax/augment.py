"""From uint8 pixels to what the network sees, on the device: pure functions of images and a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax.config import AugmentConfig

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""


def normalize(
    images: UInt8[Array, "batch height width channels"], normalization: Normalization
) -> Float[Array, "batch height width channels"]:
    """Returns (pixels / 255 - mean) / std in float32, channel by channel."""
    scaled = images.astype(jnp.float32) / 255
    mean, std = normalization
    if not any(mean) and set(std) == {1.0}:
        return scaled
    shape = (1, 1, 1, len(mean))
    return (scaled - jnp.reshape(jnp.array(mean), shape)) / jnp.reshape(jnp.array(std), shape)


def flip(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""]
) -> Float[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def alternate_flip(
    images: UInt8[Array, "batch height width channels"],
    key: Key[Array, ""],
    examples: Int[Array, "batch"],
    epoch: Int[Array, ""],
) -> UInt8[Array, "batch height width channels"]:
    """Mirrors half of the examples in even epochs and the others in odd ones (Jordan, 2024).

    Which half is a function of the key and of each example's number alone.
    """
    first = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(examples)
    mirrored = (first ^ (epoch % 2 == 1)).reshape(-1, 1, 1, 1)
    return jnp.where(mirrored, images[:, :, ::-1], images)


def translate(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""], pixels: int
) -> Float[Array, "batch height width channels"]:
    """Shifts each image by whole numbers drawn from {-pixels..pixels}^2, reflecting at the border.

    `pixels` must be smaller than the height and the width.
    """
    n, height, width, _ = images.shape
    shifts = jax.random.randint(key, (n, 2, 1), -pixels, pixels + 1)
    rows = _reflect(jnp.arange(height)[None] + shifts[:, 0], height)
    columns = _reflect(jnp.arange(width)[None] + shifts[:, 1], width)
    images = jnp.take_along_axis(images, rows[:, :, None, None], axis=1)
    return jnp.take_along_axis(images, columns[:, None, :, None], axis=2)


def _reflect(index: Array, size: int) -> Array:
    """Folds indices that lie up to size - 1 outside [0, size) back in, edges not repeated."""
    index = jnp.abs(index)
    return jnp.where(index >= size, 2 * (size - 1) - index, index)


def cutout(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""], side: int
) -> Float[Array, "batch height width channels"]:
    """Zeroes a square of `side` pixels around a random centre, clipped at the border.

    The centre is any pixel of the image (DeVries and Taylor, 2017, section 3.2). Zero is the mean
    colour where `normalize` was given the mean, and black otherwise.
    """
    n, height, width, _ = images.shape
    centre = jax.random.randint(key, (n, 2, 1), 0, jnp.array([[[height], [width]]]))
    start = centre - side // 2
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (rows >= start[:, 0]) & (rows < start[:, 0] + side)
    in_columns = (columns >= start[:, 1]) & (columns < start[:, 1] + side)
    hidden = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    return jnp.where(hidden, 0.0, images)


def augment(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""], config: AugmentConfig
) -> Float[Array, "batch height width channels"]:
    """Applies what `config` asks for in the order flip, translate, cutout, each with its own key.

    Alternating flips are not among them: they need the examples' numbers (`alternate_flip`).
    """
    flip_key, translate_key, cutout_key = jax.random.split(key, 3)
    if config.flip == "random":
        images = flip(images, flip_key)
    if config.translate:
        images = translate(images, translate_key, config.translate)
    if config.cutout:
        images = cutout(images, cutout_key, config.cutout)
    return images


def test_time_views(
    images: Float[Array, "batch height width channels"], test_time: str
) -> list[tuple[float, Float[Array, "batch height width channels"]]]:
    """Returns the views of the images whose logits are averaged, each with its weight.

    `test_time` is that of `AugmentConfig`. The views and weights are airbench94's (Jordan, 2024):
    the shifts are by one pixel, up and left or down and right, reflecting at the border.
    """
    if test_time == "none":
        return [(1.0, images)]
    shifted = []
    if test_time == "mirror_translate":
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        shifted = [padded[:, :-2, :-2], padded[:, 2:, 2:]]
    weighted = [(0.25 if shifted else 0.5, images), *((0.125, view) for view in shifted)]
    return [(weight, view[:, :, ::step]) for weight, view in weighted for step in (1, -1)]
