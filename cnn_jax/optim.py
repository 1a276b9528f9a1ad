"""Learning-rate schedules and optimizers, assembled from optax by a config's names."""

from typing import Any

import optax

from cnn_jax import trees
from cnn_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from step 0 to steps_per_epoch * epochs.

    The warm-up rises linearly from 0 and is part of the run: what follows is spread over the
    remaining steps, and `boundaries` count from the start of training.
    """
    peak, total = config.learning_rate, steps_per_epoch * epochs
    warmup = round(config.warmup_epochs * steps_per_epoch)
    remaining = max(total - warmup, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.final_fraction, remaining)
    elif config.schedule == "piecewise":
        steps = [round(epoch * steps_per_epoch) - warmup for epoch in config.boundaries]
        factors = {step: config.decay_factor ** steps.count(step) for step in steps}
        main = optax.piecewise_constant_schedule(peak, factors)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def decay_mask(params: Any) -> Any:
    """Returns True for each leaf that weight decay shrinks: kernels, never biases or scales."""
    return trees.map_named(lambda name, _: name.endswith("kernel"), params)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns clipping, weight decay and the optimizer as one transformation.

    Momentum is v = momentum * v + gradient; update = -rate * v, as in TensorFlow's
    MomentumOptimizer, which the chapter uses. Adam and RMSProp keep optax' other constants.
    """
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay and config.name != "adamw":
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    if config.name == "adam":
        steps.append(optax.adam(schedule))
    elif config.name == "adamw":
        steps.append(optax.adamw(schedule, weight_decay=config.weight_decay, mask=decay_mask))
    elif config.name == "rmsprop":
        steps.append(optax.rmsprop(schedule))
    elif config.name == "sgd":
        steps.append(optax.sgd(schedule))
    else:
        nesterov = config.name == "nesterov"
        steps.append(optax.sgd(schedule, momentum=config.momentum, nesterov=nesterov))
    return optax.chain(*steps)
