"""The fields of a config by their dotted names: listing, setting, comparing, saving and loading."""

import ast
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnn_jax
from cnn_jax import config as config_module
from cnn_jax import files, upgrade, values
from cnn_jax.config import Config
from cnn_jax.errors import UserError, closest, did_you_mean

_NOT_IDENTITY = ("name", "data.dir", "data.skip_broken", "runtime.")
"""Fields, or beginnings of their names, on which a run's result does not depend."""


@dataclass(frozen=True)
class Field:
    """A field that a flag can set."""

    name: str
    """Dotted, such as "train.epochs"."""
    kind: Any
    """Its type, as `values.convert` takes it."""
    default: Any
    doc: str
    """One or several sentences, on one line."""

    @property
    def section(self) -> str:
        """The name of its section, or ""."""
        return self.name.rpartition(".")[0]


@functools.cache
def all_fields() -> dict[str, Field]:
    """Returns every field that can be set by its dotted name, in the order of config.py."""
    docs = _docs()
    found = {}
    for outer in dataclasses.fields(Config):
        if section := sections().get(outer.name):
            for inner in dataclasses.fields(section):
                path, doc = f"{outer.name}.{inner.name}", docs[section.__name__][inner.name]
                found[path] = Field(path, inner.type, inner.default, doc)
        elif outer.name != "name":
            doc = docs[Config.__name__][outer.name]
            found[outer.name] = Field(outer.name, outer.type, outer.default, doc)
    return found


def sections() -> dict[str, Any]:
    """Returns the class of each section by the section's name."""
    return {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}


def _docs() -> dict[str, dict[str, str]]:
    """Returns the text below each field in config.py, by class and name."""
    found: dict[str, dict[str, str]] = {}
    source = Path(config_module.__file__).read_text()
    for section in ast.parse(source).body:
        if isinstance(section, ast.ClassDef):
            docs = found.setdefault(section.name, {})
            for field, text in zip(section.body, section.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def with_values(config: Config, texts: Mapping[str, str]) -> Config:
    """Returns `config` with fields set from text; only the result is checked.

    Lists are JSON, or words separated by commas.

    Raises:
        UserError: an unknown field, a value of another type, or values that do not fit together.
    """
    tree = to_dict(config)
    for name, text in texts.items():
        if name not in all_fields():
            raise UserError(
                f"unknown field {name}{did_you_mean(suggestion(name))}; --help lists the fields"
            )
        section, _, field = name.rpartition(".")
        target = tree[section] if section else tree
        target[field] = values.parse(text, all_fields()[name].kind, name)
    return from_dict(tree)


def suggestion(name: str, others: Iterable[str] = ()) -> str:
    """Returns the field that an unknown name most likely stands for, or one of `others`, or "".

    Sections may be missing or wrong, and initials stand for words: "epochs" is train.epochs, and
    "train.lr" is optim.learning_rate.
    """
    section, _, word = name.rpartition(".")
    last = {path: path.rpartition(".")[2] for path in all_fields()}
    inside = {last[path]: path for path in last if section and path.startswith(f"{section}.")}
    if section and not inside:
        return closest(name, last)
    for path in (*inside.values(), *last):
        initials = "".join(part[0] for part in last[path].split("_"))
        if word == last[path] or ("_" in last[path] and word == initials):
            return path
    if found := closest(word, inside):
        return inside[found]
    anywhere = {last[path]: path for path in reversed(last)}
    found = closest(name, [*others, *last, *anywhere])
    return anywhere.get(found, found)


def flatten(config: Config) -> dict[str, Any]:
    """Returns every value of `config` by its dotted name, `name` included."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": v for key, v in value.items()}
        else:
            flat[name] = value
    return flat


def identity(config: Config) -> dict[str, Any]:
    """Returns the values that a run's result depends on, by their dotted names.

    `name`, `data.dir`, `data.skip_broken` and the section `runtime` are not among them.
    """
    flat = flatten(config)
    return {name: v for name, v in flat.items() if not name.startswith(_NOT_IDENTITY)}


def differences(old: Config, new: Config) -> list[str]:
    """Returns "field: old -> new" for each field of the identity that differs."""
    a, b = identity(old), identity(new)
    to_text = values.to_text
    return [f"{n}: {to_text(a[n])} -> {to_text(b[n])}" for n in a if a[n] != b[n]]


def to_dict(config: Config) -> dict[str, Any]:
    """Returns `config` as nested dicts, with the version of cnn_jax that it belongs to."""
    return {"version": cnn_jax.__version__, **dataclasses.asdict(config)}


def from_dict(tree: Any) -> Config:
    """Returns the config that `to_dict` was called with, also in an older version of cnn_jax.

    A missing field takes its default.

    Raises:
        UserError: an unknown field, a value of another type, or values that do not fit together.
    """
    if not isinstance(tree, dict):
        raise UserError("config must be an object of fields")
    version = tree.get("version", "0.1.0")
    if version == "0.1.0":
        tree = upgrade.from_0_1(tree)
    fields = {name: value for name, value in tree.items() if name != "version"}
    return _section(fields, Config, "", version)


def _section(tree: Any, section: Any, prefix: str, version: Any) -> Any:
    """Returns a section, or the whole config, from the values of its fields."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')} must be an object of fields")
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(section)}
    if unknown := [prefix + name for name in tree if name not in kinds]:
        raise UserError(
            f"version {cnn_jax.__version__} does not know the fields {', '.join(unknown)} of a "
            f"config that was written by version {version}"
        )
    found = {}
    for name, value in tree.items():
        nested = dataclasses.is_dataclass(kinds[name])
        found[name] = _section(value, kinds[name], f"{name}.", version) if nested else value
    return section(**found)


def save(config: Config, path: Path) -> None:
    """Writes `config` as indented JSON, atomically."""
    files.write(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads a config that `save` wrote, in this version of cnn_jax or an older one.

    Raises:
        UserError: the file is missing, is not JSON, or is not a config.
    """
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is not a workdir") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as a config: {error}") from None
    try:
        return from_dict(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
