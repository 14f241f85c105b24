"""Settings of a sweep: every combination of some values of some fields.

`optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3` is four settings. Fields joined by & change together:
`optimizer.name&optimizer.learning_rate=adamw&1e-3,muon&6e-3` is two settings. Values that contain , ; or & are written
in double quotes: `train.phases=,"50%: objective.name=mlm, objective.mask_rate=0.3"` is two settings, the first with an
empty text.
"""

import hashlib
import itertools
import re
from typing import Any

from flax_mlm.config.grammar import split, unquote
from flax_mlm.config.knobs import parse
from flax_mlm.errors import UserError

Setting = dict[str, Any]  # field -> value


def parse_grid(text: str) -> list[Setting]:
    """The settings of `--grid`: every combination, the last field changing fastest. Raises UserError."""
    if text.count('"') % 2:
        raise UserError(f"--grid: a double quote is not closed in '{text}'")
    axes, fields = list[list[Setting]](), list[str]()
    for statement in filter(None, split(text, ";")):
        names, axis = _parse_axis(statement)
        axes.append(axis)
        fields += names
    if not fields:
        raise UserError("--grid is missing; expected field=value,value; ... such as 'optimizer.name=adamw,muon'")
    if twice := [path for path in fields if fields.count(path) > 1]:
        raise UserError(f"--grid names {twice[0]} twice")
    if "seed" in fields:
        raise UserError("--grid cannot vary seed; use --seeds=3 to repeat each setting with several seeds")
    return [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*axes)]


def _parse_axis(statement: str) -> tuple[list[str], list[Setting]]:
    """One field, or several that change together, and their values."""
    left, equals, right = statement.partition("=")
    if not equals:
        raise UserError(f"--grid: '{statement}' has no values; expected field=value,value; field=value,...")
    fields = split(left, "&")
    axis: list[Setting] = []
    for item in split(right, ","):
        values = split(item, "&")
        if len(values) != len(fields):
            raise UserError(
                f"--grid: '{item}' has {len(values)} of the {len(fields)} values of {left.strip()}; separate them by &"
            )
        try:
            setting = {path: parse(path, unquote(value)) for path, value in zip(fields, values, strict=True)}
        except UserError as e:
            raise UserError(f"--grid: {e}") from e
        if setting in axis:
            raise UserError(f"--grid names {describe(setting)} twice")
        axis.append(setting)
    return fields, axis


def describe(setting: Setting) -> str:
    """A setting for people, such as `optimizer.name=muon, seed=0`."""
    return ", ".join(f"{path}={spell(value)}" for path, value in setting.items())


def spell(value: Any) -> str:
    """A value as the command line spells it."""
    return "none" if value is None else str(value)


def folder_name(setting: Setting, seed: int) -> str:
    """A folder name that shows the values, different for every setting and seed."""
    parts = [f"{path}-{spell(value)}" for path, value in sorted(setting.items())] + [f"seed-{seed}"]
    exact, plain = "+".join(parts), "+".join(re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII) for part in parts)
    if plain != exact or len(plain) > 200:
        plain = f"{plain[:180]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return plain
