"""Showing how much of a source is read."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from flax_mlm.data.sources import Source, TextChunk

_SECONDS = 10.0  # between lines


def with_progress(title: str, source: Source, counts: Counter[str], log: Callable[[str], None]) -> Iterator[TextChunk]:
    """Reads the chunks of a source, with a bar on a terminal and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=source.size)
            for chunk in source.chunks(counts):
                bar.update(task, completed=counts["read"])
                yield chunk
        return
    start = last = time.monotonic()
    for chunk in source.chunks(counts):
        if (now := time.monotonic()) - last > _SECONDS:
            last = now
            fraction = counts["read"] / max(source.size, 1)
            left = (now - start) * (1 / fraction - 1) if fraction else float("inf")
            log(f"{title}: {fraction:.0%}, {left:.0f} s left")
        yield chunk
