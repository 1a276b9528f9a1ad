"""Learning-rate schedules, optimizers and freezing, built from optax by the names in a config.

Only Muon is not optax's; see `muon`.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cnn_jax import muon, trees, user_code
from cnn_jax.config import OptimConfig, TrainConfig
from cnn_jax.errors import UserError

Groups = tuple[tuple[str, float | None], ...]
"""(pattern, learning-rate multiplier) pairs at one epoch; None is frozen, and 0 is frozen because
the schedule has ended."""
Phases = tuple[tuple[int, Groups], ...]
"""The groups by the epoch from which they hold: rising, the first from epoch 0."""


def make_phases(config: OptimConfig, last_block: Callable[[], str]) -> Phases:
    """Returns the groups of the whole run. Without `optim.groups` all parameters train alike.

    `last_block()` is the regular expression that "{last}" stands for (see `models.last_block`); it
    is not called where no pattern has that.
    """
    uses_last = any("{last}" in pattern for pattern, _ in config.groups)
    last = last_block() if uses_last else ""
    changes = {0} | {e for _, m in config.groups if isinstance(m, tuple) for e, _ in m}

    def at(epoch: int, multiplier: Any) -> float | None:
        if not isinstance(multiplier, tuple):
            return multiplier
        return [value for start, value in multiplier if start <= epoch][-1]

    return tuple(
        (epoch, tuple((p.replace("{last}", last), at(epoch, m)) for p, m in config.groups))
        for epoch in sorted(changes)
    )


def group_of(groups: Iterable[tuple[str, Any]], name: str) -> tuple[str, Any] | None:
    """Returns the first group whose pattern matches all of a parameter's name, or None."""
    return next((group for group in groups if re.fullmatch(group[0], name)), None)


def multiplier(groups: Groups, name: str) -> float | None:
    """Returns the multiplier of a parameter's learning rate; None if it is frozen."""
    if not groups:
        return 1.0
    group = group_of(groups, name)
    return (group[1] or None) if group else None


def end_of(phases: Phases, name: str) -> int | None:
    """Returns the epoch at which a parameter's schedule ends; None where that is the run's."""
    groups = ((start, group_of(groups, name)) for start, groups in phases)
    return next((start for start, group in groups if group and group[1] == 0), None)


def check_groups(
    field_name: str, groups: tuple[tuple[str, Any], ...], names: Iterable[str]
) -> None:
    """Refuses groups that do not divide up the parameters of these names; empty ones pass.

    A last pattern ".*", for all others, may match nothing: "{last}" of a small network is all of
    it but the head.

    Raises:
        UserError: lists the parameters without a pattern and the patterns without a parameter.
    """
    if not groups:
        return
    chosen = {name: group_of(groups, name) for name in names}
    uncovered = [name for name, group in chosen.items() if group is None]
    used = {group[0] for group in chosen.values() if group}
    unused = [pattern for pattern, _ in groups if pattern not in used]
    unused = unused[:-1] if unused[-1:] == [".*"] else unused
    if uncovered or unused:
        raise UserError(
            f"{field_name}: parameters that no pattern matches: {', '.join(uncovered) or 'none'}; "
            "unused patterns (they match nothing, or an earlier pattern matches it first): "
            f"{', '.join(unused) or 'none'}"
        )


def check_names(config: OptimConfig, groups: Groups, names: Sequence[str]) -> None:
    """Refuses patterns that do not fit the names of the parameters; `groups` are a phase's.

    Raises:
        UserError: names the field and the pattern.
    """
    if isinstance(config.weight_decay, tuple):
        check_groups("optim.weight_decay", config.weight_decay, names)
    check_groups("optim.groups", groups, names)
    patterns = {"optim.renormalize": config.renormalize}
    if config.name == "muon":
        patterns["optim.muon"] = config.muon[0]
    for field_name, pattern in patterns.items():
        if pattern and not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{field_name}: {pattern} matches no parameter")


def trainable_part(params: Any, groups: Groups) -> Any:
    """Returns `params` with None in place of every frozen parameter.

    Raises:
        UserError: the groups do not divide up the parameters.
    """
    check_groups("optim.groups", groups, trees.named_leaves(params))
    return trees.select(lambda name: multiplier(groups, name) is not None, params)


