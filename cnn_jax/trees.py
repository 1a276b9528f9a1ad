"""Parameters by name: "block1/conv1/kernel" for params["block1"]["conv1"]["kernel"]."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of jax.tree_util as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in name order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict(sorted((path_name(path), leaf) for path, leaf in leaves))


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns a tree of the same structure with `function(name, leaf)` as its leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )


def param_count(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns whether no floating-point leaf holds an infinity or NaN, as bool []."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))


def sha256(tree: Any) -> str:
    """Returns the SHA-256 of every leaf's name, dtype, shape and bytes, in name order, as hex.

    Equal hashes mean bitwise equal trees; where the arrays lie (device, sharding) plays no part.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
