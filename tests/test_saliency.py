"""Heat maps of networks whose answers are known to rest on a single place."""

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import augment, models, saliency

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
MODEL = models.SimpleCNN(n_classes=2, dense=(), widths=(2,))
CORNER = np.zeros((1, 16, 16, 3), np.uint8)
CORNER[0, :4, 12:] = 255


def watching(row: int, column: int) -> dict:
    """Returns variables with which class 1 is the red of the pooled pixel at a place, times 8."""
    variables = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(jnp.zeros_like, variables)
    params = variables["params"]
    params["conv1"]["kernel"] = params["conv1"]["kernel"].at[1, 1, 0, 0].set(1.0)
    head = params["head"]["kernel"].reshape(8, 8, 2, 2).at[row, column, 0, 1].set(8.0)
    params["head"]["kernel"] = head.reshape(-1, 2)
    return variables


def test_occlusion_is_what_a_hidden_square_costs():
    """Squares of 4 pixels, every 2: gray is 128 / 255 of what it hides."""
    found = saliency.occlusion(MODEL, watching(0, 7), CORNER[0], 1, **UNIT)
    assert found.shape == (7, 7)
    expected = np.zeros((7, 7))
    expected[0, 6] = 8 * (1 - 128 / 255)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_maps_explain_the_class_that_is_asked_for():
    """Class 1 wins by the upper right corner, and class 0 rests on the lower left one."""
    variables = watching(0, 7)
    variables["params"]["head"]["kernel"] += watching(7, 0)["params"]["head"]["kernel"][:, ::-1] / 2
    image = CORNER[0] + CORNER[0, ::-1, ::-1]
    assert np.asarray(MODEL.apply(variables, jnp.float32(image[None]) / 255)).argmax() == 1
    drops = saliency.occlusion(MODEL, variables, image, 0, **UNIT)
    expected = np.zeros((7, 7))
    expected[6, 0] = 4 * (1 - 128 / 255)
    np.testing.assert_allclose(drops, expected, atol=1e-5)
    images = np.stack([image, image])
    cam = saliency.grad_cam(MODEL, variables, images, np.array([0, 1]), "pool", **UNIT)
    reds = np.float32(image[..., 0] == 255) / 256
    np.testing.assert_allclose(cam, [4 * reds, 8 * reds], atol=1e-6)


def test_grad_cam_is_the_sum_of_maps_weighted_by_their_mean_slope():
    variables = watching(0, 7)
    found = saliency.grad_cam(MODEL, variables, CORNER, np.array([1]), "pool", **UNIT)
    assert found.shape == (1, 16, 16)
    # The first map alone counts, by 8 / (16 * 16): the slope of one of its pixels.
    expected = np.float32(CORNER[..., 0] == 255) * 8 / 256
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grad_cam_equals_its_definition_on_a_random_network():
    model = models.VGG(n_classes=3, dense=(8,), blocks=((4,), (5,)), activation="tanh")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    normal = augment.normalize(jnp.array(images), **UNIT)
    given = jax.jit(lambda images: models.layer_inputs(model, variables, images))(normal)
    maps = np.asarray(given["block2/pool"], np.float64)

    @jax.jit
    def logits(maps: jax.Array) -> jax.Array:
        with models.LayerCache("block2/pool", (8, 8, 3)).replacing(maps) as placeholders:
            return model.apply(variables, placeholders)

    targets = np.asarray(logits(jnp.float32(maps))).argmax(axis=1)

    def logit(maps: np.ndarray) -> np.ndarray:
        return np.asarray(logits(jnp.float32(maps)))[np.arange(2), targets]

    weights = np.zeros((2, 5))
    for channel in range(5):  # The mean slope, by a central difference of the whole map.
        moved = np.zeros(maps.shape)
        moved[..., channel] = 1e-3
        weights[:, channel] = (logit(maps + moved) - logit(maps - moved)) / (2e-3 * 16)
    sums = np.einsum("nc,nhwc->nhw", weights, maps)
    assert sums.max() > 0.01 and sums.min() < -0.01
    expected = np.maximum(sums, 0)
    found = saliency.grad_cam(model, variables, images, targets, "block2/pool", **UNIT)
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max())
