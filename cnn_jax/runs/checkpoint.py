"""Checkpoints through orbax, each with content hashes of its own.

A checkpoint is a flat dict of arrays by name ("params.fc1.kernel") and a JSON record. Orbax writes
to a temporary folder and renames it, so a killed save leaves no partial checkpoint. Orbax does not
detect bits that change on disk later, so every array is stored with its SHA-256, which is compared
when the checkpoint is read.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from cnn_jax import trees
from cnn_jax.errors import UserError, one_line

# An upper bound on the bytes that orbax writes for an array in addition to its numbers.
_FILES_SIZE = 16_384
# Two, so that a damaged newest checkpoint leaves one to fall back to.
_KEPT = {"latest": 2, "best": 1}


class CheckpointError(Exception):
    """A checkpoint on disk that is damaged, in one line."""


@dataclass(frozen=True)
class Loaded:
    """The contents of one checkpoint."""

    step: int
    arrays: dict[str, Any]
    """By dotted name; only the requested ones."""
    record: dict[str, Any]

    def subtree(self, name: str) -> dict[str, Any]:
        """Returns the arrays below a name as nested dicts; an empty dict where there are none."""
        prefix = name + "."
        flat = {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}
        return flax.traverse_util.unflatten_dict(flat, sep=".")


class Checkpoints:
    """The checkpoints of one kind ("latest" or "best") in a run's folder.

    Args:
        workdir: the run's folder.
        kind: the folder's name below `checkpoints/`.
        writable: whether checkpoints can be saved; saving keeps the two newest, or the best one.
    """

    def __init__(self, workdir: Path, kind: str, writable: bool = False) -> None:
        self.folder = Path(os.path.abspath(workdir)) / "checkpoints" / kind
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT[kind] if writable else None,
            create=False,  # Not supported with active_processes.
            cleanup_tmp_directories=writable,
            # Donated buffers are overwritten by the next segment, so a save ends before it starts.
            enable_async_checkpointing=False,
            # Of several processes only the first one saves: orbax must not wait for the others.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        )
        if writable:
            self.folder.mkdir(parents=True, exist_ok=True)
        with _quiet_orbax():
            self._manager: Any = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, rising."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes the arrays of `state` and a JSON `record`, replacing one of the same step.

        Raises:
            UserError: it can't be written. Earlier checkpoints stay as they are.
        """
        # As numpy, whose bytes are the same for one process and for several.
        arrays = _flat(jax.tree.map(np.asarray, state))
        described = {
            name: {**_describe(leaf), "sha256": trees.sha256({name: leaf})}
            for name, leaf in arrays.items()
        }
        meta = {"record": record, "arrays": described}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            meta=ocp.args.JsonSave({**meta, "sha256": _json_sha256(meta)}),
        )
        _check_space(self.folder, arrays)
        try:
            with _quiet_orbax():
                if step in self.steps():
                    self._manager.delete(step)
                self._manager.save(step, args=args, force=True)
        except Exception as error:  # orbax and tensorstore raise whatever the disk leads to
            raise UserError(f"{self.folder / str(step)} can't be saved: {_reason(error)}") from None

    def read(self, step: int, wanted: Callable[[str], bool]) -> Loaded:
        """Returns the arrays saved at `step` whose dotted names are `wanted`.

        All arrays' hashes are compared, so that no part of a damaged checkpoint is used.

        Raises:
            CheckpointError: unreadable, incomplete, or changed on disk.
        """
        where = self.folder / str(step)
        try:
            meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
            digest = meta.pop("sha256")
            described = meta["arrays"]
            if digest != _json_sha256(meta):
                raise ValueError("the content hash of its record differs")
            arrays = self._read_arrays(step, described)
            for name, description in described.items():
                if trees.sha256({name: arrays[name]}) != description["sha256"]:
                    raise ValueError(f"the content hash of {name} differs")
        except Exception as error:  # orbax and tensorstore raise whatever the damage leads to
            raise CheckpointError(f"{where} is damaged: {_reason(error)}") from None
        return Loaded(step, {n: a for n, a in arrays.items() if wanted(n)}, meta["record"])

    def _read_arrays(self, step: int, described: dict[str, Any]) -> dict[str, Any]:
        # Orbax fits arrays to any target, so the target has the shapes that were saved. As numpy
        # arrays they can be placed on any number of devices afterwards.
        targets = {
            name: jax.ShapeDtypeStruct(d["shape"], d["dtype"]) for name, d in described.items()
        }
        as_numpy = dict.fromkeys(targets, ocp.RestoreArgs(restore_type=np.ndarray))
        args = ocp.args.PyTreeRestore(item=targets, restore_args=as_numpy)
        return self._restore(step, state=args)["state"]

    def _restore(self, step: int, **items: Any) -> Any:
        with _quiet_orbax():
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def newest(self, warn: Callable[[str], None], wanted: Callable[[str], bool]) -> Loaded | None:
        """Returns the newest undamaged checkpoint, or None.

        `warn` gets a line for each damaged one.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step, wanted)
            except CheckpointError as error:
                warn(f"{error}; skipped")
        return None

    def restore_newest(
        self, template: Callable[[int], Any], warn: Callable[[str], None]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest undamaged checkpoint as a tree like `template(step)`, and its record.

        Returns None if there is none.

        Raises:
            UserError: its arrays differ from the template's in name, shape or dtype.
        """
        loaded = self.newest(warn, lambda name: True)
        if loaded is None:
            return None
        tree = template(loaded.step)
        if mismatch := difference(loaded.arrays, _flat(tree)):
            raise UserError(
                f"{self.folder / str(loaded.step)} was made by another network or optimizer: "
                + mismatch
            )
        restored = trees.map_named(lambda name, _: loaded.arrays[_dotted(name)], tree)
        return restored, loaded.record


