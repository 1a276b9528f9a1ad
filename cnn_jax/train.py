"""Training as pure functions: the state, one step, and the compiled segment of steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key, UInt8

from cnn_jax import augment, devices, layers, losses, models, optim, trees
from cnn_jax.config import Config, Groups

Images = UInt8[Array, "batch height width channels"]


@dataclass(frozen=True)
class Recipe:
    """All of training that is compiled in: pure functions and constants, no arrays."""

    model: models.Classifier
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    groups: Groups
    """What is frozen; the rest is the optimizer's, and the only part with gradients and state."""
    cache: models.LayerCache | None
    """Where set, what training is given are not images but the inputs of that layer."""
    loss: Callable[[Array, Array], Array]
    """Logits and labels to one loss an example."""
    normalize: Callable[[Images], Array]
    augment: Callable[[Array, Array], Array]
    """Normalised images and a key to changed images."""
    batch_size: int
    accumulate: int
    average_decay: Callable[[Array], Array] | None
    """What the average of the variables keeps of itself after so many steps; None: no average."""
    lookahead: bool
    """Whether training goes on from the average wherever it has taken something up."""
    alternate_flip: bool
    skip_nonfinite: bool
    max_segment: int


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
    """What a segment tells of each of its steps: arrays [max_segment], 0 where no step was run."""

    sums: Sums
    learning_rate: Float[Array, "steps"]
    grad_norm: Float[Array, "steps"]
    """Global norm of the gradient, -1 where `train_segment` does not compute it."""


@struct.dataclass
class TrainState:
    """Everything that changes in training: with the config it determines all that follows."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    """Averages of what is trained, by collection, or None where the recipe has none."""
    epoch_sums: Sums
    """Totals of the current epoch so far."""

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are evaluated, and whose hash a run reports."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        return variables if self.average is None else trees.merge(self.average, variables)


@struct.dataclass
class Batch:
    """Examples on the device; `mask` is 1 for real ones and 0 for padding."""

    images: Images
    labels: Int[Array, "batch"]
    mask: Float[Array, "batch"]


def make_recipe(config: Config, n_classes: int, steps_per_epoch: int, phase: int = 0) -> Recipe:
    """Builds the compiled-in part of training, in one phase of `optim.phases`, from a config."""
    schedule = optim.make_schedule(config.optim, steps_per_epoch, config.train.epochs)
    total_steps = steps_per_epoch * config.train.epochs
    phases = optim.make_phases(config.optim, len(config.model.blocks), steps_per_epoch)
    return Recipe(
        model=models.build(config.model, n_classes),
        optimizer=optim.make_optimizer(config.optim, phases[: phase + 1]),
        schedule=schedule,
        groups=phases[phase][1],
        cache=None,
        loss=losses.from_config(config.train),
        normalize=partial(augment.normalize, mean=config.data.mean, std=config.data.std),
        augment=partial(
            augment.augment,
            flip_images=config.augment.flip,
            translate_pixels=config.augment.translate,
            cutout_side=config.augment.cutout,
        ),
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        average_decay=optim.make_average_decay(config.train, total_steps),
        lookahead=bool(config.train.lookahead_steps),
        alternate_flip=config.augment.alternate_flip,
        skip_nonfinite=config.train.skip_nonfinite,
        max_segment=config.train.segment_steps,
    )


@partial(jax.jit, static_argnames=("recipe", "image_shape"))
def init_state(
    recipe: Recipe, key: Key[Array, ""], image_shape: tuple[int, int, int]
) -> TrainState:
    """Returns the state before the first step, a function of `key` alone."""
    variables = recipe.model.init(key, jnp.zeros((1, *image_shape)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.optimizer.init(optim.trainable_part(params, recipe.groups)),
        average=start_average(recipe, params, batch_stats),
        epoch_sums=Sums.zeros(),
    )
    return devices.keep_placed(state)


def start_average(recipe: Recipe, params: Any, batch_stats: Any) -> Any:
    """Returns the average of variables that have not been trained yet, None without one."""
    if recipe.average_decay is None:
        return None
    return {"params": optim.trainable_part(params, recipe.groups), "batch_stats": batch_stats}


@partial(jax.jit, static_argnames="recipe")
def enter_phase(recipe: Recipe, state: TrainState) -> TrainState:
    """Returns the state for another phase's recipe.

    What stays trainable keeps its velocity and its average; what is frozen now, its last value.
    """
    fresh = {
        "opt_state": recipe.optimizer.init(optim.trainable_part(state.params, recipe.groups)),
        "average": start_average(recipe, state.params, state.batch_stats),
    }
    old = {name: getattr(state, name) for name in fresh}
    state = replace(state, **trees.replace_named(fresh, trees.named_leaves(old)))
    return devices.keep_placed(state)


def epoch_order(
    key: Key[Array, ""], epoch: Int[Array, ""], n: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """Returns the examples of each step of an epoch: every index i once, then padding.

    That is ~i, which is negative, for the first examples once more, so that BatchNorm sees in the
    last step what it sees in the others.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), n)
    padding = ~jnp.resize(order, (-n % batch_size,))
    return jnp.concatenate([order, padding]).reshape(-1, batch_size)


