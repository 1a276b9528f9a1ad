"""Checks at each call that arrays have the types and shapes that annotations say.

conftest.py installs it for all of cnn_jax. Other types are checked by pyright.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with those of its arguments and results checked that are arrays."""
    annotations = inspect.get_annotations(function)
    arrays = [name for name, kind in annotations.items() if _is_array(kind)]
    function.__annotations__ = {n: _widened(k) for n, k in annotations.items() if _has_array(k)}
    checked = beartype(function)
    return _allow_placeholders(function, checked, arrays) if arrays else checked


def _is_array(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)


def _has_array(kind: Any) -> bool:
    return _is_array(kind) or any(map(_has_array, typing.get_args(kind)))


def _widened(kind: Any) -> Any:
    """Allows arrays of NumPy where an annotation asks for those of JAX, as JAX does."""
    if _is_array(kind) and kind.array_type is jax.Array:
        return kind.dtype[jax.Array | np.ndarray, kind.dim_str]
    return kind


def _allow_placeholders(
    function: Callable[..., Any], checked: Callable[..., Any], arrays: list[str]
) -> Callable[..., Any]:
    """Leaves an __init__ unchecked when JAX makes a dataclass of what only stands for arrays."""
    if function.__name__ != "__init__":
        return checked
    signature = inspect.signature(function)

    @functools.wraps(function)
    def initialise(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        values = [given[name] for name in arrays if name in given]
        real = all(isinstance(value, jax.Array | np.ndarray) for value in values)
        (checked if real else function)(*args, **kwargs)

    return initialise
