"""Augmentation: what may change, what may not, and that a key decides it."""

import colorsys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnn_jax import augment, distort, mixing
from cnn_jax.config import AugmentConfig, DataConfig
from cnn_jax.tools import figures

KEY = jax.random.key(3)
RAMP = jnp.arange(2 * 6 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 6, 3) + 1
MANY = jnp.repeat(RAMP[:1], 400, axis=0)


def test_normalize_scales_bytes_to_the_unit_interval():
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    unit = augment.normalize(pixels, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(unit[0, 0, 0], [0, 0.2, 1], rtol=1e-6)
    assert unit.dtype == jnp.float32


def test_normalize_shifts_and_scales_each_channel():
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    values = augment.normalize(pixels, ((0.1, 0.2, 0.5), (0.1, 1.0, 0.25)))
    np.testing.assert_allclose(values[0, 0, 0], [-1, 0, 2], atol=1e-6)


def test_flip_mirrors_about_half_of_the_images_and_changes_no_other():
    flipped = augment.flip(MANY, KEY)
    mirrored = np.all(flipped == MANY[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(flipped == MANY, axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    assert 150 < mirrored.sum() < 250


def test_translate_is_a_crop_of_the_reflected_image():
    moved = np.asarray(augment.translate(MANY, KEY, 2))
    padded = np.pad(MANY[0], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    crops = {padded[y : y + 6, x : x + 6].tobytes() for y in range(5) for x in range(5)}
    assert {image.tobytes() for image in moved} == crops


def test_cutout_zeroes_a_square_clipped_at_the_border():
    holes = np.asarray(augment.cutout(MANY, KEY, 4) == 0)
    assert np.array_equal(holes.all(axis=-1), holes.any(axis=-1))
    areas = holes[..., 0].sum(axis=(1, 2))
    assert areas.max() == 16
    assert areas.min() == 4  # a centre in the corner leaves a quarter
    kept = np.where(holes, MANY, augment.cutout(MANY, KEY, 4))
    np.testing.assert_array_equal(kept, MANY)


def test_cutout_inside_zeroes_any_square_that_fits():
    holes = np.asarray(augment.cutout(MANY, KEY, 4, inside=True) == 0)
    assert np.array_equal(holes.all(axis=-1), holes.any(axis=-1))
    assert (holes[..., 0].sum(axis=(1, 2)) == 16).all()
    corners = {tuple(np.argwhere(hole)[0]) for hole in holes[..., 0]}
    assert corners == {(row, column) for row in range(3) for column in range(3)}


def test_augment_without_options_is_the_identity():
    same = augment.augment(RAMP, KEY, AugmentConfig())
    np.testing.assert_array_equal(same, RAMP)


def test_augment_is_a_function_of_the_key():
    def run(key: jax.Array) -> jax.Array:
        return augment.augment(MANY, key, AugmentConfig(flip="random", translate=2, cutout=2))

    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert not np.array_equal(run(KEY), run(jax.random.key(4)))


def test_augment_gives_each_change_its_own_key():
    flips, shifts, holes = jax.random.split(KEY, 3)
    expected = augment.cutout(augment.translate(augment.flip(MANY, flips), shifts, 1), holes, 2)
    changed = augment.augment(MANY, KEY, AugmentConfig(flip="random", translate=1, cutout=2))
    np.testing.assert_array_equal(changed, expected)


def alternated(examples: np.ndarray, epoch: int, key: jax.Array = KEY) -> np.ndarray:
    """Returns which of the examples, all images alike, are mirrored in an epoch."""
    images = jnp.repeat(RAMP[:1].astype(jnp.uint8), len(examples), axis=0)
    seen = augment.alternate_flip(images, key, jnp.asarray(examples), jnp.int32(epoch))
    mirrored = np.all(seen == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(seen == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    return mirrored


def test_alternating_flip_shows_each_image_and_its_mirror_in_turn():
    first = alternated(np.arange(400), 0)
    assert 150 < first.sum() < 250
    for epoch in (1, 2, 3):
        np.testing.assert_array_equal(alternated(np.arange(400), epoch), first ^ (epoch % 2 == 1))


def test_alternating_flip_goes_by_the_example_not_by_its_place():
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(alternated(order, 0), alternated(np.arange(400), 0)[order])
    other = alternated(np.arange(400), 0, jax.random.key(4))
    assert not np.array_equal(other, alternated(np.arange(400), 0))


def test_views_at_test_time():
    images = np.asarray(RAMP)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    up, down = padded[:, :6, :6], padded[:, 2:, 2:]
    expected = {
        "none": [(1, images)],
        "mirror": [(0.5, images), (0.5, images[:, :, ::-1])],
        "mirror_translate": [
            (0.25, images),
            (0.25, images[:, :, ::-1]),
            (0.125, up),
            (0.125, up[:, :, ::-1]),
            (0.125, down),
            (0.125, down[:, :, ::-1]),
        ],
    }
    for test_time, views in expected.items():
        found = augment.test_time_views(RAMP, test_time)
        assert [weight for weight, _ in found] == [weight for weight, _ in views]
        for (_, view), (_, wanted) in zip(found, views, strict=True):
            np.testing.assert_array_equal(view, wanted)


def photos(n: int, height: int = 20, width: int = 20, seed: int = 0) -> jax.Array:
    """Returns smooth random pictures, uint8, with light and dark parts in all channels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 5, 5, 3), np.uint8)
    return jnp.array(
        [np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse]
    )


def unit(n: int, seed: int = 0) -> jax.Array:
    return photos(n, seed=seed).astype(jnp.float32) / 255


PLAIN = DataConfig()
SCALED = DataConfig(normalize=((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))

# Compiled as training compiles them, which is also faster than one operation at a time.
training_view = jax.jit(augment.training_view, static_argnums=(2, 3))
random_resized_crop = jax.jit(distort.random_resized_crop, static_argnums=(2, 3))
random_erase = jax.jit(mixing.random_erase, static_argnums=2)
color_jitter = jax.jit(distort.color_jitter, static_argnums=2)
mix = jax.jit(mixing.mix, static_argnums=(3, 4, 5))


def test_training_view_keeps_the_bits_of_the_changes_that_came_first():
    """Runs of configs that only flip, translate and cut out are reproduced bit by bit."""
    config = AugmentConfig(flip="random", translate=2, cutout=4)
    pictures = photos(8)

    @jax.jit
    def as_before(images: jax.Array) -> jax.Array:
        return augment.augment(augment.normalize(images, SCALED.normalize), KEY, config)

    expected = as_before(pictures)
    found = training_view(pictures, KEY, SCALED, config)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_training_view_gives_each_change_a_key_of_its_own():
    """The numbers are part of what reproduces a run."""
    pictures, data = photos(8), replace(SCALED, crop=0.8)
    jitter = (0.4, 0.3, 0.2, 0.1)
    config = AugmentConfig(
        random_crop=0.5, color=jitter, randaugment=(1, 5.0), erase=0.5, flip="random", cutout=3
    )

    def composed(images: jax.Array) -> jax.Array:
        crop, color, operation, erase, _ = (jax.random.fold_in(KEY, i) for i in range(3, 8))
        seen = distort.random_resized_crop(images, crop, (16, 16), 0.5) / 255
        seen = distort.randaugment(distort.color_jitter(seen, color, jitter), operation, 1, 5.0)
        seen = mixing.random_erase(seen, erase, 0.5)
        mean, std = (jnp.array(x).reshape(1, 1, 1, 3) for x in SCALED.normalize)
        return augment.augment((seen - mean) / std, KEY, config)

    # Operation by operation, as fusions round in other ways, and solarizing jumps at a threshold.
    with jax.disable_jit():
        np.testing.assert_allclose(
            training_view(pictures, KEY, data, config), composed(pictures), atol=1e-5
        )


def test_no_two_changes_share_a_key():
    """JAX's split and fold_in may return the same keys."""
    folded = [jax.random.fold_in(KEY, i) for i in range(3, 8)]
    keys = [*folded, *jax.random.split(KEY, 3)]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 8


@pytest.mark.slow
def test_mixing_has_a_key_of_its_own():
    images, labels = solid(4)
    mixed, _ = mix(images, labels, KEY, 4, 1.0, 0.0)
    _, own, *_ = jax.random.split(jax.random.fold_in(KEY, 7), 4)
    share = jax.random.beta(own, 1.0, 1.0, (4, 1, 1, 1))
    expected = share * images + (1 - share) * jnp.roll(images, 1, axis=0)
    np.testing.assert_allclose(mixed, expected, atol=1e-6)


@pytest.mark.xla
def test_a_crop_is_computed_before_it_is_mirrored_and_not_inside():
    config = AugmentConfig(random_crop=0.5, flip="random")
    lowered = training_view.lower(photos(4), KEY, DataConfig(crop=0.8), config)
    computations = lowered.compile().as_text().split("\n\n")
    assert any("reverse(" in text for text in computations)
    assert not any("reverse(" in text and "u8[" in text for text in computations)


def test_training_view_adds_a_change_without_another_draw_of_the_others():
    pictures = photos(64)
    config = AugmentConfig(flip="random")
    plain = training_view(pictures, KEY, PLAIN, config)
    erased = training_view(pictures, KEY, PLAIN, replace(config, erase=1.0))
    assert not np.array_equal(plain, erased)
    kept = np.mean(np.asarray(plain == erased), axis=(1, 2, 3))
    assert kept.min() > 0.6  # all but the rectangles: each image is mirrored as it was


@pytest.mark.parametrize(
    "changes",
    [
        {"random_crop": 0.3},
        {"color": (0.4, 0.4, 0.4, 0.1)},
        {"randaugment": (2, 9.0)},
        {"erase": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_change_reaches_the_training_view_and_is_a_function_of_the_key(changes: dict):
    data = DataConfig(crop=0.8)
    config = AugmentConfig(**changes)
    pictures = photos(8)
    seen = training_view(pictures, KEY, data, config)
    assert seen.shape == (8, 16, 16, 3)
    assert seen.dtype == jnp.float32
    assert 0 <= seen.min() < seen.max() <= 1
    assert not np.allclose(seen, augment.evaluation_view(pictures, data), atol=0.01)
    np.testing.assert_array_equal(seen, training_view(pictures, KEY, data, config))
    other = training_view(pictures, jax.random.key(4), data, config)
    assert not np.allclose(seen, other, atol=0.01)


@pytest.mark.parametrize(("stored", "side"), [(20, 16), (21, 16), (16, 16), (19, 16), (256, 224)])
def test_evaluation_view_is_the_normalised_centre(stored: int, side: int):
    picture = photos(1, stored, stored)
    data = replace(SCALED, crop=side / stored)
    top = round((stored - side) / 2)  # as torchvision.transforms.functional.center_crop
    expected = augment.normalize(picture[:, top : top + side, top : top + side], SCALED.normalize)
    np.testing.assert_array_equal(augment.evaluation_view(picture, data), expected)


def test_crops_keep_the_shape_of_images_whose_sides_differ():
    pictures, data = photos(2, 16, 20), DataConfig(crop=0.75)
    expected = pictures[:, 2:14, 2:17] / np.float32(255)  # 2 and 3 columns are cut off
    np.testing.assert_array_equal(augment.evaluation_view(pictures, data), expected)
    np.testing.assert_array_equal(training_view(pictures, KEY, data, AugmentConfig()), expected)
    cropped = training_view(pictures, KEY, data, AugmentConfig(random_crop=0.5))
    assert cropped.shape == (2, 12, 15, 3)


def test_denormalize_returns_the_pixels():
    pictures = jnp.arange(256, dtype=jnp.uint8).repeat(3).reshape(1, 16, 16, 3)
    values = augment.normalize(pictures, SCALED.normalize)
    np.testing.assert_array_equal(figures.denormalize(values, SCALED.normalize), pictures)
    outside = figures.denormalize(
        jnp.array([-99.0, 99.0, 0.0]).reshape(1, 1, 1, 3), SCALED.normalize
    )
    np.testing.assert_array_equal(outside[0, 0, 0], [0, 255, 76])


def test_without_a_crop_images_keep_sides_that_differ():
    pictures = photos(2, 12, 20)
    for config in (AugmentConfig(), AugmentConfig(random_crop=0.5)):
        assert training_view(pictures, KEY, PLAIN, config).shape == (2, 12, 20, 3)
    assert augment.evaluation_view(pictures, PLAIN).shape == (2, 12, 20, 3)


@pytest.mark.parametrize(("start", "length"), [(0, 20), (3, 15), (7, 8), (4, 3), (19, 1), (0, 13)])
@pytest.mark.parametrize("new", [8, 20, 33])
def test_resizing_is_that_of_pil(start: int, length: int, new: int):
    picture = np.asarray(photos(1))[0]
    box = Image.fromarray(picture[start : start + length, start : start + length])
    expected = np.asarray(box.resize((new, new), Image.Resampling.BILINEAR), float)
    places, weights = distort.resize_taps(
        jnp.full(1, float(start)), jnp.full(1, float(length)), 20, new
    )
    matrix = np.zeros((new, 20))
    np.add.at(matrix, (np.arange(new), np.asarray(places)[:, 0]), np.asarray(weights)[:, 0])
    found = np.einsum("iy,jx,yxc->ijc", matrix, matrix, picture)
    np.testing.assert_allclose(found, expected, atol=1.0)  # PIL rounds to whole numbers, twice


def test_random_crop_scales_some_rectangle_of_the_image():
    """A ramp along y and one along x show where the rectangle lay."""
    ramp = np.broadcast_to(np.arange(64.0)[:, None], (64, 64))
    pictures = jnp.array(np.broadcast_to(np.stack([ramp, ramp.T, ramp], -1), (500, 64, 64, 3)))
    seen = np.asarray(random_resized_crop(pictures, KEY, (16, 16), 0.25))
    rows, columns = seen[:, :, 8, 0], seen[:, 8, :, 1]
    np.testing.assert_allclose(
        seen[..., 0], np.broadcast_to(rows[:, :, None], seen.shape[:3]), atol=1e-3
    )
    # Far from the ends, a pixel is the middle of what it covers.
    height, width = ((12 / 11 * 16 / 12) * (line[:, 13] - line[:, 2]) for line in (rows, columns))
    area, ratio = height * width / 64**2, width / height
    assert 0.24 < area.min() < 0.3
    assert 0.9 < area.max() < 1.01
    assert abs(area.mean() - 0.625) < 0.05
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.36
    large = (area > 0.75) & (area < 0.85)  # as long as the image itself, where it can't be longer
    assert 0.74 < ratio[large].min() < 0.84
    assert 1.19 < ratio[large].max() < 1.36
    assert 0 <= rows.min() < 1
    assert 62 < rows.max() <= 63
    for line, length in ((rows, height), (columns, width)):
        first = line[:, 8] - length * 8.5 / 16 + 0.5
        free = np.where(length < 63, first / np.maximum(64 - length, 1), np.nan)
        assert abs(np.nanmean(free) - 0.5) < 0.05  # anywhere between the borders


def test_a_random_crop_of_all_the_area_is_the_image_itself():
    pictures = photos(4)
    same = random_resized_crop(pictures, KEY, (20, 20), 1.0, (1.0, 1.0))
    np.testing.assert_allclose(same, pictures, atol=1e-4)


def blended(image: np.ndarray, enhancer: type, factor: float) -> np.ndarray:
    pil = Image.fromarray(np.round(image * 255).astype(np.uint8))
    return np.asarray(enhancer(pil).enhance(factor)) / 255


def test_color_jitter_of_one_kind_is_that_of_pil():
    """The factor is read off a pixel of the result, and PIL does the rest with it."""
    images = unit(50)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which, enhancer in enumerate(kinds):
        strengths = [0.0] * 4
        strengths[which] = 0.5
        seen = np.asarray(color_jitter(images, KEY, tuple(strengths)))
        factors = []
        for before, after in zip(np.asarray(images), seen, strict=True):
            candidates = np.linspace(0.5, 1.5, 101)
            errors = [np.abs(blended(before, enhancer, f) - after).max() for f in candidates]
            assert min(errors) < 0.012  # a step of the factors, and PIL's rounding
            factors.append(candidates[np.argmin(errors)])
        assert np.min(factors) < 0.6
        assert np.max(factors) > 1.4
        assert seen.min() >= 0 and seen.max() <= 1


def test_color_jitter_turns_the_hue_and_nothing_else():
    images = unit(50)
    seen = np.asarray(color_jitter(images, KEY, (0.0, 0.0, 0.0, 0.1)))
    turns = []
    for before, after in zip(np.asarray(images), seen, strict=True):
        old, new = (
            np.array([colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)]) for x in (before, after)
        )
        np.testing.assert_allclose(new[:, 1:], old[:, 1:], atol=1e-4)
        turn = (new[:, 0] - old[:, 0] + 0.5) % 1 - 0.5
        coloured = (old[:, 1] > 0.1) & (old[:, 2] > 0.1)
        assert np.ptp(turn[coloured]) < 1e-3  # one for each image
        turns.append(turn[coloured].mean())
    assert -0.1 <= np.min(turns) < -0.08
    assert 0.08 < np.max(turns) <= 0.1


def test_color_jitter_without_strength_is_the_identity():
    images = unit(3)
    np.testing.assert_array_equal(color_jitter(images, KEY, (0.0, 0.0, 0.0, 0.0)), images)


LEVEL = 0.65
"""Of strength 6.5: factors of 1.585, 5 bits left, inverted above 0.35."""


def pil_operation(name: str, image: Image.Image) -> Image.Image:
    side = image.size[0]
    middle = (side - 1) / 2
    factor = 1 + 0.9 * LEVEL
    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(factor)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "solarize":
        return ImageOps.solarize(image, 1 + int(255 * (1 - LEVEL)))
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * LEVEL))
    matrices = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, 0.3 * LEVEL, -0.3 * LEVEL * (middle + 0.5), 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * LEVEL, 1, -0.3 * LEVEL * (middle + 0.5)),
        "translate_x": (1, 0, 0.45 * LEVEL * side, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * LEVEL * side),
    }
    if name == "rotate":
        return image.rotate(30 * LEVEL, fillcolor=(128,) * 3)
    return image.transform(image.size, Image.Transform.AFFINE, matrices[name], fillcolor=(128,) * 3)


@pytest.mark.parametrize("name", distort.OPERATIONS)
def test_each_operation_of_randaugment_is_that_of_pil(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.random, "rademacher", lambda *args: jnp.ones((1, 4)))
    chosen = jnp.full((1, 4), distort.OPERATIONS.index(name))
    monkeypatch.setattr(jax.random, "randint", lambda *args: chosen)
    pictures = photos(4, 21, 21)
    seen = distort.randaugment(pictures.astype(jnp.float32) / 255, KEY, 1, 10 * LEVEL)
    for picture, found in zip(np.asarray(pictures), np.asarray(seen), strict=True):
        expected = np.asarray(pil_operation(name, Image.fromarray(picture))) / 255
        differs = np.abs(found - expected).max(axis=-1) > 1.5 / 255
        # Nearest pixels may differ where two are equally near.
        assert differs.mean() <= (0.01 if name.startswith(("rotate", "shear", "translate")) else 0)


def test_randaugment_without_operations_or_strength_is_the_identity():
    images = unit(40)
    config = AugmentConfig(randaugment=(0, 9.0))
    same = training_view(photos(4), KEY, PLAIN, config)
    np.testing.assert_array_equal(same, unit(4))
    weak = np.asarray(distort.randaugment(images, KEY, 1, 0.0))
    same = np.abs(weak - images).max(axis=(1, 2, 3)) < 1e-6
    chance = 1 / len(distort.OPERATIONS)  # autocontrast has no strength
    assert 1 - 4 * chance < same.mean() < 1


@pytest.mark.slow
def test_randaugment_changes_most_images_each_in_its_own_way():
    images = jnp.repeat(unit(1), 200, axis=0)
    for n, least in ((1, 0.85), (3, 0.97)):
        seen = np.asarray(distort.randaugment(images, KEY, n, 9.0))
        assert seen.min() >= 0 and seen.max() <= 1
        changed = np.abs(seen - images).max(axis=(1, 2, 3)) > 1e-3
        assert least < changed.mean() <= 1
    assert len({image.tobytes() for image in seen}) > 150


def test_operations_that_move_pixels_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    """Both translations of a picture are the same as a single one in both directions."""
    names = ("translate_x", "translate_y")
    chosen = jnp.array([[distort.OPERATIONS.index(name)] for name in names])
    monkeypatch.setattr(jax.random, "randint", lambda *args: chosen)
    monkeypatch.setattr(jax.random, "rademacher", lambda *args: jnp.ones((2, 1)))
    images = unit(1)
    seen = distort.randaugment(images, KEY, 2, 10.0)
    shift = round(0.45 * 20)
    np.testing.assert_allclose(seen[:, :-shift, :-shift], images[:, shift:, shift:], atol=1e-6)
    np.testing.assert_array_equal(seen[:, -shift:], 0.5)
    np.testing.assert_array_equal(seen[:, :, -shift:], 0.5)


def test_erasing_replaces_a_rectangle_by_noise():
    images = jnp.full((600, 30, 30, 3), 2.0)
    seen = np.asarray(random_erase(images, KEY, 0.5))
    noisy = seen != 2
    assert np.array_equal(noisy.all(axis=-1), noisy.any(axis=-1))
    noisy = noisy[..., 0]
    rows, columns = noisy.any(axis=2), noisy.any(axis=1)
    np.testing.assert_array_equal(noisy, rows[:, :, None] & columns[:, None, :])
    area = noisy.mean(axis=(1, 2))
    assert 0.4 < np.mean(area > 0) < 0.6
    assert 0.01 < area[area > 0].min() < 0.03
    assert 0.3 < area.max() < 0.36
    values = seen[noisy]
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert noisy.any(axis=(0, 1)).all()  # up to the borders
    assert noisy.any(axis=(0, 2)).all()
    for halves in (noisy[:, :15], noisy[:, 15:]), (noisy[:, :, :15], noisy[:, :, 15:]):
        assert abs(halves[0].mean() - halves[1].mean()) < 0.02


def solid(n: int) -> tuple[jax.Array, jax.Array]:
    """Returns images that are all of one value, their number, and numbers as labels."""
    return jnp.broadcast_to(
        jnp.arange(n, dtype=jnp.float32).reshape(-1, 1, 1, 1), (n, 10, 10, 3)
    ), jnp.arange(n)


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_mixing_gives_labels_the_shares_of_the_images(mixup: float, cutmix: float):
    images, labels = solid(40)
    for seed in range(4):
        mixed, targets = mix(images, labels, jax.random.key(seed), 40, mixup, cutmix)
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
        value = np.asarray(mixed.mean(axis=(1, 2, 3)))
        np.testing.assert_allclose(targets @ jnp.arange(40.0), value, atol=1e-4)
        others = np.asarray(targets).copy()
        others[np.arange(40), np.arange(40)] = 0
        others[np.arange(40), np.arange(40) - 1] = 0
        assert others.max() == 0  # each with the one before it


def test_mixup_is_a_mean_and_cutmix_a_rectangle():
    images, labels = solid(100)
    mixed, targets = mix(images, labels, KEY, 100, 1.0, 0.0)
    assert np.asarray(jnp.ptp(mixed, axis=(1, 2, 3))).max() == 0
    own = np.diagonal(targets)
    assert own.min() < 0.1 < 0.9 < own.max()  # Beta(1, 1) is uniform, and each image's own
    assert abs(own.mean() - 0.5) < 0.1
    pasted, targets = mix(images, labels, KEY, 100, 0.0, 1.0)
    other = np.asarray(pasted[..., 0] != images[..., 0])
    rows, columns = other.any(axis=2), other.any(axis=1)
    np.testing.assert_array_equal(other, rows[:, :, None] & columns[:, None, :])
    np.testing.assert_allclose(np.diagonal(targets), 1 - other.mean(axis=(1, 2)), atol=1e-6)
    assert abs(np.diagonal(targets).mean() - 0.5) < 0.1


def test_mixing_draws_one_of_the_two_for_each_batch():
    images, labels = solid(20)
    kinds = set()
    for seed in range(12):
        mixed, _ = mix(images, labels, jax.random.key(seed), 20, 1.0, 1.0)
        kinds.add(bool(jnp.ptp(mixed, axis=(1, 2, 3)).max() > 0))
    assert kinds == {True, False}


def test_mixing_without_either_changes_nothing():
    images, labels = solid(5)
    same, targets = mix(images, labels, KEY, 5, 0.0, 0.0)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(targets, np.eye(5))
