"""The pages: their examples run, and what they name exists: files, flags, configs and modes."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cli import finish

import cnn_jax
from cnn_jax import command, configs, fields, tools
from cnn_jax.config import OptimConfig
from experiments import run as experiments

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = ROOT / "docs" / "change-one-thing.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "cnn_jax" / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FIELDS = set(fields.all_fields())
SECTIONS = {name.split(".")[0] for name in FIELDS if "." in name}
FLAGS = {"help", "version", *re.findall(r"^  --(\w+)", command.help_text("flags"), re.MULTILINE)}

# Appended to the commands that train, so that each takes seconds; the last of equal flags counts.
SMALL = (
    "--train.epochs=1",
    "--train.batch_size=20",
    "--data.images_per_class=20",
    "--data.image_size=8",
    "--model.blocks=[[4],[4]]",
    "--model.dense=[8]",
)

# What stands in for the logging services: each writes what it gets to a file.
STAND_INS = {
    "wandb.py": """
import json
run = None
def init(project, name, config):
    global run
    run = name
    json.dump({"project": project, "name": name, "config": config}, open("wandb.json", "w"))
def log(metrics, step):
    print(json.dumps([step, metrics]), file=open("wandb.jsonl", "a"))
""",
    "mlflow.py": """
import json
def log_metrics(metrics, step):
    print(json.dumps([step, metrics]), file=open("mlflow.jsonl", "a"))
""",
}

# What the commands of a section leave behind, and a part of it.
WRITTEN = {
    "A config": {"runs/narrow/config.json": '"adam"'},
    "A model": {"runs/my_net/features/block2-logistic/classifier.json": '"test_accuracy"'},
    "A data source": {"runs/stripes/report.html": "vertical"},
    "A hook": {
        "wandb.json": '"model.blocks"',
        "wandb.jsonl": '[10, {"step": 10, "loss": ',
        "mlflow.jsonl": '"train_accuracy": ',
    },
}


@dataclass(frozen=True)
class Command:
    """A command of cnn_jax.main on a page."""

    line: str
    arguments: tuple[str, ...]

    @property
    def config(self) -> str:
        return self.flags.get("config", "quickstart")

    @property
    def flags(self) -> dict[str, str]:
        pairs = [a[2:].partition("=") for a in self.arguments if a.startswith("--")]
        return {name: value for name, _, value in pairs}


def code(text: str, language: str) -> list[str]:
    """Returns the code blocks of a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def shell_lines(text: str) -> list[str]:
    """Returns the commands in shell blocks, continued lines joined, and those in sentences."""
    blocks = "\n".join(code(text, "sh")).replace("\\\n", " ")
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(match.split()) for match in re.findall(r"`([^`]+)`", prose)]
    return [line for line in [*blocks.splitlines(), *inline] if line.strip()]


def parse(line: str) -> Command | None:
    """Returns a line's call of cnn_jax.main; None for other lines and for patterns of calls."""
    found = re.search(r"(\./launch\.sh|-m cnn_jax\.main) ?(.*)", line)
    if not found or "CONFIG" in line:
        return None
    words = shlex.split(found[2], comments=True)
    end = next((i for i, word in enumerate(words) if word[:1] in ("&", ">", "|")), len(words))
    words = words[:end]
    if found[1] == "./launch.sh":
        words = words[words[:1] == ["--cuda"] :]
        if words[:1] == ["test"] or words == ["..."]:
            return None
        if words and not words[0].startswith("-"):
            words[0] = f"--config={words[0]}"
    return Command(line, tuple(words))


def commands(text: str) -> list[Command]:
    return [found for line in shell_lines(text) if (found := parse(line))]


