"""Augmentation: what may change, what may not, and that a key decides it."""

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import augment

KEY = jax.random.key(3)
RAMP = jnp.arange(2 * 6 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 6, 3) + 1
MANY = jnp.repeat(RAMP[:1], 400, axis=0)


def test_normalize_scales_bytes_to_the_unit_interval():
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    unit = augment.normalize(pixels, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(unit[0, 0, 0], [0, 0.2, 1], rtol=1e-6)
    assert unit.dtype == jnp.float32


def test_normalize_shifts_and_scales_each_channel():
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    values = augment.normalize(pixels, (0.1, 0.2, 0.5), (0.1, 1.0, 0.25))
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
    same = augment.augment(RAMP, KEY, flip_images=False, translate_pixels=0, cutout_side=0)
    np.testing.assert_array_equal(same, RAMP)


def test_augment_is_a_function_of_the_key():
    def run(key: jax.Array) -> jax.Array:
        return augment.augment(MANY, key, flip_images=True, translate_pixels=2, cutout_side=2)

    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert not np.array_equal(run(KEY), run(jax.random.key(4)))


def test_augment_gives_each_change_its_own_key():
    flips, shifts, holes = jax.random.split(KEY, 3)
    expected = augment.cutout(augment.translate(augment.flip(MANY, flips), shifts, 1), holes, 2)
    changed = augment.augment(MANY, KEY, flip_images=True, translate_pixels=1, cutout_side=2)
    np.testing.assert_array_equal(changed, expected)
