"""Runs the notebooks from clean kernels and writes their outputs into them.

    python notebooks/execute.py                 all of them
    python notebooks/execute.py 02_layers       some of them

They need the development tools and CIFAR-10. The kernel is the Python that runs this file.
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a new kernel, whose folder is that of the notebooks, and keeps the outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    with tempfile.TemporaryDirectory() as settings:
        paths = [str(FOLDER.resolve().parent), os.environ.get("PYTHONPATH", "")]
        environment = {"IPYTHONDIR": settings, "PYTHONPATH": os.pathsep.join(paths)}
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            coalesce_streams=True,  # However the kernel cut the text into messages.
            record_timing=False,
            resources={"metadata": {"path": str(FOLDER)}},
        )
        client.execute(env={**os.environ, **environment})


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Reduces each picture to 256 colours, which takes a third of the space."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for output in (output for cell in cells for output in cell.outputs):
        if "image/png" in output.get("data", {}):
            content = io.BytesIO(base64.b64decode(output.data["image/png"]))
            small = io.BytesIO()
            with Image.open(content) as picture:
                picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def main(names: list[str]) -> None:
    """Runs the notebooks of these names, or all."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        shrink_pictures(notebook)
        # Versions and times of this machine are no part of a lesson.
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
