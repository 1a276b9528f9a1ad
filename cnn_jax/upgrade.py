"""Configs that older versions of cnn_jax wrote, with their fields as this version has them."""

import re
from collections.abc import Iterable
from typing import Any

from cnn_jax.config import Groups, ModelConfig
from cnn_jax.errors import UserError
from cnn_jax.values import convert

_MOVED = {
    "data.cache_dir": "runtime.cache_dir",
    "train.segment_steps": "runtime.segment_steps",
    "train.checkpoint_seconds": "runtime.checkpoint_seconds",
    "train.deterministic": "runtime.deterministic",
    "train.seeds": "runtime.seeds",
}
_REMOVED = ("train.keep_checkpoints", "features.layer", "features.classifier")
"""Fields that never changed a run."""

_STRUCTURE = ("name", "blocks", "dense")
"""Fields of the model on which the names of its parameters depend."""

_Channels = tuple[float, float, float]
_OldGroups = tuple[tuple[str, float | None], ...]
_OldPhases = tuple[tuple[int, _OldGroups], ...]


def from_0_1(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of version 0.1.0 with the names and forms of today.

    Missing fields stay missing, and unknown ones stay as they are.

    Raises:
        UserError: a value has another type than it had in version 0.1.0; or `optim.phases` can't
            be expressed by `optim.groups`.
    """
    flat = _flatten(tree)
    for old, new in _MOVED.items():
        if old in flat:
            flat[new] = flat.pop(old)
    for name in _REMOVED:
        flat.pop(name, None)
    if flat.get("init.kind") == "":
        del flat["init.kind"]
    if "data.mean" in flat or "data.std" in flat:
        mean = _take(flat, "data.mean", (0.0, 0.0, 0.0), _Channels)
        flat["data.normalize"] = (mean, _take(flat, "data.std", (1.0, 1.0, 1.0), _Channels))
    if isinstance(flat.get("augment.flip", False), bool):
        random = flat.pop("augment.flip", False)
        alternate = _take(flat, "augment.alternate_flip", False, bool)
        flat["augment.flip"] = "alternate" if alternate else "random" if random else "none"
    if "optim.warmup_fraction" in flat or "optim.final_fraction" in flat:
        start = _take(flat, "optim.warmup_fraction", 0.0, float)
        flat["optim.ends"] = (start, _take(flat, "optim.final_fraction", 0.0, float))
    boundaries = _take(flat, "optim.boundaries", (), tuple[float, ...])
    factor = _take(flat, "optim.decay_factor", 0.1, float)
    if flat.get("optim.schedule") == "piecewise":
        flat["optim.schedule"] = tuple((epoch, factor) for epoch in boundaries)
    if decays := _take(flat, "optim.decays", (), tuple[tuple[str, float], ...]):
        flat["optim.weight_decay"] = decays
    if "optim.groups" in flat or "optim.phases" in flat:
        flat["optim.groups"] = _groups(flat)
    return _unflatten(flat)


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = value if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        section, dot, name = path.partition(".")
        if dot and isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
        elif not dot:
            tree[path] = value
    return tree


def _take(flat: dict[str, Any], name: str, default: Any, kind: Any) -> Any:
    """Removes a field and returns its value, or the default."""
    return convert(flat.pop(name, default), kind, name)


def _groups(flat: dict[str, Any]) -> Groups:
    """Returns `optim.groups` in place of the old `optim.groups` or `optim.phases`.

    "{last}" was the number of the last block; now it stands for that block and the hidden dense
    layers above it, for which the fine-tuning configs had a longer pattern.
    """
    of_model = {name: flat.get(f"model.{name}", getattr(ModelConfig, name)) for name in _STRUCTURE}
    model = ModelConfig(**of_model)
    groups = _take(flat, "optim.groups", (), Groups)
    phases = _take(flat, "optim.phases", (), _OldPhases)
    last = f"block{len(model.blocks)}"
    if phases:
        numbered = [
            (epoch, {pattern.replace("block{last}", last): rate for pattern, rate in of_phase})
            for epoch, of_phase in phases
        ]
        groups = _merge(numbered, _parameter_names(model))
    renamed = [(pattern.replace("block{last}", last), rate) for pattern, rate in groups]
    if model.name in ("vgg", "vgg16"):
        long = rf"(fc\d+|{last})"
        renamed = [(pattern.replace(long, "{last}"), rate) for pattern, rate in renamed]
    return tuple(renamed)


def _merge(phases: list[tuple[int, dict[str, float | None]]], names: list[str]) -> Groups:
    """Returns the multiplier of each pattern by epoch, for a network's parameters of these names.

    Raises:
        UserError: parameters that share a pattern have different multipliers in a phase.
    """
    order: list[str] = []
    for _, groups in phases:
        for i, pattern in enumerate(groups):
            if pattern not in order:
                later = [order.index(p) for p in list(groups)[i + 1 :] if p in order]
                order.insert(min(later, default=len(order)), pattern)
    applies_to: dict[str, list[str]] = {}
    for name in names:
        applies_to.setdefault(_first_match(order, name) or "", []).append(name)
    merged = []
    for pattern in (pattern for pattern in order if pattern in applies_to):
        steps: list[tuple[int, float | None]] = []
        for epoch, groups in phases:
            matches = {_first_match(groups, name) for name in applies_to[pattern]}
            rates = {groups[match] for match in matches if match is not None}
            if None in matches or len(rates) > 1:
                raise UserError(
                    f"optim.phases of version 0.1.0: {pattern} can't be written as one pattern of "
                    "optim.groups"
                )
            steps += [(epoch, rate) for rate in rates if not steps or steps[-1][1] != rate]
        first, *others = applies_to[pattern]
        multiplier = steps[0][1] if len(steps) == 1 else tuple(steps)
        merged.append((pattern if others else first, multiplier))
    return tuple(merged)


def _first_match(patterns: Iterable[str], name: str) -> str | None:
    try:
        return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)
    except re.error as error:
        raise UserError(f"optim.phases: invalid regular expression: {error}") from None


def _parameter_names(model: ModelConfig) -> list[str]:
    """Returns the names of a network's parameters; version 0.1.0 had no others."""
    if model.name == "airbench":
        groups = [
            f"group{i}/{layer}"
            for i, widths in enumerate(model.blocks, start=1)
            for j in range(1, len(widths) + 1)
            for layer in (f"conv{j}/kernel", f"norm{j}/bias")
        ]
        return ["whiten/kernel", "whiten/bias", *groups, "head/kernel"]
    blocks = (
        [""] if model.name == "simple_cnn" else [f"block{i + 1}/" for i in range(len(model.blocks))]
    )
    convolutions = [
        f"{block}conv{j}"
        for block, widths in zip(blocks, model.blocks, strict=False)
        for j in range(1, len(widths) + 1)
    ]
    dense = [f"fc{i}" for i in range(1, len(model.dense) + 1)]
    return [f"{layer}/{p}" for layer in (*convolutions, *dense, "head") for p in ("kernel", "bias")]
