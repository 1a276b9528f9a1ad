"""A worker that trains in JAX; started by speed.py.

Usage: python jax_step.py CONFIG BATCH_SIZE KIND. KIND is float32 or bfloat16 (this project's
compiled segment), step (its step in a Python loop), plain (nn.Conv, nn.max_pool, optax and a Python
loop) or gemm (each step is a matrix product, the machine's rate).

python jax_step.py CONFIG BATCH_SIZE export PATH trains nothing: PATH.npz and PATH.json receive what
torch_step.py needs to start from the same parameters and see the same batches. By a process of its
own, whose copies of the parameters count in nobody's peak memory.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training_images
from worker import serve

from cnn_jax import configs, mesh, trees
from cnn_jax.config import Config
from cnn_jax.fit import compile_segment
from cnn_jax.kernels import cores
from cnn_jax.step import Batch, Setup, epoch_order, init_state, train_step

Runner = Callable[[int], list[float]]
"""Runs so many steps and returns their losses."""

N_IMAGES = 4096
GEMM_SIZE = 2048


def segment_runner(config: Config) -> Runner:
    """Returns a function that runs steps of this project's compiled segment."""
    dataset = training_images.repeated(N_IMAGES)
    setup = Setup.of(config, dataset)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    state = init_state(setup, init_key)
    segment = compile_segment(config, setup, dataset, state, train_key)

    def run(n_steps: int) -> list[float]:
        nonlocal state
        state, history = segment(state, n_steps)
        return (history.sums.loss / history.sums.count).tolist()

    return run


def step_runner(config: Config) -> Runner:
    """Returns a function that calls this project's step in a Python loop, without a segment."""
    dataset = training_images.repeated(N_IMAGES)
    setup = Setup.of(config, dataset)
    state = init_state(setup, jax.random.key(0))
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    rng, base_key = np.random.default_rng(1), jax.random.key(1)

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, labels, index):
        index = mesh.shard(index)
        batch = Batch(images[index], labels[index], jnp.ones(len(index)))
        key = jax.random.fold_in(base_key, state.step)
        state, totals, _ = train_step(setup, state, batch, key, with_norm=False)
        return mesh.keep_placed(state), totals

    def run(n_steps: int) -> list[float]:
        nonlocal state
        sums = []
        for _ in range(n_steps):
            index = rng.integers(0, N_IMAGES, config.train.batch_size)
            state, totals = step(state, images, labels, index)
            sums.append(totals)
        jax.block_until_ready(state)
        return [float(totals.loss / totals.count) for totals in sums]

    return run


def write_spec(config: Config, path: str) -> None:
    """Writes what torch_step.py reads: the start, the images, and their order in epoch 0."""
    dataset = training_images.repeated(N_IMAGES)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = init_state(Setup.of(config, dataset), init_key).params
    order_key = jax.random.split(train_key)[0]
    order = epoch_order(order_key, jnp.int32(0), N_IMAGES, config.train.batch_size)
    arrays = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(params).items()}
    arrays |= {"images": dataset.train.images, "labels": dataset.train.labels}
    np.savez(f"{path}.npz", **arrays)  # pyright: ignore[reportArgumentType]
    spec = {
        "name": config.model.name,
        "blocks": config.model.blocks,
        "dense": config.model.dense,
        "dropout": config.model.dropout,
        "learning_rate": config.optim.learning_rate,
        "momentum": config.optim.momentum,
        "order": np.asarray(order).tolist(),
        "arrays": f"{path}.npz",
    }
    with open(f"{path}.json", "w") as file:
        json.dump(spec, file)


class Plain(nn.Module):
    """The same network as most people would write it."""

    blocks: tuple[tuple[int, ...], ...]
    dense: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits, with dropout."""
        for widths in self.blocks:
            for width in widths:
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        for width in self.dense:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        return nn.Dense(10)(x)


def plain_runner(config: Config) -> Runner:
    """Returns a function that runs a Python loop of jitted steps, which donate their state."""
    dataset = training_images.repeated(N_IMAGES)
    images, labels = dataset.train.images, dataset.train.labels
    model = Plain(config.model.blocks, config.model.dense, config.model.dropout)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(keys, jnp.zeros((1, 32, 32, 3)))
    optimizer = optax.sgd(config.optim.learning_rate, momentum=config.optim.momentum)
    state = params, optimizer.init(params)
    rng = np.random.default_rng(1)

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, labels, key):
        params, opt_state = state

        def mean_loss(params):
            logits: Any = model.apply(params, images, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def run(n_steps: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(n_steps):
            index = rng.integers(0, N_IMAGES, config.train.batch_size)
            batch = images[index].astype(np.float32) / 255
            key = jax.random.key(int(rng.integers(2**31)))
            state, loss = step(state, batch, labels[index], key)
            losses.append(loss)
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    return run


def gemm_runner() -> Runner:
    """Returns a function whose step is a float32 matrix product of GEMM_SIZE cubed."""
    a = jnp.ones((GEMM_SIZE, GEMM_SIZE))
    product = jax.jit(jnp.dot)

    def run(n_steps: int) -> list[float]:
        for _ in range(n_steps):
            product(a, a).block_until_ready()
        return []

    return run


def main(name: str, batch_size: str, kind: str, path: str = "") -> None:
    """Serves training steps, or writes where they start."""
    config = configs.get(name)
    settings = replace(config.train, batch_size=int(batch_size))
    runtime = replace(config.runtime, segment_steps=32)
    # At the chapter's 0.01 the first steps are so unstable that rounding grows tenfold every three
    # of them, between any two implementations: XLA's own convolutions leave PyTorch's as fast.
    optim = replace(config.optim, learning_rate=0.001)
    config = replace(config, train=settings, optim=optim, runtime=runtime)
    if kind == "gemm":
        return serve(gemm_runner())
    if kind == "plain":
        return serve(plain_runner(config))
    cores.use_cores(int(batch_size))
    if kind == "export":
        return write_spec(config, path)
    if kind == "step":
        return serve(step_runner(config))
    model = replace(config.model, dtype=kind)
    return serve(segment_runner(replace(config, model=model)))


if __name__ == "__main__":
    main(*sys.argv[1:])
