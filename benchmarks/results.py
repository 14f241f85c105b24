"""Puts the tables of a campaign into RESULTS.md, between its two marks; `bash benchmarks/run.sh` ends with this.

python -m benchmarks.results runs/benchmarks
"""

import datetime
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
SECTIONS = {
    "train_step": "The train step",
    "packing": "Packed rows against padded ones",
    "masking": "Masking",
    "input": "Preparing and reading, one core",
    "startup": "Starting",
}
_FOLDERS = re.compile(r"(?<=\btext:)\S*/|(?<=\bjsonl:)\S*/")  # of the text measured on: they are one machine's own
_MARKED = re.compile(r"(<!-- speed: begin[^\n]*-->\n).*(\n<!-- speed: end -->)", re.DOTALL)


def rewritten(text: str, tables: dict[str, str]) -> str:
    """The text of RESULTS.md with these tables, by the name of the benchmark, in place of what was there."""
    parts = [
        f"### {title}\n\n`python -m benchmarks.{name}`\n\n{_FOLDERS.sub('', tables[name].strip())}"
        for name, title in SECTIONS.items()
        if name in tables
    ]
    if not _MARKED.search(text):
        raise SystemExit(f"{RESULTS} has lost its marks")
    body = "\n\n".join([f"Written on {datetime.date.today()}.", *parts])
    return _MARKED.sub(lambda match: f"{match[1]}\n{body}\n{match[2]}", text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: (folder / f"{name}.md").read_text() for name in SECTIONS if (folder / f"{name}.md").exists()}
    RESULTS.write_text(rewritten(RESULTS.read_text(), {name: table for name, table in found.items() if table.strip()}))