def take_batch(
    recipe: Recipe,
    images: UInt8[Array, "n height width channels"],
    labels: Int[Array, "n"],
    index: Int[Array, "batch"],
    key: Key[Array, ""],
    epoch: Int[Array, ""],
) -> Batch:
    """Returns a step's examples, of which `epoch_order` gave the index; `key` is for all steps."""
    examples = jnp.maximum(index, ~index)
    taken = images[examples]
    if recipe.alternate_flip:
        taken = augment.alternate_flip(taken, key, examples, epoch)
    return Batch(taken, labels[examples], (index >= 0).astype(jnp.float32))


def _forward(recipe: Recipe, variables: Any, images: Array, key: Array) -> tuple[Array, Any]:
    """Returns the logits in training, and the variables that have changed."""
    dropout_key, augment_key = jax.random.split(key)
    settings: dict[str, Any] = {
        "train": True,
        "rngs": {"dropout": dropout_key},
        "mutable": ["batch_stats"],
    }
    if recipe.cache is None:
        images = recipe.augment(recipe.normalize(images), augment_key)
        return recipe.model.apply(variables, images, **settings)
    with recipe.cache.replacing(images) as placeholders:
        return recipe.model.apply(variables, placeholders, **settings)


def _gradients(
    recipe: Recipe, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Any, Any, Sums]:
    """Returns the gradient of the mean loss, the new batch statistics, and the totals.

    The gradient is that of the trainable parameters alone, so none is computed below the lowest.
    """
    total = jnp.sum(batch.mask)
    trainable = optim.trainable_part(state.params, recipe.groups)

    def mean_loss(trainable: Any, batch_stats: Any, part: Batch, key: Array) -> tuple[Array, Any]:
        params = trees.merge(trainable, state.params)
        variables = {"params": params, "batch_stats": batch_stats}
        with models.frozen_in_eval_mode(params, trainable):
            logits, mutated = _forward(recipe, variables, part.images, key)
        each = recipe.loss(logits, part.labels) * part.mask
        correct = (jnp.argmax(logits, axis=-1) == part.labels) * part.mask
        sums = Sums(jnp.sum(each), jnp.sum(correct), jnp.sum(part.mask))
        return sums.loss / total, (sums, mutated.get("batch_stats", {}))

    grad = jax.grad(mean_loss, has_aux=True)
    if recipe.accumulate == 1:
        grads, (sums, batch_stats) = grad(trainable, state.batch_stats, batch, key)
        return grads, batch_stats, sums

    def add_part(carry: Any, part: Any) -> tuple[Any, None]:
        grads, batch_stats, sums = carry
        batch, index = part
        batch = jax.tree.map(devices.spread, batch)  # else each device would compute all of it
        part_key = jax.random.fold_in(key, index)
        new_grads, (new_sums, batch_stats) = grad(trainable, batch_stats, batch, part_key)
        carry = jax.tree.map(jnp.add, grads, new_grads), batch_stats
        return (*carry, jax.tree.map(jnp.add, sums, new_sums)), None

    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate)
    parts = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)
    start = (jax.tree.map(jnp.zeros_like, trainable), state.batch_stats, Sums.zeros())
    (grads, batch_stats, sums), _ = jax.lax.scan(
        add_part, start, (parts, jnp.arange(recipe.accumulate))
    )
    return grads, batch_stats, sums


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, key: Key[Array, ""], is_last: Any = True
) -> tuple[TrainState, Sums, Float[Array, ""]]:
    """Returns the state after one update on `batch`, the batch's totals before it, and its norm.

    Pure: dropout and augmentation are functions of `key`, which no other step may use. The norm of
    the gradient is -1 unless `is_last` (bool []), the loss is not finite or `skip_nonfinite`: it
    reads the whole gradient once more.
    """
    grads, batch_stats, sums = _gradients(recipe, state, batch, key)
    wanted = is_last | ~jnp.isfinite(sums.loss) | recipe.skip_nonfinite
    norm = jax.lax.cond(wanted, optax.tree.norm, lambda _: jnp.full((), -1.0), grads)
    is_finite = jnp.isfinite(sums.loss)
    if recipe.skip_nonfinite:
        is_finite &= jnp.isfinite(norm)

    def update(state: TrainState) -> TrainState:
        return _update(recipe, state, grads, batch_stats, sums)

    if recipe.skip_nonfinite or layers.on_cpu():
        state = layers.apply_if(is_finite, update, state)
    else:
        state = update(state)
    return replace(state, step=state.step + 1), sums, norm


