"""Changes of place, colour and shape that leave what a photo shows: crops, jitter, RandAugment.

All work on whole batches without a branch for each image: an operation that an image did not draw
is computed with numbers that change nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Real

Images = Float[Array, "batch height width 3"]
"""RGB in [0, 1]."""

RATIOS = (3 / 4, 4 / 3)
"""Width by height of random rectangles (Szegedy et al., 2015)."""

OPERATIONS = (
    "identity",
    "autocontrast",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""Those of RandAugment (Cubuk et al., 2020) but for equalize, whose histograms are slow here."""
# What the operations do at strength 10, as in the paper's code; "contrast" and its like change
# factors from 1 to 1 - 0.9 or 1 + 0.9.
_DEGREES, _SHEAR, _TRANSLATION, _FACTOR, _LOST_BITS = 30.0, 0.3, 0.45, 0.9, 4
_GRAY = 0.5
"""What is seen beyond the border of an image."""


def random_resized_crop(
    images: Real[Array, "batch height width channels"],
    key: Key[Array, ""],
    size: tuple[int, int],
    smallest_area: float,
    ratios: tuple[float, float] = RATIOS,
) -> Float[Array, "batch new_height new_width channels"]:
    """Scales a random rectangle of each image to `size` (height, width), bilinearly, antialiased.

    The rectangle's share of the area is uniform in [smallest_area, 1]. Its width by height, in
    units of the image's own, is uniform on a logarithmic scale between `ratios`, as far as such a
    rectangle fits; its place is uniform among whole pixels. torchvision's RandomResizedCrop draws
    area and ratio until a rectangle fits, which leaves the ratios of an area as they are here but
    makes large areas rarer. Pixels keep their scale, [0, 255] or [0, 1].
    """
    n, height, width, _ = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (n,), minval=smallest_area, maxval=1)
    # A side is sqrt(area * ratio) of the image's, at most 1; the other one sqrt(area / ratio).
    fits = -jnp.log(area)
    low, high = jnp.log(jnp.array(ratios))
    low, high = jnp.maximum(low, -fits), jnp.minimum(high, fits)
    ratio = jnp.exp(low + (high - low) * jax.random.uniform(ratio_key, (n,)))
    free = jax.random.uniform(place_key, (2, n))

    def taps(share: Array, place: Array, old: int, new: int) -> tuple[Array, Array]:
        length = jnp.clip(jnp.round(old * jnp.sqrt(share)), 1, old)
        return resize_taps(jnp.floor(place * (old - length + 1)), length, old, new)

    wide = _resize(images, taps(area * ratio, free[1], width, size[1]), axis=2)
    return _resize(wide, taps(area / ratio, free[0], height, size[0]), axis=1)


