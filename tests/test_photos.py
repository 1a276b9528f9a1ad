"""Image files of every mode and in every state of repair."""

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, write_photos
from PIL import Image, ImageOps

from cnn_jax.config import DataConfig
from cnn_jax.data import photos
from cnn_jax.errors import UserError


def saved(tmp_path: Path, image: Image.Image, name: str, **values: Any) -> Path:
    path = tmp_path / name
    image.save(path, **values)
    return path


def test_load_image_keeps_pixels_of_the_right_size(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    image = photos.load_image(saved(tmp_path, Image.fromarray(pixels), "a.png"), photos.Layout(8))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


def test_load_image_cuts_the_centre(tmp_path: Path) -> None:
    pixels = noise(8, 16, 3)
    wide = photos.load_image(saved(tmp_path, Image.fromarray(pixels), "wide.png"), photos.Layout(8))
    np.testing.assert_array_equal(wide, pixels[:, 4:12])
    tall = pixels.transpose(1, 0, 2).copy()
    image = photos.load_image(saved(tmp_path, Image.fromarray(tall), "tall.png"), photos.Layout(8))
    np.testing.assert_array_equal(image, tall[4:12])


def test_load_image_applies_exif_rotation(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90 degrees clockwise to see upright.
    path = saved(tmp_path, Image.fromarray(pixels), "turned.png", exif=exif)
    np.testing.assert_array_equal(photos.load_image(path, photos.Layout(8)), np.rot90(pixels, k=-1))


def test_load_image_modes(tmp_path: Path) -> None:
    red = Image.new("RGB", (9, 9), (255, 0, 0))
    half = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    gray = Image.fromarray(np.full((9, 9), 0x8000, np.uint16))
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    clear = palette.copy()
    frames = [red, Image.new("RGB", (9, 9), (0, 255, 0))]
    cases = {
        "rgb.png": (saved(tmp_path, red, "rgb.png"), (255, 0, 0)),
        "cmyk.tif": (saved(tmp_path, red.convert("CMYK"), "cmyk.tif"), (255, 0, 0)),
        "transparent.png": (saved(tmp_path, half, "transparent.png"), (255, 255, 255)),
        "16-bit.png": (saved(tmp_path, gray, "16-bit.png"), (127, 127, 127)),
        "gray.png": (saved(tmp_path, Image.new("L", (9, 9), 7), "gray.png"), (7, 7, 7)),
        "bits.png": (saved(tmp_path, Image.new("1", (9, 9), 1), "bits.png"), (255, 255, 255)),
        "palette.png": (saved(tmp_path, palette, "palette.png"), (0, 0, 255)),
        "clear.gif": (saved(tmp_path, clear, "clear.gif", transparency=1), (255, 255, 255)),
        "moving.gif": (
            saved(tmp_path, red, "moving.gif", save_all=True, append_images=frames[1:]),
            (255, 0, 0),
        ),
        "dot.png": (saved(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7)), "dot.png"), (9, 8, 7)),
        "strip.png": (
            saved(tmp_path, Image.new("RGB", (900, 1), (9, 8, 7)), "strip.png"),
            (9, 8, 7),
        ),
    }
    for name, (path, colour) in cases.items():
        image = photos.load_image(path, photos.Layout(8))
        assert image.shape == (8, 8, 3), name
        assert (image == colour).all(), (name, image[4, 4])
    jpeg = photos.load_image(saved(tmp_path, red.convert("CMYK"), "cmyk.jpg"), photos.Layout(8))
    np.testing.assert_allclose(jpeg[4, 4], (255, 0, 0), atol=3)


def test_load_image_decodes_large_jpegs_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 1600)[None, :, None], (1600, 1600, 3))
    path = saved(tmp_path, Image.fromarray(ramp.astype(np.uint8)), "large.jpg")
    sizes = []
    convert = Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda self, mode: sizes.append(self.size) or convert(self, mode)
    )
    image = photos.load_image(path, photos.Layout(32))
    assert sizes[0] == (200, 200)
    np.testing.assert_allclose(image[16, :, 0], (np.arange(32) + 0.5) * 255 / 32, atol=2)


