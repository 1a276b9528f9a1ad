"""The notebooks: each runs with tiny settings, and what is committed of them is whole and clean."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def text_of(output: nbformat.NotebookNode) -> str:
    """Returns an output as a reader sees it, without pictures."""
    if output.output_type == "stream":
        return output.text
    return "".join(text for kind, text in output.data.items() if kind.startswith("text/"))


def test_there_is_a_notebook_for_each_part_of_the_chapter():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # Of the libraries that run notebooks, not of ours.
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CNN_JAX_FAST", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # Compiles faster.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    # The kernel starts elsewhere, and is to find this checkout all the same.
    monkeypatch.setenv("PYTHONPATH", f"{path.parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    said = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert said == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_run_whole_and_names_no_place(path: Path):
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
