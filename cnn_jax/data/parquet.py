"""A folder of parquet files with images and labels, as Hugging Face's `datasets` keeps them.

The images are unpacked once, as they are, into the cache folder, and are photos like others then.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.data import labels, progress
from cnn_jax.data.cache import digest
from cnn_jax.data.photo_folder import Listing, normal, part_of
from cnn_jax.errors import UserError, one_line

_FORMAT = 1
"""To be raised with every change to what is unpacked: older folders are then rebuilt."""
_CONTENT = "labels.json"
_ROWS = 64
"""Images that are in memory at once."""


def find(folder: Path) -> list[Path]:
    """Returns the parquet files in a folder, its `data` or `default`, or a part's folder, sorted.

    Raises:
        OSError: a folder can't be read.
    """
    folders = [folder, folder / "data", folder / "default"]
    folders += [p for parent in (folder, folder / "default") for p in _part_folders(parent)]
    return sorted(path for each in folders if each.is_dir() for path in each.glob("*.parquet"))


def _part_folders(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if part_of(p.name)] if folder.is_dir() else []


def list_parquet(folder: Path, cache_dir: Path, chosen: Sequence[str] = ()) -> Listing:
    """Lists the images of a folder's parquet files, which are unpacked if they are not yet.

    A file's name, or that of the folder it lies in, begins with its part: train, validation or test
    in the spellings of folders. A column holds the images, as bytes or as a struct with `bytes`,
    and another one the labels, as names or as numbers. Names for numbers are those that `datasets`
    wrote into the files, or into README.md or dataset_info.json beside them.

    Args:
        folder: the folder.
        cache_dir: the cache folder.
        chosen: the classes that are wanted, "data.classes"; empty: all.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or has no such columns, or there is
            no training part.
        OSError: a file can't be read, or an image not written.
    """
    files = find(folder)
    parts = _parts(folder, files)
    states = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    target = cache_dir / f"parquet-{digest(str(folder.resolve()))}"
    fingerprint = digest(_FORMAT, states)
    content = _unpacked(target, fingerprint)
    if content is None:
        content = _unpack(folder, parts, target, fingerprint)
    rows = [labels.Row(*row) for row in content["rows"]]
    return labels.list_rows(rows, folder, target, f"parquet {folder}", chosen)


def _parts(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Returns the part of each file.

    Raises:
        UserError: a name begins with none, or there is no training part.
    """
    parts = {}
    for file in files:
        words = [re.split(r"[-_.]", file.stem)[0], *file.relative_to(folder).parts[:-1]]
        parts[file] = next(filter(None, map(part_of, words)), "")
        if not parts[file]:
            raise UserError(f"{file}: its name must begin with train, validation or test")
    if "train" not in parts.values():
        raise UserError(f"{folder} has no parquet file of a train part")
    return parts


def _unpacked(target: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        content = json.loads((target / _CONTENT).read_text())
        return content if content["fingerprint"] == fingerprint else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _unpack(
    folder: Path, parts: Mapping[Path, str], target: Path, fingerprint: str
) -> dict[str, Any]:
    """Writes each image to a file in `target`, which appears whole or not at all."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{folder} holds parquet files, and reading them needs pyarrow; install it with "
            "pip install -e '.[parquet]'"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="parquet-") as name:
        unfinished = Path(name, "whole")
        try:
            opened = {file: pyarrow.parquet.ParquetFile(file) for file in parts}
            total = sum(file.metadata.num_rows for file in opened.values())
            with progress.bar("unpacking images", total) as done:
                for path, file in opened.items():
                    names = _class_names(folder, file.schema_arrow)
                    inner = path.relative_to(folder).with_suffix("")
                    (unfinished / inner).mkdir(parents=True)
                    for number, image, label in _rows(path, file, names):
                        stored = inner / f"{number:06}"
                        (unfinished / stored).write_bytes(image)
                        place = f"row {number} of {path.name}"
                        rows.append((place, str(stored), label, parts[path]))
                        done()
        except pyarrow.ArrowException as error:
            raise UserError(f"{folder} can't be read: {one_line(error)}") from None
        content = {"fingerprint": fingerprint, "rows": rows}
        (unfinished / _CONTENT).write_text(json.dumps(content))
        shutil.rmtree(target, ignore_errors=True)
        try:
            unfinished.rename(target)
        except OSError:
            if _unpacked(target, fingerprint) is None:  # Not by another process meanwhile.
                raise
    return content


def _rows(path: Path, file: Any, names: Sequence[str]) -> Iterator[tuple[int, bytes, str]]:
    """Yields the number, the image and the class name of each row.

    Raises:
        UserError: there are no such columns, or a row has no image or an unknown label.
    """
    image_column, label_column = _columns(path, file.schema_arrow)
    number = 0
    for batch in file.iter_batches(_ROWS, columns=[image_column, label_column]):
        for row in batch.to_pylist():
            image, label = row[image_column], row[label_column]
            image = image.get("bytes") if isinstance(image, dict) else image
            if not image:
                raise UserError(f"{path}: row {number} holds no image, or only its path")
            if isinstance(label, int) and names:
                label = names[label] if 0 <= label < len(names) else None
            if label is None:
                raise UserError(f"{path}: row {number} has an unknown label")
            yield number, image, normal(str(label))
            number += 1


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """Returns the names of the columns of images and of labels.

    Raises:
        UserError: there are none, or several could be meant.
    """
    import pyarrow.types as kinds

    described = _features(schema)
    images = [
        field.name
        for field in schema
        if kinds.is_binary(field.type)
        or kinds.is_large_binary(field.type)
        or (kinds.is_struct(field.type) and "bytes" in [f.name for f in field.type])
    ]
    labels = [n for n, feature in described.items() if feature.get("_type") == "ClassLabel"] or [
        field.name
        for field in schema
        if kinds.is_integer(field.type) or kinds.is_string(field.type)
    ]
    chosen = []
    for found, usual in ((images, ("image", "img")), (labels, ("label", "labels", "class"))):
        fitting = found if len(found) == 1 else [name for name in usual if name in found][:1]
        if not fitting:
            what = "images" if found is images else "labels"
            columns = ", ".join(schema.names)
            raise UserError(f"{path}: which column holds the {what} is not clear: {columns}")
        chosen += fitting
    return chosen[0], chosen[1]


def _features(schema: Any) -> dict[str, Any]:
    """Returns what `datasets` has written into a file about its columns, by name."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _class_names(folder: Path, schema: Any) -> Sequence[str]:
    """Returns the names of labels that are numbers, or () if nothing tells them."""
    for features in (_features(schema), _of_info(folder), _of_readme(folder)):
        for feature in features.values():
            if isinstance(feature, dict) and feature.get("names"):
                return [str(name) for name in feature["names"]]
    return ()


def _of_info(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "dataset_info.json").read_text())["features"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _of_readme(folder: Path) -> dict[str, Any]:
    """Returns the columns with class names that the heading of README.md describes."""
    import yaml

    try:
        heading = (folder / "README.md").read_text().split("---")[1]
        info = yaml.safe_load(heading)["dataset_info"]
        columns = (info[0] if isinstance(info, list) else info)["features"]
        return {c["name"]: _names(c["dtype"]) for c in columns if isinstance(c["dtype"], dict)}
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return {}


def _names(dtype: dict[str, Any]) -> dict[str, Any]:
    """Returns {"names": [...]} for the type of a column, whose names README.md may number."""
    names = dtype.get("class_label", {}).get("names", [])
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return {"names": names}
