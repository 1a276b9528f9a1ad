"""Heat maps of networks whose predictions are known to depend on a single place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import noise
from helpers.predictors import random_predictor

from cnn_jax import augment, saliency
from cnn_jax.config import Config, ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.models import inspection
from cnn_jax.predictor import Predictor

CONFIG = Config(model=ModelConfig(name="simple_cnn", blocks=((2,),), dense=()))
CORNER = np.zeros((1, 16, 16, 3), np.uint8)
CORNER[0, :4, 12:] = 255


def corner_predictor(*places: tuple[int, int, int, float]) -> Predictor:
    """Returns a network whose logit of a class is the red of one pooled pixel, times a factor.

    A place is (row, column, class, factor); all others have no influence.
    """
    predictor = random_predictor(CONFIG, ("a", "b"), (16, 16, 3))
    params = jax.tree.map(jnp.zeros_like, predictor.variables["params"])
    params["conv1"]["kernel"] = params["conv1"]["kernel"].at[1, 1, 0, 0].set(1.0)
    head = params["head"]["kernel"].reshape(8, 8, 2, 2)
    for row, column, label, factor in places:
        head = head.at[row, column, 0, label].set(factor)
    params["head"]["kernel"] = head.reshape(-1, 2)
    variables = {**predictor.variables, "params": params}
    return Predictor(CONFIG, predictor.model, variables, ("a", "b"), (16, 16, 3))


def test_occlusion_is_the_drop_in_the_logit_where_a_square_hides_the_image():
    """Squares of 4 pixels, every 2: gray is 128 / 255 of the white that it hides."""
    found = saliency.occlusion(corner_predictor((0, 7, 1, 8.0)), CORNER[0], 1)
    assert found.shape == (7, 7)
    expected = np.zeros((7, 7))
    expected[0, 6] = 8 * (1 - 128 / 255)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_maps_explain_the_class_that_is_asked_for():
    """Class 1 wins by the upper right corner; class 0 depends on the lower left one."""
    predictor = corner_predictor((0, 7, 1, 8.0), (7, 0, 0, 4.0))
    image = CORNER[0] + CORNER[0, ::-1, ::-1]
    assert predictor.logits(image[None]).argmax() == 1
    drops = saliency.occlusion(predictor, image, 0)
    expected = np.zeros((7, 7))
    expected[6, 0] = 4 * (1 - 128 / 255)
    np.testing.assert_allclose(drops, expected, atol=1e-5)
    images = np.stack([image, image])
    cam = saliency.grad_cam(predictor, images, np.array([0, 1]), "conv1")
    reds = np.float32(image[..., 0] == 255) / 256
    np.testing.assert_allclose(cam, [4 * reds, 8 * reds], atol=1e-6)


def test_grad_cam_weighs_each_map_by_its_mean_gradient():
    found = saliency.grad_cam(corner_predictor((0, 7, 1, 8.0)), CORNER, np.array([1]), "conv1")
    assert found.shape == (1, 16, 16)
    # Only the first map counts, by 8 / (16 * 16): the gradient of one of its pixels is 8.
    expected = np.float32(CORNER[..., 0] == 255) * 8 / 256
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grad_cam_equals_its_definition_on_a_random_network():
    model = ModelConfig(name="vgg", blocks=((4,), (5,)), dense=(8,), activation="tanh")
    predictor = random_predictor(Config(model=model), seed=1)
    images, layer = noise(2, 8, 8, 3), "block2/conv1"
    maps = predictor.activations(images, [layer])[layer].astype(np.float64)
    normal = augment.normalize(jnp.array(images), predictor.config.data.normalize)

    @jax.jit
    def logits(maps: jax.Array) -> jax.Array:
        with inspection.replaced({layer: maps}):
            return predictor.model.apply(predictor.variables, normal)

    targets = np.asarray(logits(jnp.float32(maps))).argmax(axis=1)

    def logit(maps: np.ndarray) -> np.ndarray:
        return np.asarray(logits(jnp.float32(maps)))[np.arange(2), targets]

    weights = np.zeros((2, 5))
    for channel in range(5):  # The mean gradient, by a central difference of the whole map.
        moved = np.zeros(maps.shape)
        moved[..., channel] = 1e-3
        weights[:, channel] = (logit(maps + moved) - logit(maps - moved)) / (2e-3 * 16)
    sums = np.einsum("nc,nhwc->nhw", weights, maps)
    assert sums.max() > 0.01 and sums.min() < -0.01
    expected = np.maximum(sums, 0)
    found = saliency.grad_cam(predictor, images, targets, layer)
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max())


def test_grad_cam_follows_the_branches_of_a_residual_network():
    """By hand, from what modules return: logits = head(mean(relu(norm2 + shortcut_norm)))."""
    model = ModelConfig(name="resnet_small", blocks=((4,), (6,)), dense=())
    predictor = random_predictor(Config(model=model), seed=2)
    images, targets = noise(3, 8, 8, 3), np.array([2, 0, 1])
    block = "stage2/block1"
    norm, shortcut = (f"{block}/norm2", f"{block}/shortcut_norm")
    found = predictor.activations(images, [norm, shortcut, block])
    joined = np.maximum(found[norm] + found[shortcut], 0)
    np.testing.assert_allclose(found[block], joined, atol=1e-6)
    slopes = np.asarray(predictor.variables["params"]["head"]["kernel"])[:, targets].T / 16
    active = found[block] > 0
    for layer, gradient in (
        (block, np.ones(active.shape) * slopes[:, None, None]),
        (norm, active * slopes[:, None, None]),
    ):
        weights = gradient.mean(axis=(1, 2), keepdims=True)
        expected = np.maximum((weights * found[layer]).sum(axis=-1), 0)
        assert expected.max() > 0.001
        cam = saliency.grad_cam(predictor, images, targets, layer)
        np.testing.assert_allclose(cam, expected, atol=1e-6, err_msg=layer)


def test_grad_cam_refuses_modules_without_feature_maps():
    predictor = corner_predictor((0, 7, 1, 8.0))
    with pytest.raises(UserError, match="head returns no feature maps"):
        saliency.grad_cam(predictor, CORNER, np.array([1]), "head")
    with pytest.raises(UserError, match=r"conv2.*did you mean conv1\?"):
        saliency.grad_cam(predictor, CORNER, np.array([1]), "conv2")
