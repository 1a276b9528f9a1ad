"""From uint8 pixels to what the network sees, on the device: pure functions of images and a key.

`training_view` and `evaluation_view` are the two ways; `mixing.mix` follows the first where labels
change.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Real, UInt8

from cnn_jax import distort, kernels, mixing
from cnn_jax.config import AugmentConfig, DataConfig

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""

Change = Callable[[Array], Array]

_CROP, _COLOR, _RANDAUGMENT, _ERASE = range(3, 7)
"""What a change's key is folded with. JAX's split(key, 3), from which flip, translate and cutout
have theirs, returns what folding with 0, 1 and 2 does; `mixing.mix` has 7."""


def training_view(
    images: UInt8[Array, "batch stored_height stored_width channels"],
    key: Key[Array, ""],
    data: DataConfig,
    config: AugmentConfig,
) -> Float[Array, "batch height width channels"]:
    """Returns the changed, normalised images that the network is trained on.

    In this order: a random or centre crop to what the network sees of stored images, colour jitter,
    RandAugment, erasing, all on pixels in [0, 1]; normalisation; flip, translate and cutout
    (`augment`). Each has a key of its own, so that what one draws does not depend on whether
    another is on. Alternating flips precede (`alternate_flip`), and mixing follows
    (`mixing.mix`).
    """
    height, width, _ = data.seen(images.shape[1:])
    if config.random_crop:
        images = distort.random_resized_crop(
            images, _key(key, _CROP), (height, width), config.random_crop
        )
    elif data.crop < 1:
        images = centre_crop(images, height, width)
    changes: list[Change] = []
    if any(config.color):
        strengths = config.color
        changes.append(lambda x: distort.color_jitter(x, _key(key, _COLOR), strengths))
    if config.randaugment[0]:
        n, strength = config.randaugment
        changes.append(lambda x: distort.randaugment(x, _key(key, _RANDAUGMENT), n, strength))

    def finish(unit: Array) -> Array:
        if config.erase:
            unit = mixing.random_erase(unit, _key(key, _ERASE), config.erase)
        return augment(_standardize(unit, data.normalize), key, config)

    unit = images.astype(jnp.float32) / 255
    first, *others = [*changes, finish]
    unit = _apart(first, unit, key) if config.random_crop else first(unit)
    for change in others:
        unit = _apart(change, unit, key)
    return unit


def _apart(change: Change, images: Array, key: Key[Array, ""]) -> Array:
    """Returns `change(images)`; on a CPU, `images` are computed before it.

    XLA would compute them inside it, for each pixel several times: random crops of 32 photos, then
    mirrored, took 140 ms instead of 28 on two busy cores, and those in other colours 970 more.
    """
    certainly = jax.random.uniform(key) < 2  # XLA does not know that.
    return kernels.update_if(certainly, change, images)


def evaluation_view(
    images: UInt8[Array, "batch stored_height stored_width channels"], data: DataConfig
) -> Float[Array, "batch height width channels"]:
    """Returns what the network sees outside training: the centre of each image, normalised."""
    if data.crop < 1:
        images = centre_crop(images, *data.seen(images.shape[1:])[:2])
    return normalize(images, data.normalize)


def _key(key: Key[Array, ""], purpose: int) -> Key[Array, ""]:
    return jax.random.fold_in(key, purpose)


def normalize(
    images: UInt8[Array, "batch height width channels"], normalization: Normalization
) -> Float[Array, "batch height width channels"]:
    """Returns (pixels / 255 - mean) / std in float32, channel by channel."""
    return _standardize(images.astype(jnp.float32) / 255, normalization)


def _standardize(
    scaled: Float[Array, "batch height width channels"], normalization: Normalization
) -> Float[Array, "batch height width channels"]:
    mean, std = normalization
    if not any(mean) and set(std) == {1.0}:
        return scaled
    shape = (1, 1, 1, len(mean))
    return (scaled - jnp.reshape(jnp.array(mean), shape)) / jnp.reshape(jnp.array(std), shape)


def centre_crop(
    images: Real[Array, "batch old_height old_width channels"], height: int, width: int
) -> Real[Array, "batch {height} {width} channels"]:
    """Returns the central pixels, at torchvision's offsets where an odd number is cut off.

    Height and width must not be larger than the images'.
    """
    sizes = zip(images.shape[1:3], (height, width), strict=True)
    top, left = (round((old - new) / 2) for old, new in sizes)
    return images[:, top : top + height, left : left + width]


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
    images: Float[Array, "batch height width channels"],
    key: Key[Array, ""],
    side: int,
    inside: bool = False,
) -> Float[Array, "batch height width channels"]:
    """Zeroes a square of `side` pixels around a random centre, clipped at the border.

    The centre is any pixel of the image (DeVries and Taylor, 2017, section 3.2). With `inside` the
    square is any that fits, as in airbench96 (Jordan, 2024). Zero is the mean colour where
    `normalize` was given the mean, and black otherwise.
    """
    n, height, width, _ = images.shape
    cut = side - 1 if inside else 0
    first = jax.random.randint(key, (n, 2, 1), 0, jnp.array([[[height - cut], [width - cut]]]))
    start = first if inside else first - side // 2
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
        images = cutout(images, cutout_key, config.cutout, config.cutout_inside)
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
    return [pair for w, view in weighted for pair in ((w, view), (w, jnp.flip(view, axis=2)))]
