"""From a folder of all kinds of photos to a fine-tuned classifier, as a user types it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import SMALL, command, refuse
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained run, and photos: sizes, palettes, EXIF rotations, broken files."""
    folder = tmp_path_factory.mktemp("user")
    assert command(*SMALL, "--workdir=pretrained", cwd=folder).returncode == 0
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            height, width = rng.integers(12, 70, 2)
            pixels = np.clip(rng.normal(colour, 40, (height, width, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels)
            path = folder / "photos" / name / f"{i}.jpg"
            if i % 4 == 1:
                image.quantize(32).save(path.with_suffix(".png"))
            elif i % 4 == 2:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.save(path, exif=exif)
            else:
                image.save(path)
        (folder / "photos" / name / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    return folder


# The pretrained network has 16 features of gray digits, so the head needs many epochs.
RUN = (
    "--config=finetune_head",
    "--data.name=folder",
    "--data.dir=photos",
    "--init.checkpoint=pretrained",
    "--train.epochs=100",
    "--optim.learning_rate=0.1",
)


@pytest.mark.slow
def test_own_photos_in_one_command(cwd: Path):
    result = command(*RUN, "--workdir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "folder photos: 52 train, 8 test images, 3 classes" in out
    assert "from pretrained" in out
    assert "3 files skipped" in result.stderr
    accuracy = re.search(r"^test accuracy ([\d.]+)%", out, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 75
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in out.splitlines()]
    headings = {"class", "images", "recall", "precision", "most confused with"}
    assert any(headings <= {*row} for row in rows)
    assert sum(int(row[2]) for row in rows if row[1:2] and row[1] in COLOURS) == 8
    again = command("--mode=evaluate", "--workdir=run", cwd=cwd)
    assert f"test accuracy {accuracy[1]}%" in again.stdout
    predicted = command("--mode=predict", "--workdir=run", "photos/blue/0.jpg", cwd=cwd)
    assert re.fullmatch(r"photos/blue/0.jpg: (blue|green|red) \(\d+\.\d%\)\n", predicted.stdout)


@pytest.mark.slow
def test_the_worst_mistakes_are_listed_by_file(cwd: Path):
    """A green photo lies among the red ones of the test part."""
    folder = cwd / "swapped"
    for name in COLOURS:
        for part in ("train", "test"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        for path in (cwd / "photos" / name).iterdir():
            part = "test" if path.stem in ("0", "1", "2") else "train"
            (folder / part / name / path.name).write_bytes(path.read_bytes())
    (folder / "test/red/0.jpg").write_bytes((cwd / "photos/green/0.jpg").read_bytes())
    run = [argument.replace("photos", "swapped") for argument in RUN]
    result = command(*run, "--workdir=swapped_run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    heading = "worst mistakes, lowest probability of the true class first:\n"
    listed = result.stdout.split(heading)[1].splitlines()
    assert re.fullmatch(r"  test/red/0.jpg: red, predicted green \(\d+\.\d%\)", listed[0])


@pytest.mark.slow
def test_a_finished_run_is_refused_for_changed_photos(cwd: Path):
    shutil.copytree(cwd / "photos", cwd / "album")
    run = [argument.replace("photos", "album") for argument in RUN]
    run += ["--train.epochs=1", "--workdir=album_run"]
    assert command(*run, cwd=cwd).returncode == 0
    assert "album_run is finished" in command(*run, cwd=cwd).stdout
    (cwd / "album/red/0.jpg").rename(cwd / "album/green/new.jpg")
    refused = command(*run, cwd=cwd)
    assert refused.returncode == 2
    assert "the photos in album have changed since" in refused.stderr
    shutil.rmtree(cwd / "album")
    assert "album_run is finished" in command(*run, cwd=cwd).stdout


def test_a_folder_without_a_name_or_a_checkpoint_says_what_to_set(cwd: Path):
    assert "data.dir=PHOTOS" in refuse("--config=finetune_head", *RUN[3:4], cwd=cwd)
    assert "runs/vgg3" in refuse(*RUN[:3], cwd=cwd)


@pytest.mark.slow
def test_labels_from_a_file_and_a_test_part_that_lacks_a_class(cwd: Path):
    lines = ["path,label,split"]
    for name in COLOURS:
        for path in sorted((cwd / "photos" / name).iterdir()):
            tested = path.stem in ("0", "1", "2") and name != "blue"
            part = "Testing" if tested else "Training"
            lines.append(f"photos/{name}/{path.name},colour {name},{part}")
    (cwd / "labels.csv").write_text("\n".join(lines))
    run = [argument.replace("--data.dir=photos", "--data.dir=labels.csv") for argument in RUN]
    result = command(*run, "--train.epochs=3", "--workdir=labels_run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "labels labels.csv: 54 train, 6 test images, 3 classes" in result.stdout
    assert "labels.csv: test has no photos of colour blue" in result.stderr
    assert "labels labels.csv: 3 files skipped, the first: photos/blue/broken.jpg" in result.stderr
    again = command("--mode=evaluate", "--workdir=labels_run", cwd=cwd)
    assert again.returncode == 0, again.stderr
    report = (cwd / "labels_run" / "report.html").read_text()
    assert "colour blue" in report
    (cwd / "labels.csv").write_text("\n".join([*lines, "photos/red/none.jpg,colour red,Training"]))
    refused = command(*run, "--train.epochs=3", "--workdir=other_run", cwd=cwd)
    assert refused.returncode == 2
    assert refused.stderr.endswith(
        "error: labels.csv: does not exist: photos/red/none.jpg (line 65)\n"
    )
