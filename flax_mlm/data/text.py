"""Cutting text."""

from collections.abc import Iterator


def cut(text: str, limit: int) -> Iterator[str]:
    """Cuts text into strings of at most `limit` characters, before whitespace where there is any.

    The strings, joined, are the text again.
    """
    start = 0
    while len(text) - start > limit:
        space = max(text.rfind(" ", start + 1, start + limit + 1), text.rfind("\n", start + 1, start + limit + 1))
        end = space if space > start else start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
