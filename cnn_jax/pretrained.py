"""Networks that start from trained parameters: `init.checkpoint`."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnn_jax import configs, data, fields, trees
from cnn_jax.config import Config, InitConfig
from cnn_jax.errors import UserError, did_you_mean
from cnn_jax.models import weights
from cnn_jax.runs import checkpoint

_ACCEPTED = "it takes a run's folder, a .safetensors file of weights, or hf:REPO"
_PYTORCH = (".pth", ".pt", ".bin", ".ckpt")


def adopt(config: Config, given: frozenset[str] = frozenset()) -> Config:
    """Returns `config` with the network and the preprocessing of `init.checkpoint`.

    They belong to the parameters, which would misread other pixels. A field that the user has set
    (its dotted name is in `given`) keeps its value.

    Raises:
        UserError: there is no such workdir or file.
    """
    path = _locate(config.init.checkpoint)
    if path.is_file():
        model, found = weights.describe(path), weights.preprocessing(path)
    else:
        source = fields.load(path / "config.json")
        names = ("crop", "interpolation", "fit", "normalize")
        model, found = source.model, {name: getattr(source.data, name) for name in names}
        found["image_size"] = data.image_side(source.data)
    if config.data.name != "folder":  # Others have images of their own size, whole.
        found = {name: found[name] for name in ("image_size", "normalize")}
    kept = {
        name.removeprefix("model."): getattr(config.model, name.removeprefix("model."))
        for name in given
        if name.startswith("model.")
    }
    seen = {name: value for name, value in found.items() if f"data.{name}" not in given}
    return replace(config, model=replace(model, **kept), data=replace(config.data, **seen))


def load_into(
    fresh: dict[str, Any], init: InitConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the variables of `init.checkpoint`, with those of `fresh` where `init.skip` matches.

    Both are trees by collection ("params", "batch_stats"). `say` gets a line with the counts.

    Raises:
        UserError: arrays that are not skipped differ in name, shape or dtype; a pattern of
            `init.skip` matches nothing; or the checkpoint can't be read.
    """
    source = _load(init)

    def skipped(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in init.skip)

    merged, loaded, total, all_names = {}, 0, 0, set()
    for collection, tree in fresh.items():
        found, needed = trees.named_leaves(source[collection]), trees.named_leaves(tree)
        all_names |= {*found, *needed}
        kept = {name: leaf for name, leaf in found.items() if not skipped(name)}
        wanted = {name: leaf for name, leaf in needed.items() if not skipped(name)}
        if mismatch := checkpoint.difference(kept, wanted):
            raise UserError(
                f"init.checkpoint={init.checkpoint} does not fit the network: {mismatch}; "
                "init.skip names the parameters that are not loaded from it"
            )
        loaded, total = loaded + len(kept), total + len(needed)
        merged[collection] = trees.replace_named(tree, kept)
    for pattern in init.skip:
        if not any(re.fullmatch(pattern, name) for name in all_names):
            raise UserError(f"init.skip: {pattern} matches no parameter of either network")
    say(
        f"loaded {loaded} parameter arrays from {init.checkpoint}; "
        f"{total - loaded} are initialised at random"
    )
    return merged


def _load(init: InitConfig) -> dict[str, Any]:
    """Returns the variables that `init.checkpoint` holds; of a run, those that it evaluated."""
    path = _locate(init.checkpoint)
    if path.is_file():
        return weights.read(path)
    kind = fields.load(path / "config.json").train.reported_kind
    return checkpoint.load_variables(path, kind)[0]


def _locate(name: str) -> Path:
    """Returns the file of weights or the run's folder that `init.checkpoint` names.

    Raises:
        UserError: there is no such file or folder, or it is of another kind.
    """
    if name.startswith("hf:"):
        return weights.download(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    is_run = path.is_dir() and (path / "config.json").exists()
    if is_run or (path.is_file() and path.suffix == ".safetensors"):
        return path
    raise UserError(f"init.checkpoint={name} {_why_not(path)}; {_ACCEPTED}")


def _why_not(path: Path) -> str:
    """Returns what is wrong with a path, and the cure if one can be told."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        hint = did_you_mean(str(files[0]) if files else "")
        return f"is a folder without config.json, so it is not a run's{hint}"
    if not path.exists():
        name = path.name
        trained = f"; `./launch.sh {name}` trains it" if name in configs.CONFIGS else ""
        return f"does not exist{trained}"
    if path.suffix in _PYTORCH:
        return (
            'is a file of PyTorch; convert it, with PyTorch installed: python -c "import torch; '
            "from safetensors.torch import save_file; save_file(torch.load("
            f"'{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    if path.name == "config.json":
        return f"is a file of a run; name its folder, {path.parent}"
    return f"is a {path.suffix or 'file of unknown kind'}, which can't be read here"
