"""Augmentation: what may change, what may not, and that a key decides it."""

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import augment
from cnn_jax.config import AugmentConfig

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
