"""Writes generated tables into a page of docs/results, between the page's two marks.

    python -m benchmarks.results runs/benchmarks    # docs/results/speed-cpu.md; `bash benchmarks/run.sh` ends with this

A section NAME begins after the line `<!-- NAME: begin ... -->` and ends before `<!-- NAME: end -->`. What is outside is
written by hand and stays as it is.
"""

import datetime
import re
import sys
from pathlib import Path

PAGES = Path(__file__).parent.parent / "docs" / "results"
SPEED = PAGES / "speed-cpu.md"
SECTIONS = {
    "train_step": "Training step",
    "packing": "Packed and padded rows",
    "masking": "Masking",
    "input": "Preparing and reading, one core",
    "engines": "Preparing on engines, one core",
    "startup": "Starting",
}
_FOLDERS = re.compile(r"(?<=\btext:)\S*/|(?<=\bjsonl:)\S*/")  # of the text measured on: they are one machine's own


def replaced(text: str, name: str, body: str) -> str:
    """Returns the text of a page with `body` as its generated section `name`. Raises SystemExit: no such marks."""
    marks = re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*(\n<!-- {name}: end -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"the page has lost the marks of its generated section '{name}'")
    return marks.sub(lambda match: f"{match[1]}\n{body}\n{match[2]}", text)


def dated(*parts: str) -> str:
    """Joins the parts of a generated section, below the day that they are of."""
    return "\n\n".join([f"Written on {datetime.date.today()}.", *parts])


def rewritten(text: str, tables: dict[str, str]) -> str:
    """Returns the CPU speed page with these tables, by the name of the benchmark, as its generated section."""
    parts = [
        f"### {title}\n\n`python -m benchmarks.{name}`\n\n{_FOLDERS.sub('', tables[name].strip())}"
        for name, title in SECTIONS.items()
        if name in tables
    ]
    return replaced(text, "speed", dated(*parts))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: (folder / f"{name}.md").read_text() for name in SECTIONS if (folder / f"{name}.md").exists()}
    SPEED.write_text(rewritten(SPEED.read_text(), {name: table for name, table in found.items() if table.strip()}))