def test_load_image_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            photos.load_image(path, photos.Layout(8))
        return str(caught.value).replace(str(tmp_path), "TMP")

    assert message(tmp_path / "none.png").startswith("TMP/none.png can't be read as an image: ")
    (tmp_path / "text.png").write_text("words")
    assert message(tmp_path / "text.png") == (
        "TMP/text.png can't be read as an image: not an image of a known format"
    )
    path = saved(tmp_path, Image.fromarray(noise(50, 50, 3)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert "decompression bomb" in message(path)


def test_list_images(tmp_path: Path, warned: list[str]) -> None:
    write_photos(tmp_path / "photos", {"b": 2, "a": 1})
    (tmp_path / "photos" / "top.JPG").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_bytes(b"")
    found = photos.list_images(tmp_path / "photos")
    relative = [str(path.relative_to(tmp_path / "photos")) for path in found]
    assert relative == ["a/000.png", "b/000.png", "b/001.png", "top.JPG"]
    assert photos.list_images(found[0]) == [found[0]]
    (tmp_path / "photos" / "a" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert photos.list_images(tmp_path / "photos") == found
    unknown = "notes.txt: not an image of a known format"
    assert warned == [
        f"{tmp_path}/photos: 1 file skipped, the first: {unknown}",
        f"{tmp_path}/photos: 2 files skipped, the first: a/link.png: not a file; {unknown}",
    ]
    with pytest.raises(UserError, match=r"none is neither a file nor a folder$"):
        photos.list_images(tmp_path / "none")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void holds no image files such as \.jpg or \.png$"):
        photos.list_images(tmp_path / "void")


def soft(width: int, height: int) -> Image.Image:
    """Returns colours that change slowly, as JPEG keeps them."""
    return Image.fromarray(noise(5, 7, 3)).resize((width, height), Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, side: int) -> np.ndarray:
    """Returns what torchvision's Resize(side, BICUBIC) and CenterCrop(side) make of an image."""
    width, height = image.size
    long = int(side * max(width, height) / min(width, height))
    size = (side, long) if width <= height else (long, side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((whole - side) / 2.0) for whole in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(131, 88), (88, 131), (90, 90), (20, 33)])
def test_bicubic_crops_are_those_of_torchvision(
    tmp_path: Path, size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, soft(*size), "photo.png", exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
    ours = photos.load_image(path, photos.Layout(32, "crop", "bicubic")).astype(int)
    # Scaling before turning rounds intermediate values in the other direction.
    assert np.abs(ours - resize_and_crop(upright, 32)).max() <= 1


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_jpegs_decoded_small_differ_little(tmp_path: Path, fit: Any, factor: int) -> None:
    """A photo that fills no whole number of blocks, of 2, 4 or 8 times the size that is needed."""
    path = saved(tmp_path, soft(64 * factor + 45, 64 * factor + 3), "photo.jpg", quality=95)
    layout = photos.Layout(32, fit, "bicubic")
    with Image.open(path) as opened:
        whole = saved(tmp_path, opened.convert("RGB"), "photo.png")
    difference = np.abs(
        photos.load_image(path, layout) - photos.load_image(whole, layout).astype(int)
    )
    assert difference.mean() < 0.5
    assert difference.max() <= 4


def test_pad_and_stretch_show_all_of_a_photo(tmp_path: Path) -> None:
    pixels = np.zeros((12, 24, 3), np.uint8)
    pixels[:, :12], pixels[:, 12:] = (255, 0, 0), (0, 0, 255)
    path = saved(tmp_path, Image.fromarray(pixels), "halves.png")
    padded = photos.load_image(path, photos.Layout(8, "pad"))
    assert (padded[:2] == 128).all()
    assert (padded[6:] == 128).all()
    assert (padded[2:6, 0] == (255, 0, 0)).all()
    assert (padded[2:6, 7] == (0, 0, 255)).all()
    stretched = photos.load_image(path, photos.Layout(8, "stretch"))
    assert (stretched[:, 0] == (255, 0, 0)).all()
    assert (stretched[:, 7] == (0, 0, 255)).all()
    tall = saved(tmp_path, Image.fromarray(pixels.transpose(1, 0, 2).copy()), "tall.png")
    np.testing.assert_array_equal(
        photos.load_image(tall, photos.Layout(8, "pad")), padded.transpose(1, 0, 2)
    )


def test_pad_keeps_photos_of_every_shape(tmp_path: Path) -> None:
    for size in ((1, 900), (900, 1), (7, 5), (1, 1)):
        path = saved(tmp_path, Image.new("RGB", size, (9, 8, 7)), "strip.png")
        image = photos.load_image(path, photos.Layout(16, "pad"))
        assert (image == (9, 8, 7)).all(-1).sum() == 16 * max(16 * min(size) // max(size), 1), size


def test_the_layout_of_a_config() -> None:
    config = DataConfig(image_size=224, crop=0.875, fit="pad", interpolation="bicubic")
    assert photos.Layout.of(config) == photos.Layout(256, "pad", "bicubic")
    assert photos.Layout.of(DataConfig()) == photos.Layout(32, "crop", "bilinear")


def test_layouts_and_readers_reach_other_processes(tmp_path: Path) -> None:
    path = saved(tmp_path, soft(40, 30), "a.png")
    layout = photos.Layout(8, "pad", "bicubic")
    reader, again = pickle.loads(pickle.dumps((photos.load_image, layout)))
    np.testing.assert_array_equal(reader(path, again), photos.load_image(path, layout))


def exif_with_a_faulty_tag(orientation: int) -> bytes:
    """Returns EXIF with an orientation, and a resolution (0x011A, two numbers) that is a text."""
    entries = ((0x0112, 3, 1, orientation), (0x011A, 2, 4, int.from_bytes(b"72.\0", "little")))
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + ifd + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_with_a_faulty_tag(6), True),
        (exif_with_a_faulty_tag(9), False),
        (exif_with_a_faulty_tag(6)[:20], False),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
        (b"Exif\0\0nonsense", False),
    ],
)
def test_faulty_exif_does_not_cost_the_photo(tmp_path: Path, exif: bytes, turned: bool) -> None:
    image = soft(8, 8)
    plain = photos.load_image(saved(tmp_path, image, "plain.jpg", quality=95), photos.Layout(8))
    path = saved(tmp_path, image, "faulty.jpg", quality=95, exif=exif)
    found = photos.load_image(path, photos.Layout(8))
    np.testing.assert_array_equal(found, np.rot90(plain, k=-1) if turned else plain)


@pytest.mark.parametrize("after", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        (b"pHYs", b""),
    ],
)
def test_faulty_side_data_of_a_png_does_not_cost_the_photo(
    tmp_path: Path, kind: bytes, content: bytes, after: bytes
) -> None:
    path = saved(tmp_path, soft(8, 8), "photo.png")
    expected, png = photos.load_image(path, photos.Layout(8)), path.read_bytes()
    start = png.index(after) - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    crc = struct.pack(">I", zlib.crc32(kind + content))
    chunk = struct.pack(">I", len(content)) + kind + content + crc
    path.write_bytes(png[:end] + chunk + png[end:])
    np.testing.assert_array_equal(photos.load_image(path, photos.Layout(8)), expected)


