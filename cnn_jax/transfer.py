"""Networks that start from another's parameters."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnn_jax import checkpoint, config, data, trees, weights
from cnn_jax.config import Config, InitConfig
from cnn_jax.errors import UserError


def adopt(base: Config, init: InitConfig) -> Config:
    """Returns `base` with the network, image size and normalisation of `init.checkpoint`.

    They belong to the parameters: a network that has seen other pixels would read them wrongly.

    Raises:
        UserError: there is no such workdir or file.
    """
    if file := _weights_file(init.checkpoint):
        seen = {"mean": weights.IMAGENET.mean, "std": weights.IMAGENET.std}
        image = replace(base.data, image_size=weights.IMAGENET.image_size, **seen)
        return replace(base, model=weights.describe(file), data=image)
    source = config.load(Path(init.checkpoint) / "config.json")
    seen = {"mean": source.data.mean, "std": source.data.std}
    size = data.image_side(source.data)
    return replace(base, model=source.model, data=replace(base.data, image_size=size, **seen))


def load_variables(init: InitConfig) -> dict[str, Any]:
    """Returns the variables that `init.checkpoint` holds, those that a run evaluates.

    Raises:
        UserError: there is no whole checkpoint, or the file is not VGG16's.
    """
    if file := _weights_file(init.checkpoint):
        if init.kind:
            raise UserError(f"init.kind is read only with a workdir, and {file} is a file")
        return {"params": weights.read(file), "batch_stats": {}}
    workdir = Path(init.checkpoint)
    kind = init.kind or config.load(workdir / "config.json").train.reported_kind
    return checkpoint.load_variables(workdir, kind)[0]


def _weights_file(name: str) -> Path | None:
    if name.startswith("hf:"):
        return weights.download(name.removeprefix("hf:"))
    return Path(name) if name.endswith(".safetensors") else None


def merge(
    pretrained: dict[str, Any], fresh: dict[str, Any], init: InitConfig
) -> tuple[Any, Any, str]:
    """Returns params and batch_stats: `pretrained` in place of `fresh`, except what is skipped.

    Also returns a line that says what was taken. Both sides are trees by collection.

    Raises:
        UserError: what is not skipped differs in name, shape or dtype, on either side; or a
            pattern of `init.skip` matches nothing.
    """

    def skipped(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in init.skip)

    merged, taken, total, all_names = [], 0, 0, set()
    for collection in ("params", "batch_stats"):
        found = trees.named_leaves(pretrained[collection])
        needed = trees.named_leaves(fresh[collection])
        all_names |= {*found, *needed}
        kept = {name: leaf for name, leaf in found.items() if not skipped(name)}
        wanted = {name: leaf for name, leaf in needed.items() if not skipped(name)}
        if mismatch := checkpoint.difference(kept, wanted):
            raise UserError(
                f"init.checkpoint={init.checkpoint} does not fit the network: {mismatch}; "
                "init.skip names what is not to be taken from it"
            )
        taken, total = taken + len(kept), total + len(needed)
        merged.append(trees.replace_named(fresh[collection], kept))
    for pattern in init.skip:
        if not any(re.fullmatch(pattern, name) for name in all_names):
            raise UserError(f"init.skip: {pattern} matches no parameter of either network")
    return *merged, f"{taken} arrays from {init.checkpoint}, {total - taken} from the seed"