def _resize(images: Array, taps: tuple[Array, Array], axis: int) -> Array:
    """Returns images whose rows (axis 1) or columns (axis 2) are the means that `taps` names."""
    shape = (len(images), -1, 1, 1) if axis == 1 else (len(images), 1, -1, 1)

    def take(image: Array, places: Array) -> Array:
        index = places if axis == 1 else (slice(None), places)
        # Without this, checks that indices are in bounds take longer than all else.
        return image.at[index].get(mode="promise_in_bounds")

    terms = [
        jax.vmap(take)(images, places).astype(jnp.float32) * weights.reshape(shape)
        for places, weights in zip(*taps, strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def resize_taps(
    start: Float[Array, "batch"], length: Float[Array, "batch"], old: int, new: int
) -> tuple[Int[Array, "taps batch {new}"], Float[Array, "taps batch {new}"]]:
    """Returns which of `old` pixels each of `new` ones is the mean of, and with which weights.

    They scale the pixels [start, start + length) of a line as PIL's bilinear filter does: with a
    triangle around each new pixel's centre, one old pixel wide to both sides or, where the line
    shrinks, as wide as a new pixel, cut at the ends. The sum over these few taps is 15 times as
    fast on a CPU as a product with the matrix of all weights.
    """
    start, length = start.reshape(1, -1, 1), length.reshape(1, -1, 1)
    scale = length / new
    reach = jnp.maximum(scale, 1)
    centre = start + (jnp.arange(new).reshape(1, 1, -1) + 0.5) * scale
    n_taps = int(2 * max(old / new, 1)) + 1
    pixel = jnp.ceil(centre - reach - 0.5) + jnp.arange(n_taps).reshape(-1, 1, 1)
    weights = jnp.maximum(1 - jnp.abs(pixel + 0.5 - centre) / reach, 0)
    weights = jnp.where((pixel >= start) & (pixel < start + length), weights, 0)
    weights = weights / jnp.sum(weights, axis=0, keepdims=True)
    return jnp.clip(pixel.astype(jnp.int32), 0, old - 1), weights


def color_jitter(
    images: Images, key: Key[Array, ""], strengths: tuple[float, float, float, float]
) -> Images:
    """Changes brightness, contrast, saturation and hue of each image at random, in this order.

    `strengths` are those of `AugmentConfig.color`. The changes are torchvision's ColorJitter's,
    which applies them in random order.
    """
    keys = jax.random.split(key, 4)

    def draw(i: int, middle: float) -> Array:
        low, high = middle - strengths[i], middle + strengths[i]
        return jax.random.uniform(keys[i], (len(images), 1, 1, 1), minval=low, maxval=high)

    if strengths[0]:
        images = _blend(images, jnp.zeros(()), draw(0, 1))
    if strengths[1]:
        images = _blend(images, _mean_gray(images), draw(1, 1))
    if strengths[2]:
        images = _blend(images, _gray(images), draw(2, 1))
    if strengths[3]:
        import dm_pix  # takes a tenth of a second

        turned = draw(3, 0).reshape(-1, 1, 1)
        images = jnp.clip(dm_pix.adjust_hue(images, turned), 0, 1)
    return images


def randaugment(images: Images, key: Key[Array, ""], n: int, strength: float) -> Images:
    """Applies `n` of `OPERATIONS` to each image, drawn with replacement.

    `strength` in [0, 10] is that of each; the sign of those that have one is random. Those that
    move pixels are done first, all as one (`_moved`).
    """
    operation_key, sign_key = jax.random.split(key)
    shape = (n, len(images))
    chosen = jax.random.randint(operation_key, shape, 0, len(OPERATIONS))
    level = jax.random.rademacher(sign_key, shape, jnp.float32) * strength / 10
    images = _moved(images, chosen, level)

    # A loop, since XLA would compute one operation inside the other, pixel by pixel and twice.
    def recolor(images: Images, drawn: tuple[Array, Array]) -> tuple[Images, None]:
        return _recolored(images, *drawn), None

    return jax.lax.scan(recolor, images, (chosen, level))[0]


def _moved(images: Images, chosen: Int[Array, "n batch"], level: Float[Array, "n batch"]) -> Images:
    """Applies the chosen operations that move pixels, one after the other, as one affine map.

    A new pixel is the nearest old one, or gray where there is none.
    """
    _, height, width, _ = images.shape

    def amount(name: str, largest: float) -> Array:
        return jnp.where(chosen == OPERATIONS.index(name), level * largest, 0)

    angle = amount("rotate", jnp.pi * _DEGREES / 180)
    across, down = amount("shear_x", _SHEAR), amount("shear_y", _SHEAR)
    right = amount("translate_x", _TRANSLATION * width)
    below = amount("translate_y", _TRANSLATION * height)
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    # Each operation of its own has one of these in which something differs from the identity.
    each = [[cos, across - sin, right], [down + sin, cos, below], [zero, zero, zero + 1]]
    matrices = jnp.stack([jnp.stack(row, axis=-1) for row in each], axis=-2)
    total = matrices[0]
    for matrix in matrices[1:]:
        total = total @ matrix

    y = (jnp.arange(height) - (height - 1) / 2).reshape(1, -1, 1)
    x = (jnp.arange(width) - (width - 1) / 2).reshape(1, 1, -1)
    a = total[..., None, None]
    column = jnp.round(a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2] + (width - 1) / 2)
    row = jnp.round(a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2] + (height - 1) / 2)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)

    def take(image: Array, place: Array) -> Array:
        # Without this, checks that indices are in bounds take longer than all else.
        return image.reshape(-1, 3).at[place].get(mode="promise_in_bounds")

    taken = jax.vmap(take)(images, place.astype(jnp.int32))
    return jnp.where(inside[..., None], taken, _GRAY)