def sections(page: Path) -> dict[str, str]:
    """Returns the text below each heading of the second level."""
    parts = re.split(r"^## (.*)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def example(section: str) -> dict[str, str]:
    """Returns the files of a section by the name in each block's first line."""
    blocks = code(sections(EXAMPLES)[section], "python")
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


def function(section: str, name: str):
    """Returns a function that the one file of a section defines."""
    (block,) = example(section).values()
    namespace: dict = {}
    exec(block, namespace)
    return namespace[name]


def by_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)(function)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@by_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives a page's headings."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_flags_and_fields_exist(page: Path):
    text = page.read_text()
    assert set(re.findall(r"--([a-z]+\.[a-z_]+)", text)) - {"section.field"} <= FIELDS
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?:=[^`]*)?`", text)
    assert {name for name in named if not name.endswith(".py")} <= FIELDS
    used = {flag for found in commands(text) for flag in found.flags}
    assert used <= FIELDS | FLAGS
    assert "--set=" not in text


@by_page
def test_commands_name_configs_and_modes_and_fit_together(page: Path):
    for found in commands(page.read_text()):
        assert found.flags.get("mode", "train") in tools.MODES, found.line
        command.help_text(found.flags.get("help", ""))
        if re.search(r"\.py:|\.json$", found.config):
            continue
        values = {name: value for name, value in found.flags.items() if name in FIELDS}
        fields.with_values(configs.get(found.config), values)


@by_page
def test_files_and_experiments_exist(page: Path):
    text = page.read_text()
    to_be_written = {name for b in code(text, "python") for name in re.findall(r"^# (\S+)\n", b)}
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name
    folders = "cnn_jax|experiments|benchmarks|tests|notebooks|docs"
    for line in shell_lines(text):
        for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*)", line):
            assert path in to_be_written or (ROOT / path).exists(), line
        for name in re.findall(r"-m experiments\.run (\w+)", line):
            assert name in experiments.EXPERIMENTS, line


def with_examples() -> list:
    slow = {"Training from Python": pytest.mark.slow}
    found = [section for section in sections(EXAMPLES) if example(section)]
    return [pytest.param(section, marks=slow.get(section, ())) for section in found]


@pytest.mark.slow
@pytest.mark.parametrize("section", with_examples())
def test_an_example_runs(section: str, tmp_path: Path):
    for name, text in {**STAND_INS, **example(section)}.items():
        (tmp_path / name).write_text(text)
    text = sections(EXAMPLES)[section]
    for each in commands(text):
        small = SMALL if each.flags.get("mode", "train") == "train" else ()
        if section == "A hook":  # `python -m` finds the stand-ins in the current folder
            python("-m", "cnn_jax.main", *each.arguments, *small, cwd=tmp_path)
        else:
            finish(*each.arguments, *small, cwd=tmp_path)
    for script in re.findall(r"^\.venv/bin/python (\w+\.py)$", text, re.MULTILINE):
        python(script, cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/summary.json"))
    for path, content in WRITTEN.get(section, {}).items():
        assert content in (tmp_path / path).read_text(errors="replace"), path
    if section == "A loss":
        (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
        first = json.loads(metrics.read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(0.81 * math.log(10), rel=0.05)


def python(*arguments: str, cwd: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, check=True)


def test_the_example_of_an_experiment_is_one():
    (block,) = code((ROOT / "docs" / "experiments.md").read_text(), "python")
    namespace: dict = {}
    exec(block, namespace)
    assert [len(v.model.blocks) for v in namespace["EXPERIMENT"].variants.values()] == [3, 3, 3]


def test_the_focal_loss_is_the_paper_s():
    focal = function("A loss", "focal")
    losses = focal(jnp.zeros((2, 10)), jnp.array([3, 7]))
    np.testing.assert_allclose(losses, [0.9**2 * math.log(10)] * 2, rtol=1e-6)


def test_the_optimizer_moves_by_the_learning_rate():
    lion = function("An optimizer", "lion")(OptimConfig())
    params = {"w": jnp.array([1.0, -2.0])}
    updates, _ = lion.update({"w": jnp.array([0.3, -5.0])}, lion.init(params), params)
    moved = optax.apply_updates(params, updates)["w"]
    np.testing.assert_allclose(moved, [0.0, -1.0], atol=1e-6)


def test_the_readme_lists_the_core():
    listed = re.findall(
        r"^    (\S+)  ", (cnn_jax.__doc__ or "").partition("Around it")[0], re.MULTILINE
    )
    table = README.read_text().partition("<!-- core -->")[2].partition("<!-- /core -->")[0]
    files = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert [name.replace("__init__.py", "") for name in files] == listed


def test_the_core_is_read_in_an_hour():
    """At most 2,000 lines that are not blank; what does not fit stands around the core."""
    table = README.read_text().partition("<!-- core -->")[2].partition("<!-- /core -->")[0]
    lines = 0
    for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        for path in (first, *(str(Path(first).parent / other) for other in others)):
            text = (ROOT / "cnn_jax" / path).read_text()
            lines += sum(bool(line.strip()) for line in text.splitlines())
    assert 1500 < lines <= 2000