def load(workdir: Path, kind: str, wanted: Callable[[str], bool]) -> Loaded:
    """Returns the newest checkpoint of a kind, for use outside training.

    Raises:
        UserError: there is none, or the newest is damaged.
    """
    folder = workdir / "checkpoints" / kind
    if not folder.is_dir():
        raise UserError(f"no checkpoint: {folder} does not exist; train with this --workdir first")
    with Checkpoints(workdir, kind) as store:
        if not store.steps():
            raise UserError(f"no checkpoint in {folder}; train with this --workdir first")
        try:
            return store.read(store.steps()[-1], wanted)
        except CheckpointError as error:
            raise UserError(f"{error}; remove it, or train with this --workdir again") from None


def _check_space(folder: Path, arrays: dict[str, Any]) -> None:
    """Refuses a save that the disk has no room for, before any of it is written."""
    needed = sum(leaf.nbytes for leaf in arrays.values()) + _FILES_SIZE * (len(arrays) + 1)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some remote file systems call their total 0
        raise UserError(
            f"{folder}: {os.strerror(errno.ENOSPC)}: a checkpoint takes {needed / 1e6:,.1f} MB, "
            f"and {disk.free / 1e6:,.1f} MB are free"
        )


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps orbax and its abandoned futures from printing tracebacks of errors that it raises."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel("CRITICAL")  # and leaves it so, as the futures end later
    _ignore_late_callbacks()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@functools.cache
def _ignore_late_callbacks() -> None:
    """Silences callbacks of tensorstore's threads that come after orbax has closed its event loop.

    After an error there may be one. Python would print its traceback, and nothing depends on it.
    """
    before = sys.unraisablehook

    def hook(late: Any) -> None:
        if str(late.exc_value) != "Event loop is closed":
            before(late)

    sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """Returns the cause in one line; for errors of the operating system, its own short text."""
    text = one_line(error)
    code = re.search(r"os_error_code='(\d+)'", text)  # tensorstore's, behind a page of paths
    return os.strerror(int(code[1])) if code else text[:200]


def load_variables(workdir: Path, kind: str) -> tuple[dict[str, Any], Loaded]:
    """Returns the evaluated variables, and the newest checkpoint of a kind that they are from.

    Raises:
        UserError: there is none, or the newest is damaged.
    """
    collections = ("params", "batch_stats")
    loaded = load(workdir, kind, lambda name: name.startswith((*collections, "average.")))
    averages = {
        name.removeprefix("average."): array
        for name, array in loaded.arrays.items()
        if name.startswith("average.")
    }
    loaded = replace(loaded, arrays=loaded.arrays | averages)
    return {name: loaded.subtree(name) for name in collections}, loaded


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _flat(tree: Any) -> dict[str, Any]:
    return {_dotted(name): leaf for name, leaf in trees.named_leaves(tree).items()}


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Returns which arrays two sides do not share, at most three a side, or "" if they agree."""
    a = {name: _describe(leaf) for name, leaf in found.items()}
    b = {name: _describe(leaf) for name, leaf in expected.items()}
    return "" if a == b else f"it holds {_only(a, b)}, and this config needs {_only(b, a)}"


def _only(a: dict[str, Any], b: dict[str, Any]) -> str:
    names = [f"{n} {a[n]['shape']} {a[n]['dtype']}" for n in a if a[n] != b.get(n)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing else"


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