def _recolored(images: Images, chosen: Int[Array, "batch"], level: Float[Array, "batch"]) -> Images:
    """Applies the chosen operation to each image whose operation moves no pixel."""

    def drew(name: str) -> Bool[Array, "batch 1 1 1"]:
        return (chosen == OPERATIONS.index(name)).reshape(-1, 1, 1, 1)

    level = level.reshape(-1, 1, 1, 1)
    base = jnp.where(drew("contrast"), _mean_gray(images), jnp.zeros_like(images))
    base = jnp.where(drew("color"), _gray(images), base)
    base = jnp.where(drew("sharpness"), _smoothed(images), base)
    blends = drew("contrast") | drew("color") | drew("sharpness") | drew("brightness")
    images = jnp.where(blends, _blend(images, base, 1 + _FACTOR * level), images)

    low = jnp.min(images, axis=(1, 2), keepdims=True)
    range_ = jnp.max(images, axis=(1, 2), keepdims=True) - low
    stretches = drew("autocontrast") & (range_ > 0)
    images = jnp.where(stretches, (images - low) / jnp.where(range_ > 0, range_, 1), images)

    inverts = drew("solarize") & (images > 1 - jnp.abs(level))
    images = jnp.where(inverts, 1 - images, images)

    step = jnp.exp2(jnp.round(_LOST_BITS * jnp.abs(level)))
    coarse = jnp.floor(jnp.round(images * 255) / step) * step / 255
    return jnp.where(drew("posterize"), coarse, images)


def _blend(images: Images, base: Array, factor: Array) -> Images:
    """Returns images as far from `base` as `factor` says: 0 is the base, 1 the images."""
    return jnp.clip(base + factor * (images - base), 0, 1)


def _gray(images: Images) -> Float[Array, "batch height width 1"]:
    """Returns the luma of ITU-R BT.601, as PIL and torchvision weigh colours."""
    red, green, blue = jnp.split(images, 3, axis=-1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _mean_gray(images: Images) -> Float[Array, "batch 1 1 1"]:
    return _gray(jnp.mean(images, axis=(1, 2), keepdims=True))


def _smoothed(images: Images) -> Images:
    """Returns PIL's ImageFilter.SMOOTH: the mean of 3x3 pixels, the middle one counted five times.

    Pixels of the border are left as they are.
    """
    _, height, width, _ = images.shape
    # Indices, since XLA computes slices and paddings of such arrays ten times as slowly on a CPU.
    y, x = jnp.arange(height), jnp.arange(width)
    three = images[:, jnp.maximum(y - 1, 0)] + images + images[:, jnp.minimum(y + 1, height - 1)]
    nine = three[:, :, jnp.maximum(x - 1, 0)] + three
    nine = nine + three[:, :, jnp.minimum(x + 1, width - 1)]
    inner_rows = (y > 0) & (y < height - 1)
    inner_columns = (x > 0) & (x < width - 1)
    inner = inner_rows.reshape(1, -1, 1, 1) & inner_columns.reshape(1, 1, -1, 1)
    return jnp.where(inner, (nine + 4 * images) / 13, images)