def make_schedule(config: OptimConfig, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from step 0 to steps_per_epoch * epochs.

    The warm-up rises linearly and is part of the run: cosine and linear decay are spread over the
    remaining steps, and the epochs of a step schedule count from the start of training.
    """
    peak, (start, end) = config.learning_rate, config.ends
    warmup = round(config.warmup_epochs * steps_per_epoch)
    remaining = max(steps_per_epoch * epochs - warmup, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, remaining, alpha=end)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * end, remaining)
    elif config.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:
        factors: dict[int, float] = {}
        for epoch, factor in config.schedule:
            step = round(float(epoch) * steps_per_epoch) - warmup
            factors[step] = factors.get(step, 1.0) * float(factor)
        main = optax.piecewise_constant_schedule(peak, factors)
    if not warmup:
        return main
    rise = optax.linear_schedule(peak * start, peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


def make_average_decay(
    config: TrainConfig, total_steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]] | None:
    """Returns the share that an average keeps of itself after a number of steps; None without one.

    Lookahead's 0.95^k (t / T)^3 every k steps is that of airbench94 (Jordan, 2024). The share of a
    moving average rises with (1 + t) / (10 + t) up to its decay, as in TensorFlow's
    ExponentialMovingAverage: it is an average of about the last ninth of the steps until the run
    is long enough for its decay, and never one of the initial values.
    """
    k, decay = config.lookahead_steps, config.ema_decay
    if k:
        return lambda t: jnp.where(t % k == 0, 0.95**k * (t / total_steps) ** 3, 1.0)
    return (lambda t: jnp.minimum(decay, (1 + t) / (10 + t))) if decay else None


def make_optimizer(
    config: OptimConfig, phases: Phases = ((0, ()),)
) -> optax.GradientTransformation:
    """Returns clipping, weight decay, the optimizer and the groups' multipliers as one.

    Its updates are those of a learning rate of 1, to be multiplied by the schedule's value: steps
    are counted in one place, and the rate that a run records is the one that it applies.

    It is the optimizer of the last of `phases`, and gets the trainable parameters alone, so that a
    frozen parameter has no state and no part in the norm. Parameters that began to train in
    different phases are counted apart: Adam's bias correction needs each one's own step count.

    Momentum is v = momentum * v + gradient; update = -v, as in TensorFlow's MomentumOptimizer,
    which the chapter uses. Adam and RMSProp keep optax's other constants.
    """
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name not in ("adamw", "muon"):
        steps += _weight_decays(config)
    if not any(isinstance(multiplier, tuple) for _, multiplier in config.groups):
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


def _weight_decays(config: OptimConfig) -> list[optax.GradientTransformation]:
    """Returns one transformation for each pattern that decays."""
    groups = decay_groups(config)

    def decay(group: tuple[str, float]) -> optax.GradientTransformation:
        mask = partial(trees.map_named, lambda name, _: group_of(groups, name) == group)
        return optax.add_decayed_weights(group[1], mask=mask)

    return [decay(group) for group in groups if group[1]]


def decay_groups(config: OptimConfig) -> tuple[tuple[str, float], ...]:
    """Returns (pattern, weight decay) pairs; a single number is the decay of all kernels."""
    decay = config.weight_decay
    return decay if isinstance(decay, tuple) else ((".*kernel", float(decay)),)


def _update_rule(config: OptimConfig) -> optax.GradientTransformation:
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": lambda: optax.sgd(1.0),
        "momentum": lambda: optax.sgd(1.0, momentum=config.momentum),
        "nesterov": lambda: optax.sgd(1.0, momentum=config.momentum, nesterov=True),
        "adam": lambda: optax.adam(1.0),
        "adamw": lambda: optax.chain(
            optax.scale_by_adam(), *_weight_decays(config), optax.scale_by_learning_rate(1.0)
        ),
        "rmsprop": lambda: optax.rmsprop(1.0),
        "muon": lambda: _muon(config),
    }
    if config.name in rules:
        return rules[config.name]()
    return user_code.load(config.name)(config)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Returns Muon for the kernels of `optim.muon`, and Nesterov momentum for all else."""
    pattern, momentum, steps = config.muon
    decays = _weight_decays(config)
    rules: dict[Hashable, optax.GradientTransformation] = {
        True: optax.chain(
            muon.scale_by_muon(momentum, steps), *decays, optax.scale_by_learning_rate(1.0)
        ),
        False: optax.chain(*decays, optax.sgd(1.0, momentum=config.momentum, nesterov=True)),
    }
    chosen = partial(_matches_kernel, "optim.muon", pattern)
    return optax.partition(rules, partial(trees.map_named, chosen))


def renormalize(config: OptimConfig, params: Any) -> Any:
    """Returns the parameters with the kernels that `optim.renormalize` matches renormalised."""
    matches = partial(_matches_kernel, "optim.renormalize", config.renormalize)
    return trees.map_named(
        lambda name, leaf: muon.renormalize(leaf) if matches(name, leaf) else leaf, params
    )


def _matches_kernel(field_name: str, pattern: str, name: str, leaf: Any) -> bool:
    matches = re.fullmatch(pattern, name) is not None
    if matches and leaf.ndim < 2:
        raise UserError(f"{field_name}: {pattern} matches {name}, which is not a kernel")
    return matches


def _trained_since(phases: Phases, name: str) -> int:
    """Returns the epoch from which a parameter has been trained without a break."""
    since = phases[-1][0]
    for start, groups in reversed(phases):
        if multiplier(groups, name) is None:
            break
        since = start
    return since
