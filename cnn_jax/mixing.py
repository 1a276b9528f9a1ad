"""Changes that hide a part of an image or mix it with another: erasing, mixup and CutMix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_KEY = 7
"""What the key of a step's images is folded with here; `augment` folds it with smaller numbers."""


def random_erase(
    images: Float[Array, "batch height width channels"],
    key: Key[Array, ""],
    probability: float,
    areas: tuple[float, float] = (0.02, 1 / 3),
    ratios: tuple[float, float] = (0.3, 3.3),
) -> Float[Array, "batch height width channels"]:
    """Replaces a random rectangle of each image, with a probability, by noise in [0, 1).

    Share of the area and ratio of the sides are drawn as torchvision's RandomErasing does, and a
    side that would not fit is cut (Zhong et al., 2020). All images of a batch show parts of the
    same picture of noise, since drawing one for each takes as long as a layer.
    """
    n, height, width, channels = images.shape
    keys = jax.random.split(key, 5)
    chosen = jax.random.bernoulli(keys[0], probability, (n,))
    area = jax.random.uniform(keys[1], (n,), minval=areas[0], maxval=areas[1])
    low, high = jnp.log(jnp.array(ratios))
    ratio = jnp.exp(jax.random.uniform(keys[2], (n,), minval=low, maxval=high))
    share = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), 1) * chosen[None]
    inside = _rectangles(share, jax.random.uniform(keys[3], (2, n)), height, width)
    noise = jax.random.uniform(keys[4], (1, height, width, channels))
    return jnp.where(inside, noise, images)


def _rectangles(
    share: Float[Array, "2 batch"], place: Float[Array, "2 batch"], height: int, width: int
) -> Array:
    """Returns what lies in the rectangles, bool [batch, height, width, 1].

    `share` are their heights and widths as shares of the image's, and `place` in [0, 1) are their
    places from one border to the other.
    """
    inside = []
    for size, along, at in zip((height, width), share, place, strict=True):
        length = jnp.round(size * along)
        start = jnp.floor(at * (size - length + 1)).reshape(-1, 1)
        pixels = jnp.arange(size).reshape(1, -1)
        inside.append((pixels >= start) & (pixels < start + length.reshape(-1, 1)))
    return inside[0][:, :, None, None] & inside[1][:, None, :, None]


def mix(
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, "batch"],
    key: Key[Array, ""],
    n_classes: int,
    mixup: float,
    cutmix: float,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Mixes each image with the one before it in the batch, and their labels in the same shares.

    mixup takes the mean of both, weighted by a draw from Beta(mixup, mixup) for each image (Zhang
    et al., 2018); cutmix puts a rectangle of the other image in its place in the first, whose share
    of the area is drawn from Beta(cutmix, cutmix) (Yun et al., 2019; theirs is cut at the border
    and so smaller). 0 turns either off; if both are on, each batch gets one of them at random.

    Returns:
        The images, and target probabilities.
    """
    n, height, width, _ = images.shape
    choice_key, mixup_key, cutmix_key, place_key = jax.random.split(
        jax.random.fold_in(key, _KEY), 4
    )
    own = jnp.ones((n, 1, 1, 1))
    if mixup:
        own = jax.random.beta(mixup_key, mixup, mixup, own.shape)
    if cutmix:
        side = jnp.sqrt(jax.random.beta(cutmix_key, cutmix, cutmix, (1, n)))
        place = jax.random.uniform(place_key, (2, n))
        kept = 1.0 - _rectangles(jnp.repeat(side, 2, axis=0), place, height, width)
        use_cutmix = jax.random.bernoulli(choice_key) if mixup else True
        own = jnp.where(use_cutmix, kept, own)
    targets = jax.nn.one_hot(labels, n_classes)
    share = jnp.mean(own, axis=(1, 2, 3)).reshape(-1, 1)
    other_images, other_targets = jnp.roll(images, 1, axis=0), jnp.roll(targets, 1, axis=0)
    return (
        own * images + (1 - own) * other_images,
        share * targets + (1 - share) * other_targets,
    )
