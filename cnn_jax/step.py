"""Training as pure functions: the state, one step, and the compiled segment of steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax import augment, kernels, losses, mesh, mixing, models, optim, trees
from cnn_jax.config import Config, InitConfig, RuntimeConfig, TrainConfig
from cnn_jax.data import ImageDataset, stream
from cnn_jax.models import inspection
from cnn_jax.order import epoch_order

Images = UInt8[Array, "n height width channels"]


@dataclass(frozen=True)
class Setup:
    """The static part of training: all that compiled code depends on beside its arrays.

    It is hashable, and equal setups share one compiled program.
    """

    config: Config
    n_classes: int
    image_shape: tuple[int, int, int]
    """Of what the network sees: height, width and channels."""
    steps_per_epoch: int
    passes: int = 1
    """How often an epoch goes through the training images."""
    class_weights: tuple[float, ...] = ()
    """Factor of each class' losses, with a mean of 1 over the training images; empty: none."""
    epoch: int = 0
    """The epoch whose `optim.groups` hold."""
    cached: str = ""
    """If set, training gets the outputs of the module of this name in place of images."""
    streamed: bool = False
    """Whether a segment gets the batches of its own steps in place of all images."""

    @classmethod
    def of(cls, config: Config, dataset: ImageDataset) -> "Setup":
        """Returns the setup of a config and the data set that it trains on.

        It leaves out the fields that no compiled program depends on, such as the seed. A batch is
        not larger than the training set, and a segment of a streamed one is short enough for its
        images to fit into memory.
        """
        n = len(dataset.train)
        batch_size = usable_batch_size(config.train, n)
        segment_steps = config.runtime.segment_steps
        if dataset.is_streamed:
            batch_bytes = batch_size * math.prod(dataset.image_shape)
            segment_steps = min(segment_steps, max(stream.CHUNK_BYTES // batch_bytes, 1))
        compiled = replace(
            config,
            name="",
            seed=0,
            data=replace(config.data, dir=""),
            init=InitConfig(),
            train=replace(config.train, batch_size=batch_size),
            runtime=RuntimeConfig(segment_steps=segment_steps),
        )
        passes = max(-(-config.train.min_epoch_steps * batch_size // n), 1)
        n_classes, weights = len(dataset.class_names), ()
        if config.train.class_weights == "balanced":
            counts = np.bincount(dataset.train.labels, minlength=n_classes)
            weights = tuple((n / (n_classes * counts)).tolist())
        return cls(
            config=compiled,
            n_classes=n_classes,
            image_shape=config.data.seen(dataset.image_shape),
            passes=passes,
            steps_per_epoch=-(-passes * n // batch_size),
            class_weights=weights,
            streamed=dataset.is_streamed,
        )

    def at(self, epoch: int) -> "Setup":
        """Returns the setup of the phase of `optim.groups` that an epoch belongs to."""
        return replace(self, epoch=[start for start, _ in self._all_phases if start <= epoch][-1])

    @cached_property
    def model(self) -> nn.Module:
        """The network."""
        return models.build(self.config.model, self.n_classes)

    @cached_property
    def _all_phases(self) -> optim.Phases:
        return optim.make_phases(self.config.optim, partial(models.last_block, self.model))

    @cached_property
    def phases(self) -> optim.Phases:
        """The phases of `optim.groups` up to this one."""
        return tuple(phase for phase in self._all_phases if phase[0] <= self.epoch)

    @property
    def groups(self) -> optim.Groups:
        """The learning-rate multipliers that hold; a parameter whose multiplier is None is frozen.

        Only the other parameters have gradients and optimizer state.
        """
        return self.phases[-1][1]

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, for a learning rate of 1."""
        return optim.make_optimizer(self.config.optim, self.phases)

    @cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        return optim.make_schedule(
            self.config.optim, self.steps_per_epoch, self.config.train.epochs
        )

    def rate_share(self, name: str, step: Int[Array, ""]) -> Float[Array, ""] | float:
        """Returns the share of the learning rate that a parameter has whose schedule ends early.

        1 for all others.
        """
        end = optim.end_of(self._all_phases, name)
        if end is None:
            return 1.0
        per_epoch, epochs = self.steps_per_epoch, self.config.train.epochs
        whole, own = (
            jnp.asarray(optim.make_schedule(self.config.optim, per_epoch, n)(step))
            for n in (epochs, min(end, epochs))
        )
        return jnp.where(own > 0, own / whole, 0.0)

    @cached_property
    def recomputed(self) -> frozenset[str]:
        """The blocks whose layers are computed again in the backward pass: see `train.remat`."""
        if not self.config.train.remat:
            return frozenset()
        return inspection.blocks(self.model, self.image_shape)

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        return self.steps_per_epoch * self.config.train.epochs


def usable_batch_size(train: TrainConfig, n: int) -> int:
    """Returns `train.batch_size`, cut to a training set of `n` images if that is smaller.

    What would be computed beyond is padding, but for a few examples that make it divisible by the
    number of devices and by `train.accumulate`.
    """
    divisor = math.lcm(train.accumulate, mesh.device_count())
    return min(train.batch_size, -(-n // divisor) * divisor)


@struct.dataclass
class Sums:
    """Totals over examples, to be divided once on the host."""

    loss: Float[Array, "*steps"]
    correct: Float[Array, "*steps"]
    count: Float[Array, "*steps"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> "Sums":
        """Returns empty totals."""
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))


@struct.dataclass
class History:
    """Metrics of each step of a segment, padded with zeros to `runtime.segment_steps`."""

    sums: Sums
    learning_rate: Float[Array, "*steps"]
    grad_norm: Float[Array, "*steps"]
    """Global norm of the gradient, -1 where `train_step` does not compute it."""


@struct.dataclass
class TrainState:
    """Everything that training changes: together with the config it determines all that follows."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    """Averages of the trainable parameters and of the batch statistics, by collection, or None."""
    epoch_sums: Sums
    """Totals of the current epoch so far."""

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are evaluated, and whose hash a run reports."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        return variables if self.average is None else trees.combine(self.average, variables)


@struct.dataclass
class Batch:
    """Examples on the device; `mask` is 1 for real ones and 0 for padding.

    `images` are pixels, or with `Setup.cached` the outputs of that module.
    """

    images: Array
    labels: Int[Array, "*parts batch"]
    mask: Float[Array, "*parts batch"]


@partial(jax.jit, static_argnames="setup")
def init_state(setup: Setup, key: Key[Array, ""]) -> TrainState:
    """Returns the state before the first step, a function of `key` alone."""
    variables = setup.model.init(key, jnp.zeros((1, *setup.image_shape)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=setup.optimizer.init(optim.trainable_part(params, setup.groups)),
        average=start_average(setup, params, batch_stats),
        epoch_sums=Sums.zeros(),
    )
    return mesh.keep_placed(state)


def start_average(setup: Setup, params: Any, batch_stats: Any) -> Any:
    """Returns the average before the first step, or None if the config asks for none."""
    if optim.make_average_decay(setup.config.train, setup.total_steps) is None:
        return None
    return {"params": optim.trainable_part(params, setup.groups), "batch_stats": batch_stats}


@partial(jax.jit, static_argnames="setup")
def enter_phase(setup: Setup, state: TrainState) -> TrainState:
    """Returns the state with the optimizer state and averages that another phase's setup needs.

    What stays trainable keeps its own; what is frozen from now on keeps its last value.
    """
    fresh = {
        "opt_state": setup.optimizer.init(optim.trainable_part(state.params, setup.groups)),
        "average": start_average(setup, state.params, state.batch_stats),
    }
    old = {name: getattr(state, name) for name in fresh}
    state = replace(state, **trees.replace_named(fresh, trees.named_leaves(old)))
    return mesh.keep_placed(state)


def take_batch(
    setup: Setup,
    images: Array,
    labels: Int[Array, "n"],
    index: Int[Array, "batch"],
    key: Key[Array, ""],
    epoch: Int[Array, ""],
) -> Batch:
    """Returns the examples that a row of `epoch_order` names; `key` is the same for all steps.

    `images` are those of the whole training set or, with `setup.streamed`, of this step alone.
    """
    examples = jnp.maximum(index, ~index)
    taken = images if setup.streamed else images[examples]
    if setup.config.augment.flip == "alternate":
        taken = augment.alternate_flip(taken, key, examples, epoch)
    return Batch(taken, labels[examples], (index >= 0).astype(jnp.float32))


def train_step(
    setup: Setup,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    with_norm: Array | bool = True,
) -> tuple[TrainState, Sums, Float[Array, ""]]:
    """Returns the state after one update on `batch`, the batch's totals, and the gradient's norm.

    Pure: dropout and augmentation are functions of `key`, which must be unique to the step. An
    update whose loss (with `train.skip_nonfinite` also: whose gradient) is not finite is left out.
    The norm costs one more pass over the gradient, so it is computed only if `with_norm` is true,
    the loss is not finite, or `train.skip_nonfinite` is set; otherwise it is -1.
    """
    skips = setup.config.train.skip_nonfinite
    trainable = optim.trainable_part(state.params, setup.groups)

    def mean_loss(trainable: Any, batch_stats: Any, part: Batch, key: Array) -> tuple[Array, Any]:
        params = trees.combine(trainable, state.params)
        dropout_key, view_key = jax.random.split(key)
        images, targets = _training_view(setup, part, view_key)
        with inspection.frozen_in_eval_mode(params, trainable):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, batch_stats = _forward(setup, variables, images, dropout_key)
        losses_ = _weighted_losses(setup, logits, targets) * part.mask
        labels = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
        correct = (jnp.argmax(logits, axis=-1) == labels) * part.mask
        sums = Sums(jnp.sum(losses_), jnp.sum(correct), jnp.sum(part.mask))
        return sums.loss / jnp.sum(batch.mask), (sums, batch_stats)

    gradient = _accumulated(setup, jax.grad(mean_loss, has_aux=True))
    grads, (sums, batch_stats) = gradient(trainable, state.batch_stats, batch, key)

    finite = jnp.isfinite(sums.loss)
    wanted = with_norm | ~finite | skips
    norm = kernels.norm_if(wanted, grads)
    finite = finite & jnp.isfinite(norm) if skips else finite

    def update(state: TrainState) -> TrainState:
        trainable = optim.trainable_part(state.params, setup.groups)
        trainable = optim.renormalize(setup.config.optim, trainable)
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, _at_rates(setup, updates, state.step))
        new, average = _averaged(setup, state, {"params": trainable, "batch_stats": batch_stats})
        return replace(
            state,
            params=trees.combine(new["params"], state.params),
            batch_stats=new["batch_stats"],
            opt_state=opt_state,
            average=average,
            epoch_sums=jax.tree.map(jnp.add, state.epoch_sums, sums),
        )

    state = kernels.update_if(finite, update, state)
    return replace(state, step=state.step + 1), sums, norm


def learning_rate(setup: Setup, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the learning rate of the step after `step` steps, skipped ones included."""
    return jnp.asarray(setup.schedule(step), jnp.float32)


def _at_rates(setup: Setup, updates: Any, step: Int[Array, ""]) -> Any:
    """Returns updates of a learning rate of 1 at the rates that the parameters have in a step."""
    rate = learning_rate(setup, step)
    return trees.map_named(lambda name, u: rate * setup.rate_share(name, step) * u, updates)


def _training_view(setup: Setup, batch: Batch, key: Array) -> tuple[Array, Array]:
    """Returns what the network is trained on: its input, and labels or target probabilities.

    Only mixing makes probabilities of labels. With `Setup.cached` the examples stay as they are.
    """
    config = setup.config.augment
    if setup.cached:
        return batch.images, batch.labels
    images = augment.training_view(batch.images, key, setup.config.data, config)
    if not (config.mixup or config.cutmix):
        return images, batch.labels
    return mixing.mix(images, batch.labels, key, setup.n_classes, config.mixup, config.cutmix)


def _weighted_losses(
    setup: Setup, logits: Float[Array, "batch classes"], targets: Array
) -> Float[Array, "batch"]:
    """Returns the loss of each example, multiplied by the weight of its class."""
    losses_ = losses.from_config(setup.config.train)(logits, targets)
    if not setup.class_weights:
        return losses_
    weights = jnp.array(setup.class_weights)
    return losses_ * (weights[targets] if targets.ndim == 1 else targets @ weights)


def _forward(setup: Setup, variables: Any, images: Array, key: Array) -> tuple[Array, Any]:
    """Returns the logits in training, and the new batch statistics."""
    outputs = {}
    if setup.cached:
        # What precedes the cached module must play no part in the logits: NaN would show it.
        outputs = {setup.cached: images}
        images = jnp.full((len(images), *setup.image_shape), jnp.nan)
    with inspection.replaced(outputs), inspection.recomputed(setup.recomputed):
        logits, changed = setup.model.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
    return logits, changed.get("batch_stats", {})


def _accumulated(setup: Setup, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `gradient` computed over `train.accumulate` parts of a batch, one after the other.

    The parts' gradients and totals are added up; batch statistics pass from part to part.
    """
    n_parts = setup.config.train.accumulate
    if n_parts == 1:
        return gradient

    def run(trainable: Any, batch_stats: Any, batch: Batch, key: Array) -> Any:
        def add_part(carry: Any, item: Any) -> tuple[Any, None]:
            grads, sums, batch_stats = carry
            part, index = item
            part = jax.tree.map(mesh.shard, part)  # else each device would compute all of it
            part_key = jax.random.fold_in(key, index)
            new, (new_sums, batch_stats) = gradient(trainable, batch_stats, part, part_key)
            grads, sums = jax.tree.map(jnp.add, (grads, sums), (new, new_sums))
            return (grads, sums, batch_stats), None

        parts = jax.tree.map(lambda x: x.reshape(n_parts, -1, *x.shape[1:]), batch)
        start = jax.tree.map(jnp.zeros_like, trainable), Sums.zeros(), batch_stats
        carry, _ = jax.lax.scan(add_part, start, (parts, jnp.arange(n_parts)))
        grads, sums, batch_stats = carry
        return grads, (sums, batch_stats)

    return run


def _averaged(setup: Setup, state: TrainState, new: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Returns the variables to continue from and their average; `new` and None without one."""
    average_decay = optim.make_average_decay(setup.config.train, setup.total_steps)
    if average_decay is None:
        return new, None
    kept = average_decay(state.step + 1)
    average = jax.tree.map(lambda old, x: old + (1 - kept) * (x - old), state.average, new)
    if setup.config.train.lookahead_steps:
        new = jax.tree.map(lambda mean, x: jnp.where(kept < 1, mean, x), average, new)
    return new, average


@partial(jax.jit, static_argnames="setup", donate_argnames="state")
def train_segment(
    setup: Setup,
    state: TrainState,
    images: Array,
    labels: Int[Array, "n"],
    key: Key[Array, ""],
    n_steps: Int[Array, ""],
) -> tuple[TrainState, History]:
    """Runs `n_steps` steps, at most `runtime.segment_steps` and all within one epoch.

    The host takes no part. The number of steps is data, not shape: one program serves segments of
    every length, and a step's bits do not depend on the segment that it is in. The norm of the
    gradient is that of the segment's last step, and of the steps that `train_step` names.

    With `setup.streamed`, `images` has a batch for each step: [steps, batch, height, width, 3].
    """
    order_key, step_key, flip_key = jax.random.split(key, 3)
    per_epoch = setup.steps_per_epoch
    epoch = state.step // per_epoch
    batch_size = setup.config.train.batch_size
    order = epoch_order(order_key, epoch, len(labels), batch_size, setup.passes)
    starts_epoch = state.step % per_epoch == 0
    state = replace(
        state, epoch_sums=jax.tree.map(lambda x: jnp.where(starts_epoch, 0, x), state.epoch_sums)
    )

    def body(i: Array, carry: tuple[TrainState, History]) -> tuple[TrainState, History]:
        state, history = carry
        rate = learning_rate(setup, state.step)
        index = mesh.shard(order[state.step % per_epoch])
        shown = images[i] if setup.streamed else images
        batch = take_batch(setup, shown, labels, index, flip_key, epoch)
        key = jax.random.fold_in(step_key, state.step)
        state, sums, norm = train_step(setup, state, batch, key, i == n_steps - 1)
        now = History(sums, rate, norm)
        # As `.at[i].set(value)` but not a scatter, which would be several kernels on a GPU.
        put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return state, jax.tree.map(put, history, now)

    shape = (setup.config.runtime.segment_steps,)
    start = state, History(Sums.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))
    state, history = jax.lax.fori_loop(0, n_steps, body, start)
    return mesh.keep_placed(state), history
