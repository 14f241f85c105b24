"""Prints the fields of the config as a Markdown table: type, default, allowed values, and the comment of base.py.

python -m docs.config_reference
"""

import re
from typing import Any, NamedTuple

from flax_mlm.cli import tables
from flax_mlm.config.knobs import knobs
from flax_mlm.config.load import BASE, base, flatten


class Entry(NamedTuple):
    """One field as a user sees it."""

    name: str
    type: str
    default: Any
    allowed: str
    comment: str


def entries() -> list[Entry]:
    """Lists every field with its default and comment from configs/base.py, in the order of the dataclasses."""
    defaults, comments, result = flatten(base().to_dict()), _comments(BASE.read_text()), []
    for name, field in knobs().items():
        allowed = " | ".join(field.allowed) if isinstance(field.allowed, tuple) else str(field.allowed or "")
        kind = field.type.__name__ + " or none" * field.optional
        result.append(Entry(name, kind, defaults[name], allowed, comments[name]))
    return result


def _comments(source: str) -> dict[str, str]:
    """Finds field -> the comment lines directly above its assignment and the comment behind it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in map(str.strip, source.splitlines()):
        code, _, behind = line.rpartition("  # ") if "  # " in line else (line, "", "")
        if line.startswith("# "):
            above.append(line.removeprefix("# "))
            continue
        if match := re.match(r"c\.([\w.]+) = ", code):
            comments[match[1]] = " ".join(filter(None, [*above, behind]))
        above = []
    return comments


if __name__ == "__main__":
    print(tables.markdown(Entry._fields, [[str(cell) for cell in entry] for entry in entries()], len(Entry._fields)))
