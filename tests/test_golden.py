"""The first losses of two networks: they find arithmetic that changed unintentionally.

`python tests/test_golden.py` prints the losses as they are now.
"""

import sys

import numpy as np
import pytest
from helpers.data import noise
from helpers.training import edit, run

from cnn_jax import configs, data
from cnn_jax.data import ImageDataset, Split

STEPS = 20

LOSSES = {
    "quickstart": """
        2.3139 2.3045 2.3043 2.3089 2.2948 2.2875 2.3016 2.3114 2.2921 2.3114
        2.3026 2.3079 2.2886 2.2942 2.2947 2.2998 2.2796 2.2786 2.2861 2.2867
    """,
    "resnet_small": """
        2.6769 2.6858 2.1647 2.5072 2.5938 2.6019 2.4250 2.3164 2.7383 2.5661
        2.3743 2.1845 2.2995 2.4810 2.6370 2.3948 2.1926 2.3255 2.4226 2.3720
    """,
}
_RATES = {"quickstart": 0.002, "resnet_small": 0.003}


def random_images() -> ImageDataset:
    """Returns 160 training images of noise, labelled at random: ten steps with batches of 16."""
    images, labels = noise(160, 16, 16, 3), noise(160, seed=1) % 10
    split = Split(images, labels.astype(np.int32))
    return ImageDataset("noise", "made in a test", tuple("abcdefghij"), split, split, split, ())


def first_losses(name: str) -> np.ndarray:
    """Returns the losses of a config's first steps, for CIFAR-10 on random images instead.

    The learning rate is far below the config's. With more, the differences of rounding between
    one CPU and another, and between its kernels and XLA's, grow past the tolerance in 20 steps.
    """
    config = configs.get(name)
    config = edit(config, optim={"learning_rate": _RATES[name]})
    if config.data.name == "digits":
        return run(config, data.load(config.data, config.runtime.cache_dir), STEPS)[1]
    config = edit(config, train={"batch_size": 16, "epochs": 2})
    return run(config, random_images(), STEPS)[1]


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_losses_are_the_recorded_ones(name: str):
    changed = (
        f"The first losses of {name} differ from the recorded ones. If you did not intend that, "
        "git bisect finds the change that caused it. If you did, say so in the commit message, and "
        "replace the list in tests/test_golden.py by what this command prints: "
        f"python tests/test_golden.py {name}"
    )
    recorded = np.array(LOSSES[name].split(), float)
    np.testing.assert_allclose(first_losses(name), recorded, atol=1e-3, rtol=0, err_msg=changed)


if __name__ == "__main__":
    for name in sys.argv[1:] or LOSSES:
        print(name, *(f"{loss:.4f}" for loss in first_losses(name)))
