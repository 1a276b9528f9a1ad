"""The types of a config's fields: text, JSON and Python values are converted to them and checked.

Needs the standard library only.
"""

import contextlib
import dataclasses
import json
import math
import numbers
import re
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from cnn_jax.errors import UserError, did_you_mean, nearest


class Choices:
    """In Annotated[str, Choices(...)]: the known names; "my_file.py:name" is allowed as well."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields whose types are checked when the section is made, from flags, JSON or Python."""

    prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str = "") -> None:
        """Sets what precedes a field's name in its flag, such as "data."."""
        cls.prefix = prefix
        # Runtime type checkers would refuse what __post_init__ converts, such as lists from JSON.
        typing.no_type_check(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = convert(getattr(self, field.name), field.type, self.prefix + field.name)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Refuses values that are out of range or do not fit together."""


class WrongForm(UserError):
    """A value that is a list where none is expected, none where one is, or of another length."""


def is_user_code(value: str) -> bool:
    """Returns whether a value names something in a file of the user's own: "my_file.py:name"."""
    path, colon, name = value.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def parse(text: str, kind: Any, path: str) -> Any:
    """Returns a field's value from text: JSON, or for tuples also words separated by commas.

    `path` is the field's dotted name, for messages.

    Raises:
        UserError: the text is no value of the type `kind`.
    """
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    is_text = [k is str or typing.get_origin(k) in (Literal, typing.Annotated) for k in kinds]
    if all(is_text):
        return convert(text, kind, path)
    if typing.get_origin(kind) is tuple and text[:1] != "[":
        text = json.dumps([word.strip() for word in text.split(",") if word.strip()])
        if typing.get_args(kind)[0] is not str:
            text = text.replace('"', "")
    words = {"True": "true", "False": "false", "None": "null"}
    try:
        value = float(text) if kind is float else json.loads(words.get(text, text))
    except (ValueError, RecursionError):
        value = text
    return convert(value, kind, path)


def to_text(value: Any) -> str:
    """Returns a field's value as its flag takes it; the inverse of `parse`."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def convert(value: Any, kind: Any, path: str) -> Any:
    """Returns a value from JSON or Python as a field's type.

    Lists become tuples, and numbers become floats where the type asks for it.

    Raises:
        UserError: the value is not of the type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return _convert_union(value, args, path)
    if origin is Literal:
        return _choose(value, args, path)
    if origin is typing.Annotated:
        is_own = isinstance(value, str) and is_user_code(value)
        return value if is_own else _choose(value, args[1].names, path)
    if origin is tuple:
        return _convert_tuple(value, args, path)
    if dataclasses.is_dataclass(kind):
        if type(value) is not kind:
            raise UserError(f"{path} must be a {getattr(kind, '__name__', kind)}")
        return value
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise UserError(f"{path}={value}: expected a finite number")
    if type(value) is not kind:
        wrong = WrongForm if isinstance(value, list | tuple) else UserError
        raise wrong(f"{path}={_shown(value)}: expected {describe(kind)}")
    return value


def _choose(value: Any, names: tuple[str, ...], path: str) -> str:
    if isinstance(value, str) and value in names:
        return value
    known = "|".join(filter(None, names))
    raise UserError(f"{path}={_shown(value)}: expected {known}{nearest(str(value), names)}")


def _convert_union(value: Any, kinds: tuple[Any, ...], path: str) -> Any:
    """Converts to the alternative that has the value's form: null, a list, or a single value."""
    for kind in kinds:
        is_list = typing.get_origin(kind) is tuple
        if kind is type(None) or value is None:
            fits = kind is type(None) and value is None
        else:
            fits = is_list == isinstance(value, list | tuple)
        if fits:
            return None if value is None else convert(value, kind, path)
    raise WrongForm(f"{path}={_shown(value)}: expected {' or '.join(map(describe, kinds))}")


def _convert_tuple(value: Any, args: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    """Converts each item; if one has the wrong form, the message shows that of the whole list."""
    repeated = args[-1] is Ellipsis
    fits = isinstance(value, list | tuple) and (repeated or len(value) == len(args))
    if fits:
        kinds = [args[0]] * len(value) if repeated else args
        with contextlib.suppress(WrongForm):
            return tuple(convert(v, k, path) for v, k in zip(value, kinds, strict=True))
    guess = ""
    if repeated and isinstance(value, list | tuple):
        with contextlib.suppress(UserError):  # Is only a pair of brackets missing?
            guess = did_you_mean(to_text([convert(value, args[0], path)]))
    raise WrongForm(f"{path}={_shown(value)}: expected {describe(tuple[args])}{guess}")


def _shown(value: Any) -> str:
    """Returns a refused value as it was most likely typed."""
    try:
        return to_text(value)
    except (TypeError, ValueError, RecursionError):
        return " ".join(str(value).split())


def describe(kind: Any) -> str:
    """Returns a type in words, as help and messages show it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "|".join(filter(None, args))
    if origin is typing.Annotated:
        return "|".join([*args[1].names, "FILE.py:NAME"])
    if origin is tuple:
        return f"a list such as {_example(kind)}"
    if kind is type(None):
        return "null"
    return {int: "an integer", float: "a number", bool: "true|false", str: "text"}[kind]


def _example(kind: Any) -> str:
    """Returns a small value of a type as JSON."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return _example(args[0])
    if origin is tuple:
        items = [args[0], args[0]] if args[-1] is Ellipsis else list(args)
        return f"[{','.join(map(_example, items))}]"
    return {int: "1", float: "0.5", bool: "true", str: '"a"'}.get(kind, "null")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def require(condition: bool, message: str) -> None:
    """Raises a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_patterns(field_name: str, patterns: Sequence[str]) -> None:
    """Refuses what are not regular expressions, and one that is there twice."""
    for pattern in patterns:
        try:
            with warnings.catch_warnings():
                # Of sets in sets, which a later Python will read in another way.
                warnings.simplefilter("error", FutureWarning)
                re.compile(pattern)
        except (re.error, FutureWarning) as error:
            message = f"{field_name}: invalid regular expression {pattern}: {error}"
            raise UserError(message) from None
    require(len(set(patterns)) == len(patterns), f"{field_name} has a pattern twice")
