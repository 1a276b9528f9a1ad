"""--mode=predict: what it says of photos, of broken ones, and of more than fit in memory."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import SMALL, command, finish, refuse
from helpers.data import noise
from helpers.predictors import random_predictor
from helpers.training import edit
from PIL import Image

from cnn_jax import saliency
from cnn_jax.config import Config
from cnn_jax.data import photos
from cnn_jax.errors import UserError
from cnn_jax.predictor import Predictor
from cnn_jax.tools import predict

RUN = ("--mode=predict", "--workdir=run")


def write(folder: Path, *names: str) -> None:
    """Writes photos of random pixels, each of its own."""
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray(noise(40, 30, 3, seed=seed)).save(folder / name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, three photos, of which one is broken, and one that is gone."""
    folder = tmp_path_factory.mktemp("trained")
    finish(*SMALL, "--data.validation=0.2", "--workdir=run", cwd=folder)
    write(folder / "photos", "a.png", "b.jpg")
    (folder / "photos/broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_one_line_a_photo(trained: Path):
    line = r"photos/a.png: \d \(\d+\.\d%\)\n"
    ended = finish(*RUN, "photos/a.png", cwd=trained)
    assert re.fullmatch(line, ended.stdout)
    assert ended.stderr == ""
    more = finish(*RUN, "--top_k=3", "photos/a.png", cwd=trained).stdout
    assert more.startswith(ended.stdout.rstrip())
    shares = [float(share) for share in re.findall(r"\((\d+\.\d)%\)", more)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert "needs image files" in refuse(*RUN, cwd=trained)


def test_a_broken_file_costs_only_itself(trained: Path):
    """Whether it was named or lies in a folder; the exit code says that something is missing."""
    named = ("photos/broken.jpg", "gone.png", "photos/a.png", "photos/b.jpg")
    for paths in (named, ("gone.png", "photos")):
        ended = command(*RUN, *paths, cwd=trained)
        assert ended.returncode == 1
        assert re.findall(r"^photos/([ab])\.\w+: \d", ended.stdout, re.MULTILINE) == ["a", "b"]
        assert ended.stderr.count("\n") == 2
        assert "skipped: gone.png: is neither a file nor a folder\n" in ended.stderr
        assert "skipped: photos/broken.jpg: not an image of a known format\n" in ended.stderr
    answers = json.loads(command(*RUN, "--json", *named, cwd=trained).stdout)
    assert [answer["file"] for answer in answers] == list(named)
    assert answers[0] == {"file": named[0], "error": "not an image of a known format"}
    assert set(answers[2]) == {"file", "class", "probability"}
    assert answers[2]["class"] in "0123456789"
    assert 0.1 <= answers[2]["probability"] <= 1


def test_nothing_that_can_be_read_is_an_error(trained: Path):
    line = refuse(*RUN, "photos/broken.jpg", cwd=trained)
    assert line == "no image can be read: photos/broken.jpg: not an image of a known format"
    assert "gone.png: is neither" in refuse(*RUN, "gone.png", cwd=trained)


def test_answers_are_written_to_a_file(trained: Path):
    flags = ("--top_k=2", "--min_probability=1", "photos")
    for name in ("out.csv", "out.jsonl"):
        ended = command(*RUN, *flags, f"--output={name}", cwd=trained)
        assert ended.returncode == 1
        line = f"{name}: 2 images are classified, 2 of them uncertain; 1 can't be read\n"
        assert (ended.stdout, ended.stderr) == (line, "")
    with (trained / "out.csv").open(newline="") as file:
        a, b, broken = csv.DictReader(file)
    answers = [json.loads(line) for line in (trained / "out.jsonl").read_text().splitlines()]
    for row, answer in zip((a, b), answers, strict=False):
        (first, second) = answer["top"]
        assert answer["uncertain"] is True
        assert row == {
            "file": answer["file"],
            "class": first["class"],
            "probability": f"{first['probability']:.4f}",
            "class_2": second["class"],
            "probability_2": f"{second['probability']:.4f}",
            "uncertain": "true",
            "error": "",
        }
    assert broken["error"] == answers[2]["error"] == "not an image of a known format"
    assert broken["class"] == ""


def test_what_can_not_be_written_is_refused_before_anything_is_read(trained: Path):
    for name, why in (("x.txt", "must end in .csv or .jsonl"), ("no/x.csv", "no folder no")):
        assert why in refuse(*RUN, f"--output={name}", "gone.png", cwd=trained)
    for flag in ("--top_k=0", "--min_probability=2"):
        assert flag.split("=")[0] in refuse(*RUN, flag, "photos", cwd=trained)


def test_uncertain_photos_are_marked(trained: Path):
    sure = finish(*RUN, "photos/a.png", "--min_probability=0.01", cwd=trained).stdout
    unsure = finish(*RUN, "photos/a.png", "--min_probability=1", cwd=trained).stdout
    assert unsure == sure.rstrip() + ", uncertain\n"


def test_probabilities_have_the_temperature_of_the_run(trained: Path):
    """It belongs to the parameters that the run reported on, and to no others."""
    summary = trained / "run/summary.json"
    found = json.loads(summary.read_text())
    assert found["temperature"] not in (0.0, 1.0)

    def probability() -> float:
        answers = finish(*RUN, "--json", "photos/a.png", cwd=trained).stdout
        return json.loads(answers)[0]["probability"]

    at_own = probability()
    try:
        summary.write_text(json.dumps({**found, "temperature": 1e-6}))
        assert probability() > 0.99 > at_own
        summary.write_text(json.dumps({**found, "temperature": 1e-6, "params_sha256": "0"}))
        assert probability() < 0.9
    finally:
        summary.write_text(json.dumps(found))


def test_explanations_are_pictures_of_each_photo(trained: Path):
    (trained / "more").mkdir(exist_ok=True)
    for name in ("more_a.png", "more/a.png"):
        (trained / name).write_bytes((trained / "photos/a.png").read_bytes())
    command(*RUN, "--explain=why", "more/a.png", "more_a.png", "photos/broken.jpg", cwd=trained)
    written = sorted(path.name for path in (trained / "why").iterdir())
    assert written == ["more_a.png-1.png", "more_a.png.png"]
    with Image.open(trained / "why/more_a.png.png") as picture:
        assert picture.width == 960


@pytest.fixture
def tiny_predictor(tiny: Config) -> Predictor:
    return random_predictor(edit(tiny, data={"image_size": 8, "name": "folder"}))


def test_many_photos_are_read_a_few_at_once(
    tiny_predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The answers are those of each photo alone, in the order of the files."""
    names = [f"{i}.png" for i in range(11)]
    write(tmp_path / "many", *names)
    (tmp_path / "many/5.png").write_bytes(b"")
    alone = [next(predict.classify(tiny_predictor, [str(tmp_path / "many" / n)], 3)) for n in names]
    read, probabilities = photos.read_images, Predictor.probabilities
    sizes, shapes = [], []

    def reading(paths, layout, done):
        sizes.append(len(paths))
        return read(paths, layout, done)

    def predicting(self, images):
        shapes.append(images.shape[0])
        assert len(sizes) <= len(shapes) + 1  # The next block is being read, and no other.
        return probabilities(self, images)

    monkeypatch.setattr(photos, "read_images", reading)
    monkeypatch.setattr(Predictor, "probabilities", predicting)
    monkeypatch.setattr(predict, "_AT_ONCE", 4)
    found = list(predict.classify(tiny_predictor, [str(tmp_path / "many")], 3))
    assert sizes == [4, 4, 3]
    assert shapes == [4, 4, 4]  # One program is compiled.
    assert [Path(answer.file).name for answer in found] == sorted(names)
    by_file = {answer.file: answer for answer in alone}
    for answer in found:
        expected = by_file[answer.file]
        assert (answer.error, len(answer.top)) == (expected.error, len(expected.top))
        for (name, share), (other, wanted) in zip(answer.top, expected.top, strict=True):
            assert name == other
            assert share == pytest.approx(wanted, abs=1e-6)


def test_the_maps_of_grad_cam_are_the_last_ones(tiny_predictor: Predictor):
    assert saliency.last_maps(tiny_predictor) == "block2/conv1"
    params = {"fc1": {"kernel": np.zeros((3, 3))}}
    without = replace(tiny_predictor, variables={"params": params})
    with pytest.raises(UserError, match="no convolution"):
        saliency.last_maps(without)


def test_a_network_sees_the_centre_of_what_is_stored(tiny_predictor: Predictor):
    cropped = replace(tiny_predictor, config=edit(tiny_predictor.config, data={"crop": 0.5}))
    image = noise(16, 16, 3)
    np.testing.assert_array_equal(saliency.seen_part(cropped, image), image[4:12, 4:12])


def test_writing_answers_touches_no_other_file(trained: Path):
    (trained / "mine.tmp").write_text("mine")
    finish(*RUN, "--output=mine.csv", "photos/a.png", cwd=trained)
    assert (trained / "mine.tmp").read_text() == "mine"
    assert not (trained / "mine.csv.tmp").exists()
