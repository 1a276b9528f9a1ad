"""Parameters by name: "block1/conv1/kernel" for params["block1"]["conv1"]["kernel"]."""

import hashlib
from collections.abc import Callable, Mapping
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


def select(wanted: Callable[[str], bool], tree: Any) -> Any:
    """Returns the tree with None, which has no leaves, in place of each leaf that is not wanted.

    `wanted` gets the leaf's name; compare `eqx.partition`.
    """
    return map_named(lambda name, leaf: leaf if wanted(name) else None, tree)


def combine(part: Any, whole: Any) -> Any:
    """Returns `part` with each None filled by the leaf of `whole`; compare `eqx.combine`."""
    return jax.tree.map(
        lambda kept, leaf: leaf if kept is None else kept, part, whole, is_leaf=lambda x: x is None
    )


def replace_named(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree with its leaves replaced by those of `leaves` that have the same name."""
    return map_named(lambda name, leaf: leaves.get(name, leaf), tree)


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

    Equal hashes mean bitwise equal trees, except that the shapes () and (1,) count as equal. The
    hash does not depend on where the arrays are (device, sharding).
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
