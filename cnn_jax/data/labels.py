"""Photos whose classes are listed in a file: CSV or JSON lines with `path`, `label` and `split`."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax.data.photo_folder import Listing, normal, part_of
from cnn_jax.errors import UserError, nearest, one_line, printable

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
"""The files that are read."""
_FIRST = 5
"""Rows that a message names."""


@dataclass(frozen=True)
class Row:
    """A photo and what is said about it."""

    place: str
    """Where it is said, as messages name it."""
    path: str
    label: str
    part: str


def list_file(file: Path, chosen: Sequence[str] = ()) -> Listing:
    """Lists the photos that a file of labels names.

    A CSV file has a heading, with the columns `path`, `label` and optionally `split`, which is
    train, validation or test in the spellings of folders; commas, semicolons or tabs divide them.
    Of JSON lines, each is an object with these keys. Paths are relative to the file's folder.

    Args:
        file: the file.
        chosen: the classes that are wanted, "data.classes"; empty: all.

    Raises:
        UserError: the file is not such a file; or it names photos that do not exist or that it has
            named before, or labels that are empty or that train lacks. The first five are named.
        OSError: the file can't be read.
    """
    try:
        rows = [*(_json_rows(file) if "js" in file.suffix.lower() else _csv_rows(file))]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} can't be read: {one_line(error)}") from None
    _refuse(file, "has no label", [row for row in rows if not row.label])
    unknown = "has a split other than train, validation or test"
    _refuse(file, unknown, [row for row in rows if not row.part])
    times = Counter(row.path for row in rows)
    _refuse(file, "is named more than once", [row for row in rows if times[row.path] > 1])
    missing = [row for row in rows if not (file.parent / row.path).is_file()]
    _refuse(file, "does not exist", missing)
    return list_rows(rows, file, file.parent, f"labels {file}", chosen)


def list_rows(
    rows: Sequence[Row], where: Path, root: Path, description: str, chosen: Sequence[str]
) -> Listing:
    """Lists labelled photos.

    Args:
        rows: the photos.
        where: the file or folder that names them.
        root: the folder that their paths are relative to.
        description: what `Listing.description` becomes.
        chosen: the classes that are wanted, "data.classes"; empty: all.

    Raises:
        UserError: there are no training photos of two classes, or photos with a label that no
            training photo has.
    """
    wanted = [*map(normal, chosen)]
    known = sorted({row.label for row in rows})
    for name in wanted:
        if name not in known:
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise UserError(f"data.classes: there is no class {name}{hint}")
    rows = [row for row in rows if not wanted or row.label in wanted]
    names = sorted({row.label for row in rows if row.part == "train"})
    unknown = [row for row in rows if row.label not in names]
    _refuse(where, "has a label that no training photo has", unknown)
    if len(names) < 2:
        raise UserError(f"{where} needs training photos of two labels or more")
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row.part, {name: [] for name in names})[row.label].append(row.path)
    order = [part for part in ("train", "validation", "test") if part in found]
    parts = {part: {n: tuple(sorted(f)) for n, f in found[part].items()} for part in order}
    notes = [
        f"{where}: {part} has no photos of {', '.join(missing)}"
        for part, classes in parts.items()
        if (missing := [name for name, files in classes.items() if not files])
    ]
    return Listing(root, description, parts, notes=tuple(notes))


def _csv_rows(file: Path) -> Iterator[Row]:
    # Names of files may hold bytes that are not text.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        heading = lines.readline()
        lines.seek(0)
        delimiter = max(",;\t", key=heading.count)
        reader = csv.DictReader(lines, delimiter=delimiter)
        columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
        if not {"path", "label"} <= set(columns):
            found = ", ".join(columns) or "nothing"
            raise ValueError(f"its first line must name the columns path and label, not {found}")
        for values in reader:
            row = {key: values[name] for key, name in columns.items()}
            yield _row(reader.line_num, row)


def _json_rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                values = json.loads(line)
                if not isinstance(values, dict) or not {"path", "label"} <= set(values):
                    raise ValueError(f"line {number} must be an object with path and label")
                yield _row(number, values)


def _row(line: int, values: dict[str, Any]) -> Row:
    path, label, split = (
        "" if values.get(key) is None else str(values[key]).strip()
        for key in ("path", "label", "split")
    )
    part = part_of(split) if "split" in values else "train"
    return Row(f"line {line}", os.path.normpath(path), normal(label), part)


def _refuse(file: Path, what: str, rows: Sequence[Row]) -> None:
    """Refuses rows, naming the first ones.

    Raises:
        UserError: there are any.
    """
    if rows:
        first = ", ".join(f"{row.path} ({row.place})" for row in rows[:_FIRST])
        more = f" and {len(rows) - _FIRST} more" if len(rows) > _FIRST else ""
        raise UserError(printable(f"{file}: {what}: {first}{more}"))
