"""A folder of the user's own photos: one subfolder per class, in one part or in several."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnn_jax.data import photos
from cnn_jax.errors import UserError, nearest

_SPELLINGS = {
    "train": "train|training",
    "validation": "val|valid|validation|dev",
    "test": "test|testing",
}
_PARTS = {
    part: re.compile(rf"(seg[_-])?({words})([_-]?(set|data|images|photos|split))?", re.IGNORECASE)
    for part, words in _SPELLINGS.items()
}
_NAMES = "train/, validation/ and test/"


@dataclass(frozen=True)
class Listing:
    """Labelled photos that have not been read yet."""

    root: Path
    """The folder that all paths are relative to."""
    description: str
    """Where the photos come from, as reports print it."""
    parts: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Paths by class, of each part: `train`, and perhaps `validation` and `test`. All parts have
    the classes of `train`, sorted, some of them perhaps without photos."""
    skipped: tuple[str, ...] = ()
    """ "path: reason" for each file or folder that is skipped."""
    notes: tuple[str, ...] = ()
    """What the user should know besides, one sentence each."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(self.parts["train"])

    @property
    def files(self) -> list[str]:
        """The paths of all photos: part by part, class by class."""
        return [f for classes in self.parts.values() for files in classes.values() for f in files]


def part_of(name: str) -> str:
    """Returns which part a folder's name stands for, or "": `Training` is `train`."""
    return next((part for part, spelled in _PARTS.items() if spelled.fullmatch(name)), "")


def normal(name: str) -> str:
    """Returns a class name in Unicode's form NFC, as names that look alike should be equal."""
    return unicodedata.normalize("NFC", name)


def list_folder(root: Path, chosen: Sequence[str] = (), least: int = 2) -> Listing:
    """Lists the photos below a folder.

    It holds one subfolder for each class; or a folder `train` of these, and optionally `validation`
    and `test`, in several spellings.

    Args:
        root: the folder.
        chosen: the classes that are wanted, "data.classes"; empty: all.
        least: the number of classes that there must be; 2 to train on them.

    Raises:
        UserError: it has fewer classes than that, a class without photos, parts that differ in a
            way that would change their meaning, or names that leave open what is a class.
        OSError: a folder can't be examined.
    """
    chosen = tuple(map(normal, chosen))
    notes: list[str] = []
    skipped: list[str] = []
    folders = _part_folders(root, chosen, notes, skipped)
    found = {p: _class_files(f, root, chosen, skipped) for p, f in folders.items()}
    train = found["train"]
    for name in chosen:
        if name not in train:
            if link := [line for line in skipped if normal(line).startswith(f"{name}: ")]:
                raise UserError(f"{root}: class {name} can't be read: {link[0]}")
            known = [*map(normal, _names(folders["train"]))]
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise UserError(f"data.classes: there is no class {name}{hint}")
    _pass_over_empty(found, chosen, root, folders, skipped)
    if len(train) < least:
        raise UserError(_too_few(root, folders["train"], least, skipped))
    for part, classes in found.items():
        where = f"{root}: {folders[part].relative_to(root)}/"
        if extra := [name for name in classes if name not in train]:
            guess = nearest(extra[0], [name for name in train if name not in classes])
            raise UserError(
                f"{where} has photos of a class that train lacks: {', '.join(extra)}{guess}; "
                "rename or remove it, or choose the classes with data.classes"
            )
        if missing := [name for name in train if name not in classes]:
            notes.append(f"{where} has no photos of {', '.join(missing)}")
    names = sorted(train)
    parts = {part: {n: tuple(c.get(n, ())) for n in names} for part, c in found.items()}
    return Listing(root, f"folder {root}", parts, tuple(sorted(skipped)), tuple(notes))


def _part_folders(
    root: Path, chosen: Sequence[str], notes: list[str], skipped: list[str]
) -> dict[str, Path]:
    """Returns the folder of each part: `root` itself unless it has a `train` folder of classes."""
    tops = _names(root)
    spelled: dict[str, list[str]] = {}
    for name in tops:
        spelled.setdefault(part_of(name), []).append(name)
    has_parts = any(_holds_classes(root / name) for name in spelled.get("train", ()))
    if not has_parts or (chosen and set(chosen) <= set(map(normal, tops))):
        if not chosen:
            _refuse_unnamed_parts(root, tops, spelled)
        return {"train": root}
    folders = {}
    for part in _PARTS:
        names = spelled.get(part, [])
        with_classes = [name for name in names if _names(root / name)]
        if len(with_classes) > 1:
            both = " and ".join(f"{name}/" for name in with_classes)
            raise UserError(f"{root} has both {both}; keep one")
        for name in names:
            if name not in with_classes:
                _refuse_loose_files(root, name, notes)
        if with_classes:
            folders[part] = _innermost(root / with_classes[0], part)
    for name in spelled.get("", ()):
        notes.append(f"{root}: {name}/ is not used; {_NAMES} are")
    skipped += _loose(root, root)
    return folders


def _holds_classes(folder: Path) -> bool:
    """Returns whether a folder holds others and no photos, as a part of a data set does."""
    inside = folder.resolve()
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not photos.is_hidden(entry.name)]
    files = (entry for entry in visible if not entry.is_dir())
    return bool(_names(folder)) and all(photos.why_not_read(file, inside) for file in files)


