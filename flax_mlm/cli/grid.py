"""Settings of a sweep: every combination of some values of some fields.

`optimizer.name=adamw,muon; objective.mask_rate=0.15,0.3` is four settings. What is joined by & changes together:
`optimizer.name&optimizer.learning_rate=adamw&1e-3,muon&6e-3` is two. In double quotes , ; and & are characters as any
other: `train.phases=,"50%: objective.name=mlm, objective.mask_rate=0.3"` is two as well, the first with an empty text.
"""

import hashlib
import itertools
import re
from typing import Any

from flax_mlm.config import schema as config_lib
from flax_mlm.errors import UserError

Setting = dict[str, Any]  # field -> value


def parse(text: str) -> list[Setting]:
    """The settings of `--grid`: every combination, the last field changing fastest. Raises UserError."""
    if text.count('"') % 2:
        raise UserError(f"--grid: a quote is not closed in '{text}'")
    axes, fields = list[list[Setting]](), list[str]()
    for part in filter(str.strip, _split(text, ";")):
        left, equals, right = part.partition("=")
        paths = [path.strip() for path in left.split("&")]
        if not equals:
            raise UserError(f"--grid: '{part.strip()}' has no values; it takes field=value,value; field=value,...")
        axis: list[Setting] = []
        for item in _split(right, ","):
            texts = _split(item, "&")
            if len(texts) != len(paths):
                raise UserError(
                    f"--grid: '{item.strip()}' gives {len(texts)} of the {len(paths)} values of {left.strip()}; "
                    "it takes & between them"
                )
            setting = dict(zip(paths, map(_value, paths, texts), strict=True))
            if setting in axis:
                raise UserError(f"--grid: {said(setting)} is there twice")
            axis.append(setting)
        axes.append(axis)
        fields += paths
    if not fields:
        raise UserError("--grid is missing; it takes field=value,value; ... such as 'optimizer.name=adamw,muon'")
    if twice := [path for path in fields if fields.count(path) > 1]:
        raise UserError(f"--grid: {twice[0]} is there twice")
    if "seed" in fields:
        raise UserError("--grid: seed is not a setting, but what a setting is repeated with; use --seeds=3")
    return [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*axes)]


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text; what is in double quotes stays together."""
    return re.split(rf'{separator}(?=(?:[^"]*"[^"]*")*[^"]*$)', text)


def _value(path: str, text: str) -> Any:
    text = re.sub(r'^"(.*)"$', r"\1", text.strip(), flags=re.DOTALL)
    try:
        kind, optional = config_lib.field_type(path)
        return None if optional and text.lower() == "none" else config_lib.parse(kind, path, text)
    except UserError as e:
        raise UserError(f"--grid: {e}") from e


def said(setting: Setting) -> str:
    """A setting for a person."""
    return ", ".join(f"{path}={spelt(value)}" for path, value in setting.items())


def spelt(value: Any) -> str:
    """A value as the command line takes it."""
    return "none" if value is None else str(value)


def folder_name(setting: Setting, seed: int) -> str:
    """A name that says the values and is that of no others, whatever characters are in them."""
    parts = [f"{path}-{spelt(value)}" for path, value in sorted(setting.items())] + [f"seed-{seed}"]
    exact, plain = "+".join(parts), "+".join(re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII) for part in parts)
    if plain != exact or len(plain) > 200:
        plain = f"{plain[:180]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return plain
