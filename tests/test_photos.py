"""Image files of every mode and in every state of repair."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import noise, write_photos
from PIL import Image

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
        f"{tmp_path}/photos: 1 files skipped, the first: {unknown}",
        f"{tmp_path}/photos: 2 files skipped, the first: a/link.png: not a file; {unknown}",
    ]
    with pytest.raises(UserError, match=r"none is neither a file nor a folder$"):
        photos.list_images(tmp_path / "none")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void holds no image files such as \.jpg or \.png$"):
        photos.list_images(tmp_path / "void")
