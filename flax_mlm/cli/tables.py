"""Results for people: Markdown tables, and figures that need no screen."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_mlm.storage import files


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    lines = [header, rule, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cut_note(about: Mapping[str, Any]) -> str:
    """A note on a run whose time budget has cut its schedule, by its result or checkpoint; empty for a whole one."""
    if not (cut := about.get("schedule_cut")):
        return ""
    return f"for the last {cut:.0%} of the schedule no time was left; it does not compare with whole runs"


@contextlib.contextmanager
def figure(file: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A matplotlib Figure and its (rows, columns) axes, to be drawn in; then it is written to a PNG file.

    Args:
      size: width and height, inches.
    """
    from matplotlib.figure import Figure  # not through pyplot, which keeps what it draws

    drawn = Figure(figsize=size, layout="constrained")
    yield drawn, drawn.subplots(rows, columns, squeeze=False)
    with files.replacing(file) as temporary:
        drawn.savefig(temporary, format="png", dpi=150)
