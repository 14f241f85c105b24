"""The tutorial: it runs on any text, and it is stored with the outputs of one clean run."""

import json
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.helpers import xla
from tests.helpers.documentation import docs_script
from tests.helpers.paths import ROOT

execute, notebooks = docs_script("execute"), docs_script("notebooks")
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
# Of a file or folder; `</p>` of HTML and `and/or` of text are none.
ABSOLUTE_PATH = re.compile(r"(?<![\w.<~])/\w[\w.-]*/")


def tutorial() -> nbformat.NotebookNode:
    return nbformat.read(TUTORIAL, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the outputs of a notebook say, without its figures."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    values = [value for output in outputs for kind, value in output.get("data", {}).items() if "image" not in kind]
    return values + [output.text for output in outputs if "text" in output]


def figures(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """The figures of a notebook as base64, each with its cell."""
    cells = [(cell, output.get("data", {})) for cell in code_cells(notebook) for output in cell.outputs]
    return [(cell, data["image/png"]) for cell, data in cells if "image/png" in data]


def test_the_stored_outputs_are_of_one_run():
    cells = code_cells(tutorial())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells for output in cell.outputs} <= {
        "stream",
        "execute_result",
        "display_data",
    }


def test_the_stored_outputs_name_no_machine():
    assert [path for text in texts(tutorial()) for path in ABSOLUTE_PATH.findall(text)] == []
    assert ABSOLUTE_PATH.findall("corpus: /home/someone/runs and <p>and/or</p>") == ["/home/"]


def test_the_stored_notebook_is_small_and_has_no_other_metadata():
    notebook = tutorial()
    assert set(notebook.metadata) == {"kernelspec"}
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags", "alt"}
    assert figures(notebook)
    for cell, figure in figures(notebook):
        assert cell.metadata.alt
        assert len(figure) < 60_000
    assert TUTORIAL.stat().st_size < 150_000


def test_it_runs_on_a_text_of_ones_own(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla.flags(devices=1))
    notebook = tutorial()
    execute.execute(notebook, tmp_path, SOURCE=f"text:{toy.text}", VOCAB_SIZE=400, STEPS=8)
    printed = "\n".join(texts(notebook))
    assert "step 8/8  validation loss" in printed
    assert float(re.search(r"largest difference of logits: (\S+)", printed)[1]) < 1e-4
    assert str(tmp_path) not in printed
    assert len(figures(notebook)) == len(figures(tutorial()))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in tutorial().cells]
    assert (tmp_path / "runs" / "tutorial" / "exported" / "model.safetensors").exists()


def test_an_exception_ends_the_execution(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("N = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("if N != 1:\n    raise ValueError(f'N is {N}')"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute.execute(notebook, tmp_path)
    with pytest.raises(CellExecutionError, match="N is 2"):
        execute.execute(notebook, tmp_path, N=2)


def test_the_page_of_the_site_has_cells_outputs_and_figures():
    cell = {"cell_type": "code", "metadata": {"alt": 'a "line"'}, "source": ["x = 1\n", "x"]}
    outputs = [
        {"output_type": "stream", "text": ["one\n", "two\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["<HTML>"], "text/html": ["<p>bold</p>"]}},
        {"output_type": "display_data", "data": {"text/plain": ["<Figure>"], "image/png": "aGk=\n"}},
        {"output_type": "execute_result", "data": {"text/plain": ["1"]}},
    ]
    notebook = {
        "cells": [{"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]}, {**cell, "outputs": outputs}]
    }
    figure = '<img alt="a &quot;line&quot;" src="data:image/png;base64,aGk=">'
    parts = [
        "# Title\n\nText.",
        "```python\nx = 1\nx\n```",
        '```text title="Output"\none\ntwo\n```',
        "<p>bold</p>",
        figure,
    ]
    assert notebooks.to_markdown(notebook) == "\n\n".join([*parts, '```text title="Output"\n1\n```']) + "\n"
    assert notebooks.to_markdown(notebook, outputs=False) == "\n\n".join(parts[:2]) + "\n"


def test_the_page_of_the_tutorial_shows_all_outputs():
    page = notebooks.to_markdown(json.loads(TUTORIAL.read_text()))
    shown = re.findall(r'^(?:```text title="Output"|<img |<div>)', page, re.MULTILINE)
    assert len(shown) == len([output for cell in code_cells(tutorial()) for output in cell.outputs])