def learning_rate(recipe: Recipe, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the learning rate of the step after `step` steps, of which some may be skipped."""
    return jnp.asarray(recipe.schedule(step), jnp.float32)


def _update(
    recipe: Recipe, state: TrainState, grads: Any, batch_stats: Any, sums: Sums
) -> TrainState:
    """Returns the state after the optimizer's step, which is counted elsewhere."""
    trainable = optim.trainable_part(state.params, recipe.groups)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, trainable)
    rate = learning_rate(recipe, state.step)
    updates = jax.tree.map(lambda update: rate * update, updates)
    trainable = optax.apply_updates(trainable, updates)
    new, average = {"params": trainable, "batch_stats": batch_stats}, state.average
    if recipe.average_decay:
        kept = recipe.average_decay(state.step + 1)
        average = jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), average, new)
        if recipe.lookahead:
            new = jax.tree.map(lambda old, new: jnp.where(kept < 1, old, new), average, new)
    return replace(
        state,
        params=trees.merge(new["params"], state.params),
        batch_stats=new["batch_stats"],
        opt_state=opt_state,
        average=average,
        epoch_sums=jax.tree.map(jnp.add, state.epoch_sums, sums),
    )


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_segment(
    recipe: Recipe,
    state: TrainState,
    images: UInt8[Array, "n height width channels"],
    labels: Int[Array, "n"],
    key: Key[Array, ""],
    n_steps: Int[Array, ""],
) -> tuple[TrainState, History]:
    """Runs `n_steps` steps, at most `max_segment` and all within one epoch, without the host.

    The number of steps is data, not shape: one program serves segments of every length, and a
    step's bits do not depend on the segment that it falls into. The norm of the gradient is that
    of the last step, of steps whose loss is not finite and, with `skip_nonfinite`, of all.
    """
    order_key, step_key, flip_key = jax.random.split(key, 3)
    n = len(images)
    steps_per_epoch = -(-n // recipe.batch_size)
    epoch = state.step // steps_per_epoch
    order = epoch_order(order_key, epoch, n, recipe.batch_size)
    starts_epoch = state.step % steps_per_epoch == 0
    state = replace(
        state, epoch_sums=jax.tree.map(lambda x: jnp.where(starts_epoch, 0, x), state.epoch_sums)
    )

    def body(i: Array, carry: tuple[TrainState, History]) -> tuple[TrainState, History]:
        state, history = carry
        rate = learning_rate(recipe, state.step)
        index = devices.spread(order[state.step % steps_per_epoch])
        batch = take_batch(recipe, images, labels, index, flip_key, epoch)
        key = jax.random.fold_in(step_key, state.step)
        state, sums, norm = train_step(recipe, state, batch, key, i == n_steps - 1)
        now = History(sums, rate, norm)
        return state, jax.tree.map(lambda array, value: array.at[i].set(value), history, now)

    steps = (recipe.max_segment,)
    start = state, History(Sums.zeros(steps), jnp.zeros(steps), jnp.zeros(steps))
    state, history = jax.lax.fori_loop(0, n_steps, body, start)
    return devices.keep_placed(state), history
