"""A worker that runs a network for photos in JAX; started by photos.py.

Usage: python photos_jax.py NETWORK MODE DTYPE. MODE is train (this project's compiled segment) or
features (its predictor, in evaluation).

python photos_jax.py NETWORK export PATH runs nothing: PATH, an .npz, receives the initial variables
by name, the images and the labels, so that PyTorch can start from the same.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import training_images
from worker import serve

from cnn_jax import trees
from cnn_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from cnn_jax.data import ImageDataset
from cnn_jax.fit import compile_segment
from cnn_jax.kernels import cores
from cnn_jax.predictor import Predictor
from cnn_jax.step import Setup, init_state

BATCH_SIZE = 32
STEPS = 64
"""Of an epoch. A program allocates its memory once a segment, so a segment of one step would time
that."""
HALF = (0.5, 0.5, 0.5)


def make_config(network: str, dtype: Any) -> Config:
    """Returns a config that trains all layers by SGD."""
    return Config(
        name=network,
        data=DataConfig(image_size=224, normalize=(HALF, HALF)),
        model=ModelConfig(name=network, blocks=(), dense=(), dtype=dtype),
        # So small that rounding does not grow from step to step, between any two implementations.
        optim=OptimConfig(learning_rate=1e-4),
        # The photos are one batch, which an epoch goes through again and again, as a run does.
        train=TrainConfig(batch_size=BATCH_SIZE, min_epoch_steps=STEPS),
        runtime=RuntimeConfig(segment_steps=STEPS),
    )


def training_runner(config: Config, dataset: ImageDataset) -> Callable[[int], list[float]]:
    """Returns a function that trains for so many steps and returns their losses."""
    setup = Setup.of(config, dataset)
    state = init_state(setup, jax.random.key(0))
    segment = compile_segment(config, setup, dataset, state, jax.random.key(1))

    def run(n_steps: int) -> list[float]:
        nonlocal state
        if n_steps > STEPS - int(state.step) % STEPS:
            raise SystemExit(f"a timing has at most {STEPS} steps, and all must fit into as many")
        state, history = segment(state, n_steps)
        return (history.sums.loss / history.sums.count).tolist()

    return run


def features_runner(config: Config, dataset: ImageDataset) -> Callable[[int], list[float]]:
    """Returns a function that computes features of the batch so many times, and returns sums."""
    setup, images = Setup.of(config, dataset), dataset.train.images
    state = init_state(setup, jax.random.key(0))
    variables = state.eval_variables
    predictor = Predictor(config, setup.model, variables, dataset.class_names, (224, 224, 3))

    def run(n_steps: int) -> list[float]:
        found = [predictor.activations(images, ["pool"])["pool"] for _ in range(n_steps)]
        return [float(np.abs(features.astype(np.float32)).mean()) for features in found]

    return run


def export(config: Config, dataset: ImageDataset, path: str) -> None:
    """Writes what photos_torch.py starts from."""
    state = init_state(Setup.of(config, dataset), jax.random.key(0))
    arrays = trees.named_leaves(state.params) | trees.named_leaves(state.batch_stats)
    arrays = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    arrays |= {"images": dataset.train.images, "labels": dataset.train.labels}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def main(network: str, mode: str, last: str) -> None:
    """Serves steps or features, or writes where they start."""
    cores.use_cores(BATCH_SIZE)
    dataset = training_images.photos(BATCH_SIZE)
    if mode == "export":
        return export(make_config(network, "float32"), dataset, last)
    runner = training_runner if mode == "train" else features_runner
    return serve(runner(make_config(network, last), dataset))


if __name__ == "__main__":
    main(*sys.argv[1:])
