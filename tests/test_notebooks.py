"""The notebooks run with tiny settings, and their committed outputs are complete and clean."""

import ast
import os
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# By default only the one that uses most of the package; each starts a Jupyter kernel.
RUNS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem[:2] == "04" else [pytest.mark.slow])
    for path in NOTEBOOKS
]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def source(path: Path) -> ast.Module:
    """Returns the code of a notebook, without the magic of IPython."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return ast.parse(re.sub("^%.*$", "", code, flags=re.MULTILINE))


def text_of(output: nbformat.NotebookNode) -> str:
    """Returns an output as a reader sees it, without pictures."""
    if output.output_type == "stream":
        return output.text
    return "".join(text for kind, text in output.data.items() if kind.startswith("text/"))


def test_there_is_a_notebook_for_each_part_of_the_chapter():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
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
    assert len(used) > 10
    assert [use for use in used if not hasattr(modules[use[0]], use[1])] == []


@pytest.mark.parametrize("path", RUNS)
@pytest.mark.filterwarnings("default")  # The libraries that run notebooks warn.
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CNN_JAX_FAST", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    # The kernel starts in another folder and must find this checkout.
    monkeypatch.setenv("PYTHONPATH", f"{path.parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    errors = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_run_from_start_to_end_and_shows_no_paths(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [o for o in outputs(notebook) if o.output_type == "error"] == []
    assert [o for o in outputs(notebook) if o.get("name") == "stderr"] == []
    assert not any(cell.metadata for cell in notebook.cells)
    shown = "\n".join(map(text_of, outputs(notebook)))
    assert not re.search(r"/(tmp|home|root|work|Users)\b", shown)
    assert "digits" not in shown


def test_the_notebooks_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000
