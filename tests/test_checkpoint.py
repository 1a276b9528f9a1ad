"""Checkpoints: what was saved is read back bitwise, and damage is always noticed."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import empty, everything, largest_file

from cnn_jax import trees
from cnn_jax.errors import UserError
from cnn_jax.runs import checkpoint
from cnn_jax.runs.checkpoint import CheckpointError, Checkpoints

STATE = {
    "params": {"fc": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}},
    "step": jnp.int32(7),
    "half": jnp.array([1.5, -2.5], jnp.bfloat16),
    "nothing": None,
}


def never(message: str) -> None:
    raise AssertionError(message)


def save(workdir: Path, *steps: int) -> None:
    with Checkpoints(workdir, "latest", writable=True) as store:
        for step in steps:
            store.save(step, {**STATE, "step": jnp.int32(step)}, {"note": step})


def test_a_state_comes_back_bitwise_with_its_record(workdir: Path):
    save(workdir, 7)
    with Checkpoints(workdir, "latest", writable=True) as store:
        restored = store.restore_newest(lambda _: jax.eval_shape(lambda: STATE), never)
    assert restored is not None
    assert trees.sha256(restored[0]) == trees.sha256(STATE)
    assert restored[0]["half"].dtype == jnp.bfloat16
    assert restored[1] == {"note": 7}


def test_only_the_newest_are_kept(workdir: Path):
    save(workdir, 1, 2, 3, 4)
    assert sorted(p.name for p in (workdir / "checkpoints/latest").glob("[0-9]*")) == ["3", "4"]


def test_saving_a_step_again_replaces_it(workdir: Path):
    with Checkpoints(workdir, "best", writable=True) as store:
        store.save(3, {"x": jnp.zeros(2)}, {"try": 1})
        store.save(3, {"x": jnp.ones(2)}, {"try": 2})
        loaded = store.read(3, everything)
    np.testing.assert_array_equal(loaded.arrays["x"], [1, 1])
    assert loaded.record == {"try": 2}


def test_load_reads_a_part_without_a_template(workdir: Path):
    save(workdir, 7)
    loaded = checkpoint.load(workdir, "latest", lambda name: name.startswith("params."))
    assert set(loaded.arrays) == {"params.fc.kernel", "params.fc.bias"}
    np.testing.assert_array_equal(loaded.subtree("params")["fc"]["bias"], [1, 1, 1])
    assert loaded.subtree("batch_stats") == {}


def flip_bit(folder: Path) -> None:
    """Changes one bit in the middle of the file that holds the arrays."""
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[:-20])


def remove_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def edit_record(folder: Path) -> None:
    path = folder / "meta/metadata"
    path.write_text(path.read_text().replace('"note": 2', '"note": 5'))
    assert json.loads(path.read_text())["record"] == {"note": 5}


DAMAGES = [flip_bit, truncate, remove_arrays, empty, edit_record]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_and_the_one_before_is_taken(workdir: Path, damage):
    save(workdir, 1, 2)
    damage(workdir / "checkpoints/latest/2")
    warnings: list[str] = []
    with Checkpoints(workdir, "latest", writable=True) as store:
        restored = store.restore_newest(lambda _: STATE, warnings.append)
    assert restored is not None
    assert int(restored[0]["step"]) == 1
    assert len(warnings) == 1
    assert "checkpoints/latest/2 is damaged" in warnings[0]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_not_loaded_outside_training(workdir: Path, damage):
    save(workdir, 1, 2)
    damage(workdir / "checkpoints/latest/2")
    with pytest.raises(UserError, match="latest/2 is damaged"):
        checkpoint.load(workdir, "latest", everything)


def test_bits_all_over_the_array_file_count(workdir: Path):
    """A bit at each of some 24 places, from the first byte to the last: all are noticed."""
    save(workdir, 1)
    folder = workdir / "checkpoints/latest/1"
    path = largest_file(folder / "state")
    whole = path.read_bytes()
    missed = []
    with Checkpoints(workdir, "latest", writable=True) as store:
        for position in range(0, len(whole), max(len(whole) // 24, 1)):
            changed = bytearray(whole)
            changed[position] ^= 0x10
            path.write_bytes(changed)
            try:
                loaded = store.read(1, everything)
            except CheckpointError:
                continue
            if trees.sha256(loaded.arrays) != trees.sha256(
                {
                    n.replace("/", "."): a
                    for n, a in trees.named_leaves({**STATE, "step": jnp.int32(1)}).items()
                }
            ):
                missed.append(position)
    assert missed == []


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_go_with_the_next_save(workdir: Path):
    save(workdir, 1)
    leftover = workdir / "checkpoints/latest/2.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)
    with Checkpoints(workdir, "latest", writable=True) as store:
        assert store.steps() == [1]
        store.save(3, STATE, {})
    assert sorted(p.name for p in leftover.parent.glob("[0-9]*")) == ["1", "3"]


def test_another_architecture_is_refused_with_both_sides_named(workdir: Path):
    save(workdir, 1)
    other = {**STATE, "params": {"fc": {"kernel": jnp.zeros((2, 4)), "gamma": jnp.zeros(3)}}}
    with Checkpoints(workdir, "latest", writable=True) as store, pytest.raises(UserError) as error:
        store.restore_newest(lambda _: other, never)
    assert "it holds params.fc.bias [3] float32, params.fc.kernel [2, 3] float32" in str(
        error.value
    )
    assert "needs params.fc.gamma [3] float32, params.fc.kernel [2, 4] float32" in str(error.value)


def test_another_dtype_is_refused(workdir: Path):
    save(workdir, 1)
    with (
        Checkpoints(workdir, "latest", writable=True) as store,
        pytest.raises(UserError, match="int32"),
    ):
        store.restore_newest(lambda _: {**STATE, "step": jnp.float32(0)}, never)


def test_no_checkpoint_is_none_in_training_and_an_error_outside(workdir: Path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(workdir, "latest", everything)
    with Checkpoints(workdir, "latest", writable=True) as store:
        assert store.restore_newest(lambda _: STATE, never) is None
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(workdir, "latest", everything)


def test_damage_outside_what_is_asked_for_counts_too(workdir: Path, monkeypatch):
    """Evaluation asks for the parameters alone, and must not use a checkpoint that is damaged."""
    save(workdir, 7)
    read_arrays = Checkpoints._read_arrays

    def damaged(self: Checkpoints, *arguments) -> dict:
        return {**read_arrays(self, *arguments), "half": np.zeros(2, jnp.bfloat16)}

    monkeypatch.setattr(Checkpoints, "_read_arrays", damaged)
    with pytest.raises(UserError, match="the content hash of half differs"):
        checkpoint.load(workdir, "latest", lambda name: name.startswith("params."))
