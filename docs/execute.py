"""Executes a notebook in an empty folder, and stores its outputs in it.

    python docs/execute.py docs/tutorial.ipynb

The outputs do not show where the folder was.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
_METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(notebook: nbformat.NotebookNode, folder: Path, **parameters: Any) -> None:
    """Executes all cells with their paths relative to a folder, and stores their outputs.

    Args:
      folder: absolute; paths in it are stored relative to it.
      parameters: variables to set at the end of the cell with the tag `parameters`.

    Raises:
      CellExecutionError: a cell raised an exception.
    """
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    index = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = notebook.cells[index].source
    notebook.cells[index].source = f"{given}\n{source}"
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=1800, startup_timeout=600, coalesce_streams=True, resources=resources)
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    notebook.cells[index].source = given
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
    notebook.metadata = nbformat.from_dict(_METADATA)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    content = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        execute(content, Path(name).resolve())
    nbformat.write(content, file)
