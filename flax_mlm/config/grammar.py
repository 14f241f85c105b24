"""The tokenizer shared by `train.phases`, `data.corpus`, `--grid` and `--tasks`.

All four are lists separated by `;`, `,` or `&`. A separator inside double quotes is ordinary text, and so is a quote
that is never closed.
"""

import re


def split(text: str, separator: str) -> list[str]:
    """Splits a text at a one-character separator outside double quotes, and strips the parts."""
    parts = [""]
    for token in re.findall(rf'"[^"]*"|"|{separator}|[^"{separator}]+', text):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def unquote(text: str) -> str:
    """Removes the double quotes around a text, if there are any."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