def _refuse_unnamed_parts(
    root: Path, tops: Sequence[str], spelled: Mapping[str, Sequence[str]]
) -> None:
    """Refuses folders that look like parts of a data set and would become its classes.

    Raises:
        UserError: there are such folders.
    """
    if "train" in spelled and len(spelled) == len(tops) > 1 and "" not in spelled:
        listed = " and ".join(f"{name}/" for name in tops)
        raise UserError(
            f"{root}: {listed} hold no class folders; sort their photos into folders, one a class, "
            "or list the labels in a file: --data.dir=FILE.csv"
        )
    inside = {name: set(map(normal, _names(root / name))) for name in tops}
    several = [name for name in tops if len(inside[name]) > 1]
    for i, a in enumerate(several):
        for b in several[i + 1 :]:
            same = sorted(inside[a] & inside[b])
            if len(same) > 1:  # One could be a folder such as images/ in each class.
                raise UserError(
                    f"{root}: {a}/ and {b}/ hold the same folders ({', '.join(same[:3])}); if they "
                    f"are parts, rename them to {_NAMES}; if they are classes, name all classes "
                    f"with --data.classes={a},{b}"
                )


def _refuse_loose_files(root: Path, name: str, notes: list[str]) -> None:
    """Refuses a part without class folders that holds files; one that is empty gets a note.

    Raises:
        UserError: it holds files.
    """
    files = [entry.name for entry in os.scandir(root / name) if not photos.is_hidden(entry.name)]
    if files:
        raise UserError(
            f"{root}: {name}/ holds {len(files)} files and no class folder; photos without labels "
            "can't be evaluated: sort them into class folders, or move them elsewhere and use "
            "--mode=predict"
        )
    notes.append(f"{root}: {name}/ is empty")


def _innermost(folder: Path, part: str) -> Path:
    """Returns the folder of classes in what an archive may have nested: seg_train/seg_train."""
    while len(names := _names(folder)) == 1 and part_of(names[0]) == part:
        folder = folder / names[0]
    return folder


def _names(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones and links."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not photos.is_hidden(entry.name)
        )


def _class_files(
    folder: Path, root: Path, chosen: Sequence[str], skipped: list[str]
) -> dict[str, list[str]]:
    """Returns the image files of each wanted class below `folder`, by path relative to `root`.

    What is ignored is added to `skipped`.
    """
    classes: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        name = normal(path.name)
        if chosen and name not in chosen:
            continue
        if path.is_symlink() and path.is_dir() and not photos.is_hidden(path.name):
            skipped.append(f"{path.relative_to(root)}: a link to a folder is not followed")
        elif path.is_dir() and not path.name.startswith("."):
            if photos.is_hidden(path.name):
                skipped.append(f"{path.relative_to(root)}: a folder of the system, without photos")
                continue
            files, unread = photos.image_files(path, root)
            # Two folders whose names differ only in their Unicode form are one class.
            classes.setdefault(name, []).extend(files)
            skipped += unread
    skipped += _loose(folder, root)
    return classes


def _loose(folder: Path, root: Path) -> list[str]:
    """Returns "path: reason" for the files beside class folders."""
    with os.scandir(folder) as entries:
        return [
            f"{os.path.relpath(entry.path, root)}: beside the class folders"
            for entry in entries
            if not photos.is_hidden(entry.name) and not entry.is_dir()
        ]


def _pass_over_empty(
    found: Mapping[str, dict[str, list[str]]],
    chosen: Sequence[str],
    root: Path,
    folders: Mapping[str, Path],
    skipped: list[str],
) -> None:
    """Removes classes without image files from `found`, and adds them to `skipped`.

    Raises:
        UserError: such a class of the training part was chosen, or holds files that are meant to be
            photos.
    """
    for part, classes in found.items():
        for name in [name for name, files in classes.items() if not files]:
            start = f"{os.path.relpath(folders[part] / name, root)}"
            unread = [line for line in skipped if normal(line).startswith(f"{start}/")]
            meant = [line for line in unread if not line.endswith(photos.UNKNOWN)]
            if part == "train" and (chosen or meant):
                why = f": {(meant or unread)[0]}" if unread else ", and no file at all"
                raise UserError(f"{root}: class {name} of {part} has no readable image{why}")
            del classes[name]
            skipped.append(f"{start}: a folder without photos")


def _too_few(root: Path, folder: Path, least: int, skipped: Sequence[str]) -> str:
    """Returns the message for a folder with too few classes, and where they may be."""
    several = "two subfolders of images or more, one a class"
    message = f"{folder} needs {several if least > 1 else 'subfolders of images'}"
    names = _names(folder)
    if folder == root and len(names) == 1 and len(_names(root / names[0])) > 1:
        return f"{message}; did you mean --data.dir={root / names[0]}?"
    if files := sorted(root.glob("*.csv")):
        return f"{message}; did you mean the labels in --data.dir={files[0]}?"
    return f"{message}; {photos.skipped_line(skipped)}" if skipped else message
