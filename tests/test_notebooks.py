"""The notebooks run with smaller sizes, and their committed outputs are complete and clean."""

import ast
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from notebooks.execute import execute

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "01_first_network",
    "02_layers",
    "03_losses_and_optimizers",
    "04_models",
    "05_transfer_learning",
]

_DIGITS = {
    r'"data\.name": "cifar10"': '"data.name": "digits"',
    r'"data\.images_per_class": "\d+"': '"data.images_per_class": "20"',
    r'"train\.epochs": "\d+"': '"train.epochs": "1"',
}
SMALLER = {
    "01_first_network": {r"range\(1, 16\)": "range(1, 3)", "epochs=15": "epochs=1"},
    "02_layers": {**_DIGITS, r'"\[\[16,16\]\]"': '"[[4,4]]"'},
    "03_losses_and_optimizers": {},  # It trains on digits, for 20 steps.
    "04_models": {**_DIGITS, r'"\[\[16\],\[32\],\[64\]\]"': '"[[4]]"'},
    "05_transfer_learning": {
        **_DIGITS,
        r'"\[\[16\],\[32\],\[64\]\]"': '"[[4]]"',
        '"airplane,automobile,bird,cat,deer"': '"0,1,2,3,4"',
        '"dog,frog,horse,ship,truck"': '"5,6,7,8,9"',
    },
}
"""Changes of the code, as regular expressions, under which a notebook runs in seconds."""

# By default only the one that uses most of the package; each starts a Jupyter kernel.
RUNS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem[:2] == "05" else [pytest.mark.slow])
    for path in NOTEBOOKS
]
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def source(path: Path) -> ast.Module:
    """Returns the code of a notebook, without the magic of IPython."""
    code = "\n".join(cell.source for cell in code_cells(read(path)))
    return ast.parse(re.sub("^%.*$", "", code, flags=re.MULTILINE))


def text_of(output: nbformat.NotebookNode) -> str:
    """Returns an output as a reader sees it, without pictures."""
    if output.output_type == "stream":
        return output.text
    return "".join(text for kind, text in output.data.items() if kind.startswith("text/"))


def printed_from_results(notebook: nbformat.NotebookNode) -> list[str]:
    """Returns what the cells print that read the results of experiments."""
    cells = [cell for cell in code_cells(notebook) if "(results /" in cell.source]
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream") for cell in cells]


def make_smaller(notebook: nbformat.NotebookNode, changes: dict[str, str]) -> None:
    """Changes the code of a notebook; a change that changes nothing is out of date."""
    for pattern, new in changes.items():
        count = 0
        for cell in code_cells(notebook):
            cell.source, n = re.subn(pattern, new, cell.source)
            count += n
        assert count, f"no cell has {pattern}"


def test_there_is_a_notebook_for_each_part_of_the_chapter():
    assert [path.stem for path in NOTEBOOKS] == NAMES == list(SMALLER)


@by_notebook
def test_a_notebook_uses_names_that_exist(path: Path):
    found: dict[str, object] = {}
    for node in ast.walk(source(path)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cnn_jax"):
            exec(ast.unparse(node), found)
    modules = {name: value for name, value in found.items() if isinstance(value, ModuleType)}
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(source(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    used = [(module, name) for module, name in used if module in modules]
    assert used
    assert [use for use in used if not hasattr(modules[use[0]], use[1])] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS)
@pytest.mark.filterwarnings("default")  # The libraries that run notebooks warn.
def test_a_notebook_runs_and_prints_the_results_as_committed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    committed, notebook = read(path), read(path)
    make_smaller(notebook, SMALLER[path.stem])
    execute(notebook)
    errors = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert errors == []
    again = "experiments/results changed: python notebooks/execute.py, and check the texts"
    assert printed_from_results(notebook) == printed_from_results(committed), again


@by_notebook
def test_a_committed_notebook_was_run_from_start_to_end_and_shows_no_paths_and_times(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [o for o in outputs(notebook) if o.output_type == "error"] == []
    assert [o for o in outputs(notebook) if o.get("name") == "stderr"] == []
    assert not any(cell.metadata for cell in notebook.cells)
    shown = "\n".join(map(text_of, outputs(notebook)))
    assert not re.search(r"/(tmp|home|root|work|Users)\b", shown)
    assert " at 0x" not in shown
    assert not re.search(r"images/s|\bseconds\b|\d ?m?s\b", shown)


@by_notebook
def test_a_lesson_has_a_link_to_run_it_one_question_and_no_code_for_tests(path: Path):
    cells = read(path).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert "(https://colab.research.google.com/" in texts[0]
    assert re.search(r"\n!git clone .*requirements\.txt\n%cd cnn_jax\n", texts[0])
    questions = [text for text in texts if "\n## Question: " in f"\n{text}"]
    assert questions == texts[-1:]
    assert re.search(r"<details><summary>Answer</summary>\n\n[A-Z0-9].{100,}", texts[-1], re.DOTALL)
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert not re.search(r"environ|chdir|\btry:|\bfast\b", code)
    for link in re.findall(r"\]\(([^)#]+)\)", "\n".join(texts)):
        assert link.startswith("https://") or (FOLDER / link).exists(), link


def test_the_first_notebook_builds_all_by_hand_before_it_uses_the_package():
    cells = code_cells(read(NOTEBOOKS[0]))
    first_use = next(i for i, cell in enumerate(cells) if "cnn_jax" in cell.source)
    by_hand = "\n".join(cell.source for cell in cells[:first_use])
    steps = [
        "np.sum(image[",  # A convolution,
        "(nn.Module)",
        "log_softmax",
        "jax.value_and_grad",
        "momentum * v + g",
        "for epoch in",
        "optax.apply_updates",
    ]
    places = [by_hand.find(step) for step in steps]
    assert min(places) >= 0
    assert places == sorted(places)
    shown = "\n".join(map(text_of, outputs(read(NOTEBOOKS[0]))))
    assert "patch:    1 1 1 0 1 1 0 1 1\n" in shown
    assert "value:    3\n" in shown


def test_the_notebooks_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000
