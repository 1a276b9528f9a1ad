"""Reads image files of any size and colour mode, and names those that can't be read.

What a file is, its content says and not its name. A photo becomes a square as a `Layout` describes;
training, evaluation, prediction and export share it.
"""

import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from absl import logging
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from cnn_jax.config import DataConfig
from cnn_jax.errors import UserError, one_line, printable

# Pillow warns of odd metadata, which cost no pixel. This is no context manager, as these are not
# safe in threads before Python 3.14.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The formats are listed because Pillow would pass a disguised PostScript file to an interpreter.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
UNKNOWN = "not an image of a known format"
"""The reason why a file that is no photo is not read."""
_CONVERT = "can't be read; convert it to JPEG or PNG, as `magick mogrify -format jpg FILES` does"
_UNREADABLE = {
    "HEIC": f"HEIC (an iPhone's format) {_CONVERT}",
    "JXL": f"JPEG XL {_CONVERT}",
    "JP2": f"JPEG 2000 {_CONVERT}",
    "RAW": f"a camera's raw format {_CONVERT}",
}
"""Formats of photos that are recognised only to say what to do about them."""
_RAW = re.compile(r"\.(dng|cr[23w]|nef|nrw|arw|sr[2fw]|orf|rw2|pef|raf|3fr)", re.IGNORECASE)
# Most photos need not be opened to know that they are meant to be photos.
_SUFFIXES = re.compile(r"\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|ppm|pgm|avif)", re.IGNORECASE)
_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "BMP"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"P[1-6]\s"), "PPM"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JXL"),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "), "JP2"),
)
# What file managers, archives and disk stations leave beside photos; @eaDir holds thumbnails.
_NO_PHOTOS = {
    *("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    *("Thumbs.db", "desktop.ini"),
}

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GRAY = (128, 128, 128)
"""The borders of data.fit=pad."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a photo upright, by its EXIF orientation (tag 0x0112)."""


@dataclass(frozen=True)
class Layout:
    """How a photo becomes a square: all that its pixels depend on beside the file itself."""

    side: int
    """Side of the square in pixels."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """`crop`: its centre; `pad`: all of it between gray borders; `stretch`: all of it, with its
    sides scaled differently."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of(cls, config: DataConfig) -> "Layout":
        """Returns the layout in which photos are stored, of which a network may see the centre."""
        return cls(round(config.image_size / config.crop), config.fit, config.interpolation)


def load_image(path: str | os.PathLike[str], layout: Layout) -> np.ndarray:
    """Returns an image file as uint8 [side, side, 3] in RGB.

    The EXIF rotation is applied, then the photo is scaled as `layout` says: `crop` with bicubic
    interpolation gives the pixels of torchvision's Resize and CenterCrop, by which timm evaluates.
    Palettes, CMYK and gray are converted to RGB, and transparent pixels to white. Gray of 16 bits
    becomes 8: of the depths 8, 10, 12, 14 and 16, its range is the smallest that holds it. Of an
    animation, the first frame is read. Safe in threads, and can be sent to other processes.

    Raises:
        UserError: the file is missing, damaged, not an image, or larger than any photo (a
            decompression bomb).
    """
    try:
        return _read_image(Path(path), layout)
    except MemoryError:
        raise  # The file may be whole.
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        reason = _reason(error, path)
        raise UserError(f"{os.fspath(path)} can't be read as an image: {reason}") from None


def read_images(
    paths: Sequence[Path], layout: Layout, done: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, list[str]]:
    """Reads several files with threads, and says of broken ones why they can't be read.

    Args:
        paths: the files.
        layout: how photos become squares.
        done: called after each file, from several threads.

    Returns:
        Images, uint8 [n, side, side, 3], and the reason why each can't be read, or "". The pixels
        of a file that can't be read are undefined.
    """
    images = np.empty((len(paths), layout.side, layout.side, 3), np.uint8)

    def read(index: int) -> str:
        try:
            images[index] = _read_image(paths[index], layout)
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
            return _reason(error, paths[index])
        finally:
            done()
        return ""

    # Pillow decodes without the interpreter's lock. Each thread holds a whole photo in memory.
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        return images, list(pool.map(read, range(len(paths))))


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Returns `path` itself if it is a file, else every image file below the folder, sorted.

    Those of formats that can't be read are among them: reading them gives the reason. Whatever else
    lies in the folder is counted in a warning.

    Raises:
        UserError: there is no such file or folder, or the folder contains no image file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder")
    files, skipped = image_files(path, path)
    reasons = tuple(f": {reason}" for reason in _UNREADABLE.values())
    photos = [line for line in skipped if line.endswith(reasons)]
    if others := [line for line in skipped if line not in photos]:
        logging.warning("%s: %s", path, skipped_line(others))
    files += [line.removesuffix(next(filter(line.endswith, reasons))) for line in photos]
    if not files:
        raise UserError(f"{path} holds no image files such as .jpg or .png")
    return [path / file for file in sorted(files)]


def image_files(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Returns the image files below `folder`, sorted, and "path: reason" for what it skips.

    A file with the suffix of an image is one, and so is a file whose first bytes are those of an
    image. Hidden files and folders, whose names start with a dot, are ignored without a message.

    Args:
        folder: the folder to search, with its subfolders.
        root: `folder` or one of its parents. All paths are relative to it, and links that leave it
            are skipped.
    """
    files: list[str] = []
    skipped: list[str] = []
    inside = root.resolve()
    start = len(os.path.join(root, ""))  # Path.relative_to takes seconds for 100,000 files.

    def skip(path: str, reason: str) -> None:
        skipped.append(f"{path[start:]}: {reason}")

    folders = [str(folder)]
    while folders:
        parent = folders.pop()
        try:
            entries = list(os.scandir(parent))
        except OSError as error:
            skip(parent, error.strerror or one_line(error))
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif reason := why_not_read(entry, inside):
                skip(entry.path, reason)
            else:
                files.append(entry.path[start:])
    return sorted(files), sorted(skipped)


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is ignored without a message, by its name."""
    return name.startswith(".") or name in _NO_PHOTOS


def skipped_line(skipped: Sequence[str], kinds: int = 4) -> str:
    """Returns how many files were skipped, with the first one of each reason.

    Args:
        skipped: "path: reason" for each of them, one or more.
        kinds: the number of different reasons that are named.
    """
    first: dict[str, list[str]] = {}
    for line in skipped:
        kind = re.sub(r"\d+", "0", line.partition(": ")[2])  # Some count pixels or bytes.
        first.setdefault(kind, []).append(line)
    named = [
        printable(lines[0]) + (f" (and {len(lines) - 1} more like it)" if lines[1:] else "")
        for lines in [*first.values()][:kinds]
    ]
    files = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
    return f"{files} skipped, the first: {'; '.join(named)}"


def why_not_read(entry: os.DirEntry[str], inside: Path) -> str:
    """Returns why a folder's entry is no image file, or "" if it is one.

    Args:
        entry: the entry, which is not hidden.
        inside: the folder that links must not leave, without links in its own path.
    """
    try:
        if entry.is_symlink():
            if entry.is_dir():
                return "a link to a folder is not followed"
            if entry.is_file() and not Path(entry.path).resolve().is_relative_to(inside):
                return "a link that leaves the folder"
        if not entry.is_file():
            return "not a file"
        if _SUFFIXES.fullmatch(os.path.splitext(entry.name)[1]):
            return ""
        kind = _kind(entry.path)
    except OSError as error:
        return error.strerror or one_line(error)
    return _UNREADABLE.get(kind, "") if kind else UNKNOWN


def _kind(path: str | os.PathLike[str]) -> str:
    """Returns what kind of image a file is by its first bytes, or "".

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        head = file.read(16)
    kind = next((kind for magic, kind in _MAGIC if magic.match(head)), "")
    # Many raw formats are TIFF files with a thumbnail as the first image.
    return "RAW" if kind in ("TIFF", "") and _RAW.fullmatch(Path(path).suffix) else kind


def _read_image(path: Path, layout: Layout) -> np.ndarray:
    kind = _kind(path)
    try:
        image, extent, orientation = _decode(path, kind, layout)
    except Exception:
        if kind != "PNG":
            raise
        pixels = io.BytesIO(_without_side_data(path.read_bytes()))
        image, extent, orientation = _decode(pixels, kind, layout)
    size, box = _scaling(extent, layout, orientation)
    image = image.resize(size, _FILTERS[layout.interpolation], box)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if layout.fit == "pad":
        square = Image.new("RGB", (layout.side, layout.side), _GRAY)
        square.paste(image, ((layout.side - size[0]) // 2, (layout.side - size[1]) // 2))
        image = square
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image)


def _decode(
    file: Path | io.BytesIO, kind: str, layout: Layout
) -> tuple[Image.Image, tuple[float, float], int]:
    """Returns an image as RGB or RGBA, what `_shrink` returns, and its EXIF orientation."""
    with _open(file, kind) as opened:
        extent = _shrink(opened, layout)
        image = _eight_bits(opened)
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return image, extent, _orientation(opened)


def _open(file: Path | io.BytesIO, kind: str) -> Image.Image:
    if kind in _UNREADABLE:
        raise ValueError(_UNREADABLE[kind])
    if kind == "JPEG":
        # Image.open would judge a JPEG by its full size, and read its list of further pictures.
        return JpegImagePlugin.JpegImageFile(file)
    return Image.open(file, formats=_FORMATS)


def _without_side_data(png: bytes) -> bytes:
    """Returns a PNG file without texts, colour profiles and the like, which may be what is faulty.

    A chunk is four bytes each of length and kind, the content, and four bytes of checksum
    (https://www.w3.org/TR/png-3/#5Chunk-layout).
    """
    kept, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"):
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _shrink(image: Image.Image, layout: Layout) -> tuple[float, float]:
    """Lets libjpeg decode a large photo at 1/2 to 1/8 of its size, up to ten times faster.

    What it decodes is at least twice as large as the square in each direction that is kept.

    Returns:
        Width and height of the whole photo in the pixels that will be decoded. Their numbers are
        these, rounded up.

    Raises:
        ValueError: more pixels would be held in memory than Pillow's limit for images.
    """
    full, least = image.width * image.height, 2.0 * layout.side
    wanted = (int(least), int(least))
    if layout.fit == "pad":
        scale = least / max(image.size)
        wanted = (max(int(image.width * scale), 1), max(int(image.height * scale), 1))
    extent = (float(image.width), float(image.height))
    if drafted := image.draft(None, wanted):
        extent = drafted[1][2:]
    held = image.width * image.height
    if image.info.get("progressive"):
        # libjpeg holds the coefficients of all of it, two bytes for each of one to three channels.
        held = max(held, full // 2)
    if held > (Image.MAX_IMAGE_PIXELS or held):
        raise ValueError(f"{full:,} pixels are more than a photo has (a decompression bomb)")
    return extent


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8. Whatever else is wrong with the EXIF is ignored."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow parses EXIF as it goes; damaged tags raise almost anything.
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Decodes an image, and scales gray of up to 16 bits to 8.

    Raises:
        ValueError: its values have an unknown range.
    """
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    image.load()
    if image.mode.startswith("I"):
        gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        # Cameras and scanners of 12 bits, for example, store these in 16: scaled by 16, all of
        # such a picture would be black.
        most = next(m for bits in (8, 10, 12, 14, 16) if gray.max() <= (m := 2**bits - 1))
        return Image.fromarray((gray * 255 // most).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range")
    # Of 16-bit colours Pillow keeps the upper 8 bits.
    if deep and max(high for _, high in image.getextrema()[:3]) < 2**4:  # pyright: ignore
        raise ValueError("its 16-bit colours use 12 bits or fewer; save it with 8 bits a channel")
    return image


def _scaling(
    extent: tuple[float, float], layout: Layout, orientation: int
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Returns the size to scale a photo to, and the part of it that is scaled.

    Args:
        extent: width and height of the photo, before it is turned upright.
        layout: how it becomes a square.
        orientation: how it will be turned.
    """
    width, height = extent
    side, longest = layout.side, max(extent)
    if layout.fit == "stretch":
        return (side, side), (0.0, 0.0, width, height)
    if layout.fit == "pad":
        scaled = (max(round(x * side / longest), 1) for x in extent)
        return (next(scaled), next(scaled)), (0.0, 0.0, width, height)
    # torchvision scales the short side to `side` and the long one to a whole number of pixels, and
    # cuts the centre at whole pixels; this is the same rectangle before scaling.
    across = width > height
    scaled = int(side * longest / min(extent))
    start = round((scaled - side) / 2)
    if orientation in ((2, 3, 7, 8) if across else (3, 4, 6, 7)):
        start = scaled - side - start  # The photo's end becomes its start.
    low, high = (x * longest / scaled for x in (start, start + side))
    return (side, side), (low, 0.0, high, height) if across else (0.0, low, width, high)


def _reason(error: BaseException, path: str | os.PathLike[str]) -> str:
    if isinstance(error, UnidentifiedImageError):
        return UNKNOWN
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error).replace(os.fspath(path), Path(path).name)
