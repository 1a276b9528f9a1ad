"""Names and hashes of parameter trees."""

import jax.numpy as jnp
import numpy as np

from cnn_jax import trees

TREE = {"b": {"kernel": np.ones((2, 3), np.float32)}, "a": [np.zeros(4, np.int32), None]}


def test_leaves_are_named_by_their_path_in_name_order():
    assert list(trees.named_leaves(TREE)) == ["a/0", "b/kernel"]


def test_map_named_keeps_the_structure():
    assert trees.map_named(lambda name, _: name, TREE) == {
        "b": {"kernel": "b/kernel"},
        "a": ["a/0", None],
    }


def test_param_count_counts_scalars():
    assert trees.param_count(TREE) == 10


def test_sha256_is_of_bytes_not_of_where_they_lie():
    reference = trees.sha256(TREE)
    assert (
        trees.sha256({"a": [jnp.zeros(4, jnp.int32), None], "b": {"kernel": jnp.ones((2, 3))}})
        == reference
    )
    assert len(reference) == 64


def test_sha256_changes_with_one_bit_name_dtype_or_shape():
    ones = np.ones(4, np.float32)
    flipped = ones.copy()
    flipped.view(np.uint32)[2] ^= 1
    hashes = {
        trees.sha256(tree)
        for tree in (
            {"x": ones},
            {"x": flipped},
            {"y": ones},
            {"x": ones.view(np.int32)},
            {"x": ones.reshape(2, 2)},
        )
    }
    assert len(hashes) == 5