def test_a_photo_of_which_little_is_decoded_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = soft(800, 600)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # 480,000 are decoded as 7,500.
    path = saved(tmp_path, photo, "large.jpg")
    assert photos.load_image(path, photos.Layout(8)).std() > 0
    with pytest.raises(UserError, match=r"480,000 pixels are more than a photo has"):
        photos.load_image(path, photos.Layout(150))
    # libjpeg holds all of a progressive JPEG.
    path = saved(tmp_path, photo, "progressive.jpg", progressive=True)
    with pytest.raises(UserError, match="decompression bomb"):
        photos.load_image(path, photos.Layout(8))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_gray_of_any_depth_uses_all_of_its_range(tmp_path: Path, bits: int, suffix: str) -> None:
    most = 2**bits - 1
    ramp = np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)
    path = saved(tmp_path, Image.fromarray(ramp), f"deep.{suffix}")
    image = photos.load_image(path, photos.Layout(8))
    np.testing.assert_allclose(image[..., 0], np.linspace(0, 255, 64).reshape(8, 8), atol=1.3)


def deep_colours(path: Path, most: int) -> Path:
    """Writes a PNG with 16 bits a channel, 8x8, with values from 0 to `most`."""
    rows = np.linspace(0, most, 8 * 8 * 3).reshape(8, 24).astype(">u2")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    path.write_bytes(content)
    return path


