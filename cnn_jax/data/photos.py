"""Reads image files of any size and colour mode, and names those that can't be read."""

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

# HEIC can't be decoded, but such files are photos: they are listed, and reported as unreadable.
_SUFFIXES = re.compile(r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|ppm|pgm|avif|hei[cf])", re.IGNORECASE)
# The formats are listed because Pillow would pass a disguised PostScript file to an interpreter.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")


def load_image(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Returns an image file as uint8 [size, size, 3] in RGB.

    The EXIF rotation is applied, then the largest centred square is cropped and scaled to `size`.
    Palettes, CMYK and gray are converted to RGB, 16-bit gray to 8 bits, and transparent pixels to
    white. Of an animation, the first frame is read.

    Raises:
        UserError: the file is missing, damaged, not an image, or larger than any photo (a
            decompression bomb).
    """
    try:
        with _pillow_warnings():
            return _read_image(Path(path), size)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        raise UserError(f"{os.fspath(path)} can't be read as an image: {_reason(error)}") from None


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Returns `path` itself if it is a file, else every image file below the folder, sorted.

    Raises:
        UserError: there is no such file or folder, or the folder contains no image file.
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
    """Returns images, uint8 [n, size, size, 3], and the reason why each can't be read, or ""."""
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def read(index: int) -> str:
        try:
            images[index] = _read_image(paths[index], size)
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
            return _reason(error)
        return ""

    # Pillow decodes without the interpreter's lock. Each thread holds a whole photo in memory.
    with _pillow_warnings(), ThreadPoolExecutor(max_workers=4) as pool:
        return images, list(pool.map(read, range(len(paths))))


def image_files(folder: Path, root: Path) -> tuple[list[Path], list[str]]:
    """Returns the image files below `folder`, sorted, and "path: reason" for what it skips.

    Args:
        folder: the folder to search, with its subfolders.
        root: `folder` or one of its parents. The paths in the reasons are relative to it, and
            links that leave it are skipped.
    """
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
    """Turns Pillow's warning of decompression bombs into an error, and silences its others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _read_image(path: Path, size: int) -> np.ndarray:
    with Image.open(path, formats=_FORMATS) as opened:
        # libjpeg then decodes a large photo at 1/2 to 1/8 of its size, up to ten times faster.
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
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return one_line(error)
