"""Checkpoints through orbax, each with content hashes of its own.

A checkpoint is a flat dict of arrays by name ("params.fc1.kernel") and a JSON record. Orbax writes
to a temporary folder and renames it, so a killed save leaves no half checkpoint; but it does not
notice bits that change on disk later, hence the SHA-256 of every array that a restore compares.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
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

from cnn_jax import devices, trees
from cnn_jax.errors import UserError, one_line

# An upper bound of what orbax writes for an array beside its numbers: names, indices, hashes.
_FILES_SIZE = 16_384
_ORBAX = threading.Lock()


class CheckpointError(Exception):
    """A checkpoint on disk that is damaged, in one line."""


@dataclass(frozen=True)
class Loaded:
    """What was read back from one checkpoint."""

    step: int
    arrays: dict[str, Any]
    """By dotted name; only those that were asked for."""
    record: dict[str, Any]

    def subtree(self, name: str) -> dict[str, Any]:
        """Returns the arrays below a name as nested dicts; an empty dict where there are none."""
        prefix = name + "."
        flat = {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}
        return flax.traverse_util.unflatten_dict(flat, sep=".")


class Checkpoints:
    """The checkpoints of one kind ("latest" or "best") below a workdir.

    Of several processes only the main one touches the folder; in the others `save` does nothing,
    and nothing else may be called.

    Args:
        workdir: the run's folder.
        kind: the folder's name below `checkpoints/`.
        keep: how many are kept, newest first; None opens the folder for reading only.
    """

    def __init__(self, workdir: Path, kind: str, keep: int | None = None) -> None:
        self.folder = Path(os.path.abspath(workdir)) / "checkpoints" / kind
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,  # Not supported with active_processes.
            cleanup_tmp_directories=keep is not None,
            # Donated buffers are overwritten by the next segment, so a save ends before it starts.
            enable_async_checkpointing=False,
            # Orbax would wait for all processes, of which only the main one comes here.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        )
        self._manager: Any = None
        if not devices.is_main():
            return
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with _quiet_orbax():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if devices.is_main():
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, rising."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes the arrays of `state` and a JSON `record`; one of the same step is replaced.

        Raises:
            UserError: it can't be written. Those before it stay as they are.
        """
        if not devices.is_main():
            return
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

        The hashes of all are compared: of a checkpoint that is damaged anywhere nothing is used.

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
        # Orbax fits arrays to whatever target it is given, so the target is what was saved; and as
        # numpy arrays, which any number of devices can take up.
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
        """Returns what `read` gives for the newest whole checkpoint, or None without any.

        Damaged ones are named through `warn` and passed over.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step, wanted)
            except CheckpointError as error:
                warn(f"{error}; passed over")
        return None

    def restore_newest(
        self, template: Callable[[int], Any], warn: Callable[[str], None]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest whole checkpoint as a tree like `template(step)`, and its record.

        None where there is none.

        Raises:
            UserError: it does not hold exactly the template's arrays, by name, shape and dtype.
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
    """Returns the newest checkpoint of a kind, for use outside training; never a damaged one.

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
    """Refuses a save that the disk has no room for, rather than to fail in the middle of it."""
    needed = sum(leaf.nbytes for leaf in arrays.values()) + _FILES_SIZE * (len(arrays) + 1)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some remote file systems call their total 0
        raise UserError(
            f"{folder}: {os.strerror(errno.ENOSPC)}: a checkpoint takes {needed / 1e6:,.1f} MB, "
            f"and {disk.free / 1e6:,.1f} MB are free"
        )


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps orbax, and the futures it drops, from printing what it raises, with its traceback.

    In one thread at a time, as the verbosity is that of all.
    """
    with _ORBAX:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel("CRITICAL")  # for good, as its futures end later
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    """Returns what went wrong in one line: of the system's errors, its own few words."""
    text = one_line(error)
    code = re.search(r"os_error_code='(\d+)'", text)  # tensorstore's, behind a page of paths
    return os.strerror(int(code[1])) if code else text[:200]


def load_variables(workdir: Path, kind: str) -> tuple[dict[str, Any], Loaded]:
    """Returns the variables that are evaluated, and the rest of the newest checkpoint of a kind.

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
    """Says which arrays by name two sides do not share, at most three a side; "" if they agree."""
    a = {name: _describe(leaf) for name, leaf in found.items()}
    b = {name: _describe(leaf) for name, leaf in expected.items()}
    return "" if a == b else f"it holds {_only(a, b)}, and this config needs {_only(b, a)}"


def _only(a: dict[str, Any], b: dict[str, Any]) -> str:
    names = [f"{n} {a[n]['shape']} {a[n]['dtype']}" for n in a if a[n] != b.get(n)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing else"


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
