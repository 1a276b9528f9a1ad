"""CIFAR-10 in parts that can be carried."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import carry_cifar


def test_parts_give_the_whole_set_in_its_order(tmp_path: Path):
    whole = carry_cifar.tiny()
    carry_cifar.write_parts(tmp_path, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part1.npz", "part2.npz"]
    found = carry_cifar.read_parts(tmp_path)
    for array, expected in zip(found[:4], whole[:4], strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert found[4] == whole[4]
    (tmp_path / "part2.npz").unlink()
    with pytest.raises(FileNotFoundError, match="part2"):
        carry_cifar.read_parts(tmp_path)
