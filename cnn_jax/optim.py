"""Learning-rate schedules, optimizers and freezing, assembled from optax by a config's names."""

import re
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cnn_jax import trees
from cnn_jax.config import Decays, Groups, OptimConfig, TrainConfig
from cnn_jax.errors import UserError

Phases = tuple[tuple[int, Groups], ...]
"""Groups by the step they hold from: rising, the first from step 0."""


def make_phases(config: OptimConfig, n_blocks: int, steps_per_epoch: int) -> Phases:
    """Returns the groups of the whole run; without any, all parameters are trained alike."""

    def resolve(groups: Groups) -> Groups:
        return tuple((pattern.replace("{last}", str(n_blocks)), rate) for pattern, rate in groups)

    if config.phases:
        return tuple((epoch * steps_per_epoch, resolve(groups)) for epoch, groups in config.phases)
    return ((0, resolve(config.groups)),)


def phase_at(phases: Phases, step: int) -> int:
    """Returns the index of the phase that a step, counted from 0, belongs to."""
    return sum(start <= step for start, _ in phases) - 1


def group_of(groups: Groups | Decays, name: str) -> tuple[str, Any] | None:
    """Returns the first of the groups whose pattern matches a parameter's whole name, or None."""
    return next((group for group in groups if re.fullmatch(group[0], name)), None)


def multiplier(groups: Groups, name: str) -> float | None:
    """Returns what a parameter's learning rate is multiplied by; None if it is frozen."""
    if not groups:
        return 1.0
    group = group_of(groups, name)
    return group[1] if group else None


def check_groups(field_name: str, groups: Groups | Decays, names: Iterable[str]) -> None:
    """Refuses groups that do not divide up the parameters of those names; empty ones pass.

    Raises:
        UserError: lists the parameters that no pattern matches, and the patterns that are the
            first to match none.
    """
    if not groups:
        return
    chosen = {name: group_of(groups, name) for name in names}
    uncovered = [name for name, group in chosen.items() if group is None]
    unused = [pattern for pattern, rate in groups if (pattern, rate) not in chosen.values()]
    if uncovered or unused:
        raise UserError(
            f"{field_name}: parameters that no pattern matches: {', '.join(uncovered) or 'none'}; "
            f"patterns that are the first to match nothing: {', '.join(unused) or 'none'}"
        )


def trainable_part(params: Any, groups: Groups) -> Any:
    """Returns `params` with None in place of what is frozen.

    Raises:
        UserError: the groups do not divide up the parameters.
    """
    check_groups("optim.groups", groups, trees.named_leaves(params))
    return trees.keep(lambda name: multiplier(groups, name) is not None, params)


def make_schedule(config: OptimConfig, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from step 0 to steps_per_epoch * epochs.

    The warm-up rises linearly and is part of the run: what follows is spread over the
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
    rise = optax.linear_schedule(peak * config.warmup_fraction, peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


def make_average_decay(
    config: TrainConfig, total_steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]] | None:
    """Returns what an average keeps of itself after so many steps, from 1 on; None without one.

    Lookahead's 0.95^k (t / T)^3 every k steps is that of airbench94 (Jordan, 2024).
    """
    k = config.lookahead_steps
    if k:
        return lambda t: jnp.where(t % k == 0, 0.95**k * (t / total_steps) ** 3, 1.0)
    return (lambda _: jnp.float32(config.ema_decay)) if config.ema_decay else None


def _decays(config: OptimConfig) -> list[optax.GradientTransformation]:
    """Returns one for each pattern that decays; without `decays`, kernels alone do."""
    groups = config.decays or ((".*kernel", config.weight_decay),)

    def decay(group: tuple[str, float]) -> optax.GradientTransformation:
        mask = partial(trees.map_named, lambda name, _: group_of(groups, name) == group)
        return optax.add_decayed_weights(group[1], mask=mask)

    return [decay(group) for group in groups if group[1]]


def make_optimizer(
    config: OptimConfig, phases: Phases = ((0, ()),)
) -> optax.GradientTransformation:
    """Returns clipping, weight decay, the optimizer and the groups' multipliers as one.

    Its updates are those of a learning rate of 1, to be multiplied by the schedule's: steps are
    counted in one place, and the rate that a run records is the one that it applies.

    It is that of the last of `phases`, and is given the trainable part of the parameters alone,
    so what is frozen has no state and no say in the norm. What has been trained since different
    phases is counted apart: Adam corrects its averages for the steps that a parameter has seen.

    Momentum is v = momentum * v + gradient; update = -v, as in TensorFlow's
    MomentumOptimizer, which the chapter uses. Adam and RMSProp keep optax' other constants.
    """
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name != "adamw":
        steps += _decays(config)
    if len(config.phases) < 2:
        steps.append(_update_rule(config))
    else:
        rules: dict[Hashable, optax.GradientTransformation] = {
            str(start): _update_rule(config) for start, _ in phases
        }
        labels = partial(trees.map_named, lambda name, _: str(_trained_since(phases, name)))
        steps.append(optax.partition(rules, labels))
    groups = phases[-1][1]
    if any(rate != 1 for _, rate in groups):
        steps.append(
            optax.stateless(
                lambda updates, _: trees.map_named(
                    lambda name, update: update * multiplier(groups, name), updates
                )
            )
        )
    return optax.chain(*steps)


def _update_rule(config: OptimConfig) -> optax.GradientTransformation:
    if config.name == "adam":
        return optax.adam(1.0)
    if config.name == "adamw":
        rate = optax.scale_by_learning_rate(1.0)
        return optax.chain(optax.scale_by_adam(), *_decays(config), rate)
    if config.name == "rmsprop":
        return optax.rmsprop(1.0)
    if config.name == "sgd":
        return optax.sgd(1.0)
    nesterov = config.name == "nesterov"
    return optax.sgd(1.0, momentum=config.momentum, nesterov=nesterov)


def _trained_since(phases: Phases, name: str) -> int:
    """Returns the step from which a parameter has been trained without a break."""
    since = phases[-1][0]
    for start, groups in reversed(phases):
        if multiplier(groups, name) is None:
            break
        since = start
    return since
