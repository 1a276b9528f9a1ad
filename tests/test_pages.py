"""The tables of README and docs/ are those of the committed result files."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cnn_jax import configs
from experiments import pages


@pytest.mark.slow
@pytest.mark.parametrize("page", pages.pages(), ids=lambda path: path.stem)
def test_tables_are_those_of_the_results(page: Path):
    text = page.read_text()
    assert pages.render(text) == text, "run `python -m experiments.pages` and commit what it writes"


def test_every_table_has_one_place():
    texts = "".join(page.read_text() for page in pages.pages())
    assert sorted(re.findall(r"<!-- table (\w+) -->", texts)) == sorted(pages.TABLES)
    assert texts.count("<!-- /table -->") == len(pages.TABLES)


@pytest.mark.slow
def test_the_networks_are_all_that_have_a_config():
    named = re.findall(r"^\| `(\w+)`", pages.networks(), re.MULTILINE)
    assert named == [name for name in configs.CONFIGS if not name.startswith("finetune")]


@pytest.mark.slow
def test_a_changed_result_changes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(pages.EXPERIMENTS / "chapter", tmp_path / "chapter")
    path = tmp_path / "chapter" / "results.csv"
    text = path.read_text()
    assert text.count("vgg3,0,0.7351") == 1
    path.write_text(text.replace("vgg3,0,0.7351", "vgg3,0,0.5"))
    monkeypatch.setattr(pages, "EXPERIMENTS", tmp_path)
    assert "35,339,082 | 10 | 50.0% | 1 | 76.0% |" in pages.networks()
    assert "| `airbench` | 10 |" not in pages.chapter()


def test_several_seeds_give_mean_and_standard_deviation():
    rows = [{"test_accuracy": 0.9}, {"test_accuracy": 0.92}, {"test_accuracy": None}]
    assert pages.accuracy(rows) == "91.00 ± 1.41%"
    assert pages.accuracy(rows[:1]) == "90.0%"
    assert pages.accuracy([]) == pages.MISSING


def test_a_benchmark_names_what_it_was_made_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "BENCHMARKS", tmp_path)
    assert pages.photos_speed() == pages.MISSING
    row = {
        "network": "resnet18",
        "mode": "train",
        "dtype": "float32",
        "kind": "torch",
        "time_over_ours": 1.23456,
        "quartiles": [1.1, 1.3],
        "load": 2.0,
        "peak_mb": 1234.5,
    }
    found = {"made_by": {"command": "`x`", "commit": "abc"}, "rows": [row, {**row, "kind": "us"}]}
    (tmp_path / "photos.json").write_text(json.dumps(found))
    *_, line, _, origin = pages.photos_speed().splitlines()
    assert line == "| resnet18 | train | float32 | 1.23 (1.10 to 1.30) | 2.0 | 1,234 |"
    assert origin == "command: `x`; commit: abc."
