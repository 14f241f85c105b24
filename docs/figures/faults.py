"""Writes the table of docs/results/faults.md from docs/figures/data/faults.csv, or first that file from a new report.

bash launch/test.sh --faults --fault_report=report.md
python docs/figures/faults.py report.md        # then `python docs/figures/draw.py faults`
python docs/figures/faults.py                  # the table alone
"""

import csv
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data" / "faults.csv"
OUTCOMES = ("detected", "recovered", "harmless", "failed")

sys.path.insert(0, str(HERE.parent.parent))
from benchmarks.results import PAGES, replaced  # noqa: E402


def read() -> list[dict[str, str | int]]:
    """Returns the rows of the data file: kind, fault, cases, and the count of each outcome."""
    with DATA.open(newline="") as file:
        return [{k: v if k == "fault" else int(v) for k, v in row.items()} for row in csv.DictReader(file)]


def take(report: str) -> None:
    """Writes the data file from a report of the fault suite."""
    number = r" *(\d*) *\|"
    rows = re.findall(r"^\| *(\d+) (.*?) *\|" + number + r" *\d* *\|" + number * 4, report, re.MULTILINE)
    if not rows:
        raise SystemExit("the report has no table of faults")
    with DATA.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("kind", "fault", "cases", *OUTCOMES))
        table.writerows([kind, fault, *(n or 0 for n in numbers)] for kind, fault, *numbers in rows)


def markdown(rows: list[dict[str, str | int]]) -> str:
    """Returns the table of the page, with its sums."""
    lines = [
        "| kind of fault | cases | injected | detected | recovered | harmless | lost or silent |",
        "| --- " + "| --: " * 6 + "|",
    ]
    total = {"kind": "", "fault": "all", **{name: sum(row[name] for row in rows) for name in ("cases", *OUTCOMES)}}
    for row in [*rows, total]:
        numbers = (row["cases"], sum(row[name] for name in OUTCOMES), *(row[name] for name in OUTCOMES))
        name = f"{row['kind']} {row['fault']}".strip()
        lines.append(f"| {name} | " + " | ".join(f"{n:,}" if n else "" for n in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]).read_text())
    page = PAGES / "faults.md"
    page.write_text(replaced(page.read_text(), "faults", markdown(read())))
