"""Shows notebooks as pages of the site: a hook of mkdocs that turns them into Markdown.

mkdocs then checks their links and lists their headings as it does for other pages. Nothing is executed: the outputs are
those that are stored in the notebook.
"""

import html
import json
from pathlib import PurePosixPath
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Replaces every notebook by a page with the same name; links to the notebook lead to that page."""
    from mkdocs.structure.files import File  # the tests use `to_markdown` where mkdocs is not installed

    class Page(File):
        def is_documentation_page(self) -> bool:
            return True

    for file in [file for file in files if PurePosixPath(file.src_uri).suffix == ".ipynb"]:
        page = Page(file.src_uri, None, config.site_dir, config.use_directory_urls, inclusion=file.inclusion)
        page.content_string = to_markdown(json.loads(file.content_string))
        files.remove(file)
        files.append(page)
    return files


def to_markdown(notebook: dict[str, Any], outputs: bool = True) -> str:
    """Converts a notebook of format 4 to Markdown.

    Args:
      outputs: False leaves out the outputs of the cells.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            alt = cell["metadata"].get("alt", "")
            parts += [_output(output, alt) for output in cell["outputs"]] if outputs else []
        else:
            parts.append(source)
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any], alt: str) -> str:
    """Formats the richest form of an output.

    Args:
      alt: describes a figure in words.
    """
    data = {kind: "".join(text) for kind, text in output.get("data", {"text/plain": output.get("text", "")}).items()}
    if "image/png" in data:
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    return data.get("text/html") or f'```text title="Output"\n{data["text/plain"].rstrip()}\n```'
