"""Which photos are found to be broken or copies of each other."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.data import noise
from PIL import Image, ImageEnhance

from cnn_jax.data import examine, photos


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Returns soft shapes with fine detail, as photos have."""
    soft = Image.fromarray(noise(4, 5, 3, seed=seed)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(noise(30, 40, 3, seed=seed + 1000)).resize(size)
    return Image.blend(soft, fine, 0.3)


@pytest.fixture
def found(tmp_path: Path):
    """Examines the files of the test's folder of photos."""
    (tmp_path / "photos").mkdir()

    def run() -> examine.Examination:
        root = tmp_path / "photos"
        files = sorted(path.name for path in root.iterdir())
        states = [(name, (root / name).stat().st_mtime_ns) for name in files]
        return examine.examine(root, files, states, tmp_path / "cache" / "found.json")

    return run


def test_a_picture_that_was_saved_again_is_a_copy(tmp_path: Path, found) -> None:
    root = tmp_path / "photos"
    for i in range(40):
        picture(i).save(root / f"other{i}.jpg")
    original = picture(99)
    original.save(root / "a.png")
    original.save(root / "b30.jpg", quality=30)
    original.resize((107, 80)).save(root / "c_third.webp")
    original.resize((1600, 1200)).save(root / "d_large.jpg")
    ImageEnhance.Brightness(original).enhance(1.1).save(root / "e_brighter.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    original.transpose(Image.Transpose.ROTATE_90).save(root / "f_turned.jpg", exif=exif)
    names = ("a.png", "b30.jpg", "d_large.jpg", "c_third.webp", "f_turned.jpg", "e_brighter.jpg")
    assert found().copies == (names,)
    assert found().unreadable == {}


def test_pictures_that_are_alike_are_no_copies(tmp_path: Path, found) -> None:
    """Equal colours with other detail, equal detail in other colours, and a mirror image."""
    root = tmp_path / "photos"
    ground = picture(0)
    ground.save(root / "ground.png")
    stripes = np.zeros((32, 1, 1), int)
    stripes[::2], stripes[1::2] = 12, -12
    small = np.asarray(ground.resize((32, 32))).astype(int).clip(12, 243)
    for name, pixels in (
        ("rows", small + stripes),
        ("columns", small + stripes.transpose(1, 0, 2)),
    ):
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{name}.png")
    light, blue, red = ground.convert("YCbCr").split()
    Image.merge("YCbCr", (light, red, blue)).convert("RGB").save(root / "colours.jpg")
    ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "mirrored.jpg")
    assert found().copies == ()


def test_flat_pictures_are_copies_only_if_their_files_are_equal(tmp_path: Path, found) -> None:
    root = tmp_path / "photos"
    for i, colour in enumerate(((200, 0, 0), (0, 200, 0), (200, 0, 1))):
        Image.new("RGB", (50, 50), colour).save(root / f"{i}.png")
    shutil.copy(root / "0.png", root / "same.png")
    assert found().copies == (("0.png", "same.png"),)


def test_broken_photos_and_links(tmp_path: Path, found) -> None:
    root = tmp_path / "photos"
    picture(0).save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "text.jpg").write_text("words")
    os.link(root / "text.jpg", root / "text2.jpg")
    os.link(root / "whole.jpg", root / "hard.jpg")
    result = found()
    assert list(result.unreadable) == ["cut.jpg", "text.jpg", "text2.jpg"]
    assert "truncated" in result.unreadable["cut.jpg"]
    assert result.unreadable["text2.jpg"] == "not an image of a known format"
    assert result.copies == (("hard.jpg", "whole.jpg"),)


def test_hard_links_are_read_once(tmp_path: Path, found, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "photos"
    picture(0).save(root / "a.jpg")
    for i in range(9):
        os.link(root / "a.jpg", root / f"a{i}.jpg")
    read, numbers = photos.read_images, []
    monkeypatch.setattr(
        photos, "read_images", lambda paths, *rest: numbers.append(len(paths)) or read(paths, *rest)
    )
    assert len(found().copies[0]) == 10
    assert numbers == [1]


def test_what_was_found_is_kept_until_a_file_changes(
    tmp_path: Path, found, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    picture(0).save(root / "a.jpg")
    shutil.copy(root / "a.jpg", root / "b.jpg")
    (root / "c.jpg").write_text("words")
    first = found()
    (kept,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(photos, "read_images", lambda *args: pytest.fail("read again"))
        assert found() == first
        os.utime(root / "a.jpg", (1, 1))
        with pytest.raises(pytest.fail.Exception):
            found()
    for damage in ("", "{", "[]", json.dumps({"fingerprint": 1})):
        kept.write_text(damage)
        assert found() == first


def test_near_copies_among_many_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many pairs are close, fewer are compared, and exact copies are found."""
    ground = np.asarray(picture(0).resize((32, 32)))
    images = np.stack([ground // 2 + noise(32, 32, 3, seed=i) // 80 for i in range(60)])
    images[7] = images[50]
    every_pair = examine.near_copies(images).tolist()
    monkeypatch.setattr(examine, "_MOST_PAIRS", 10)
    found = examine.near_copies(images).tolist()
    assert [7, 50] in found
    assert len(found) <= 10 < len(every_pair)
