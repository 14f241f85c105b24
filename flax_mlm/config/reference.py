"""Lists the config's fields for the reference documentation."""

import re
from typing import Any, NamedTuple

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
    """Every field with its default and comment from configs/base.py, in the order of the dataclasses."""
    defaults, comments, result = flatten(base()), _comments(BASE.read_text()), []
    for name, knob in knobs().items():
        allowed = " | ".join(knob.allowed) if isinstance(knob.allowed, tuple) else str(knob.allowed or "")
        kind = knob.type.__name__ + " or none" * knob.optional
        result.append(Entry(name, kind, defaults[name], allowed, comments[name]))
    return result


def _comments(source: str) -> dict[str, str]:
    """Field -> the comment lines directly above its assignment and the comment behind it."""
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
