"""People's own image files: any size, colour mode and state of repair, one at a time."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError

from cnn_jax.errors import UserError, one_line, printable

# HEIC is not in _FORMATS: such photos are named as unreadable, where others are no images at all.
_SUFFIXES = re.compile(r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|ppm|pgm|avif|hei[cf])", re.IGNORECASE)
# A closed list, as Pillow would hand a disguised PostScript file to an external interpreter.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")


def load_image(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Returns an image file as uint8 [size, size, 3] in RGB.

    The EXIF rotation is applied; the largest centred square is cut out and scaled to `size`
    (the short side fits, the ends of the long side are lost). Palettes, CMYK and gray become
    RGB, transparent pixels white, 16-bit gray 8-bit; of an animation the first frame counts.

    Raises:
        UserError: the file is missing, damaged, no image, or too large to be one (a bomb).
    """
    try:
        with _pillow_warnings():
            return _read_image(Path(path), size)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        raise UserError(f"{os.fspath(path)} can't be read as an image: {_reason(error)}") from None


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Returns `path` if it is a file, else every image file below the folder, sorted.

    Raises:
        UserError: there is no such file or folder, or the folder holds no image file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    files, skipped = image_files(path, path)
    if skipped:
        logging.warning(
            "%s: %d files skipped, the first: %s", path, len(skipped), printable(skipped[0])
        )
    if not files:
        raise UserError(f"{path} holds no image files such as .jpg or .png")
    return files


def read_images(paths: Sequence[Path], size: int) -> tuple[np.ndarray, list[str]]:
    """Returns the images, uint8 [n, size, size, 3], and for each why it can't be read, or ""."""
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def read(index: int) -> str:
        try:
            images[index] = _read_image(paths[index], size)
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
            return _reason(error)
        return ""

    # Threads, as libjpeg runs without the interpreter's lock; few, as each holds a whole photo.
    with _pillow_warnings(), ThreadPoolExecutor(max_workers=4) as pool:
        return images, list(pool.map(read, range(len(paths))))


def image_files(folder: Path, root: Path) -> tuple[list[Path], list[str]]:
    """Returns the image files below `folder`, sorted, and "path: reason" of what is skipped."""
    inside = root.resolve()
    files, skipped = [], []

    def skip(path: str | Path, reason: str | None) -> None:
        skipped.append(f"{Path(path).relative_to(root)}: {reason}")

    walk = os.walk(folder, onerror=lambda error: skip(error.filename, error.strerror))
    for parent, folders, names in walk:
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                skip(path, "a link to a folder is not followed")
        for path in (Path(parent, name) for name in names):
            if path.name.startswith(".") or not _SUFFIXES.fullmatch(path.suffix):
                continue
            if not path.is_file():
                skip(path, "not a file")
            elif path.is_symlink() and not path.resolve().is_relative_to(inside):
                skip(path, "a link that leaves the folder")
            else:
                files.append(path)
    return sorted(files), sorted(skipped)


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Makes an error of Pillow's warning of decompression bombs, and silences the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _read_image(path: Path, size: int) -> np.ndarray:
    with Image.open(path, formats=_FORMATS) as opened:
        # Lets libjpeg decode a large photo at 1/2 to 1/8 of its size, ten times as fast.
        opened.draft(None, (2 * size, 2 * size))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
            image = Image.fromarray((gray * 255 // 65535).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("its pixels are floats of unknown range")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def _reason(error: BaseException) -> str:
    """Returns what went wrong in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return one_line(error)