def test_deep_colours_that_would_be_black_are_named(tmp_path: Path) -> None:
    image = photos.load_image(deep_colours(tmp_path / "a.png", 2**16 - 1), photos.Layout(8))
    np.testing.assert_allclose(image.ravel(), np.linspace(0, 255, 192), atol=1.1)
    with pytest.raises(UserError, match=r"its 16-bit colours use 12 bits or fewer; save it with 8"):
        photos.load_image(deep_colours(tmp_path / "b.png", 2**12 - 1), photos.Layout(8))


def test_read_images_gives_the_reasons_of_broken_ones(tmp_path: Path) -> None:
    good = saved(tmp_path, soft(9, 9), "good.png")
    (tmp_path / "text.png").write_text("words")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:100])
    (tmp_path / "new.jxl").write_bytes(b"\xff\x0a...")
    names = ("text.png", "good.png", "none.png", "cut.png", "new.jxl")
    done = []
    images, reasons = photos.read_images(
        [tmp_path / name for name in names], photos.Layout(8), lambda: done.append(1)
    )
    np.testing.assert_array_equal(images[1], photos.load_image(good, photos.Layout(8)))
    assert len(done) == 5
    assert reasons[0] == "not an image of a known format"
    assert reasons[1] == ""
    assert reasons[2] == "No such file or directory"
    assert reasons[3]
    assert reasons[4].startswith("JPEG XL can't be read; convert it to JPEG or PNG")


def test_photos_that_must_be_converted_are_listed(tmp_path: Path, warned: list[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a: b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    saved(tmp_path, soft(9, 9), "b.png")
    (tmp_path / "c.txt").write_text("words")
    found = photos.list_images(tmp_path)
    assert found == [tmp_path / "b.png", tmp_path / "deep" / "a: b.heic"]
    assert warned == [
        f"{tmp_path}: 1 file skipped, the first: c.txt: not an image of a known format"
    ]
    reasons = photos.read_images(found, photos.Layout(8))[1]
    assert reasons[0] == ""
    assert reasons[1].startswith("HEIC (an iPhone's format) can't be read; convert it to JPEG")


def test_photos_with_further_pictures_inside(tmp_path: Path) -> None:
    """As phones save them, with a depth map for example; also with a faulty list of them."""
    first, other = soft(40, 30), soft(10, 10)
    path = saved(tmp_path, first, "two.jpg", format="MPO", save_all=True, append_images=[other])
    plain = saved(tmp_path, first, "one.jpg", format="JPEG")
    expected = photos.load_image(plain, photos.Layout(16))
    np.testing.assert_array_equal(photos.load_image(path, photos.Layout(16)), expected)
    path.write_bytes(path.read_bytes().replace(b"MPF\0", b"MPF\0\xff\xff\xff\xff", 1))
    np.testing.assert_array_equal(photos.load_image(path, photos.Layout(16)), expected)


def test_a_photo_is_told_by_its_content(tmp_path: Path) -> None:
    image = soft(9, 9)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"):
        image.save(tmp_path / kind, kind)
    (tmp_path / "BMW").write_text("BMW and other words")
    (tmp_path / "empty").write_bytes(b"")
    found = photos.list_images(tmp_path)
    assert [path.name for path in found] == sorted(
        ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"]
    )
    for path in found:
        assert photos.load_image(path, photos.Layout(8)).shape == (8, 8, 3)
