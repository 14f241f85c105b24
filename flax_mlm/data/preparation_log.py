"""Lines of `prepare`: its progress, the size of the corpus, and which text was lost."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from flax_mlm.data.sources.columns import LOST
from flax_mlm.data.units import Totals

Log = Callable[[str], None]

_SECONDS = 10.0  # between lines about progress
_WARNED_FRACTION = 0.01  # of unknown tokens


@contextlib.contextmanager
def progress(title: str, total: int, log: Log) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, and a line every ten seconds elsewhere.

    Yields:
      A function to call with how many of the `total` bytes are done.
    """
    from rich.console import Console
    from rich.progress import Progress

    has_bar = sys.stderr.isatty()
    start = last = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not has_bar) as bar:
        task = bar.add_task(title, total=total)

        def show(size: int) -> None:
            nonlocal last
            if has_bar:
                bar.update(task, completed=size)
            elif (now := time.monotonic()) - last > _SECONDS:
                last, fraction = now, size / max(total, 1)
                left = (now - start) * (1 / fraction - 1) if fraction else float("inf")
                log(f"{title}: {fraction:.0%}, {left:.0f} s left")

        yield show


def log_summary(manifest: dict[str, Any], log: Log) -> None:
    """Logs the size of a corpus."""
    for name, s in manifest["splits"].items():
        text = f"{s['documents']:,} documents, {s['words']:,} words, {s['bytes']:,} bytes, {s['tokens']:,} tokens"
        padding = s["padding"] / (s["rows"] * manifest["seq_len"])
        log(f"{name}: {text} ({s['tokens'] / s['bytes']:.3f} per byte), {s['rows']:,} rows, {padding:.2%} padding")


def log_lost_text(totals: Totals, unknown_token: str, log: Log) -> None:
    """Logs which fraction of the text is lost, and warnings with the files that lose most."""
    counts, by_file = totals.counts, totals.by_file
    num_tokens, num_bytes = (sum(s[key] for s in totals.splits.values()) for key in ("tokens", "bytes"))
    lost_tokens, lost_bytes = totals.unknown.total() / num_tokens, min(1.0, counts["undecodable_bytes"] / num_bytes)
    log(f"text: {lost_tokens:.2%} of the tokens are unknown, {lost_bytes:.2%} of the bytes could not be decoded")
    if lost_tokens >= _WARNED_FRACTION:
        what = f"the tokenizer has no tokens for {lost_tokens:.0%} of the text, which becomes {unknown_token}"
        log(f"warning: {what}{_most(totals.unknown)}; use a tokenizer made for this text (tokenizer.path)")
    if counts["undecodable_bytes"]:
        named = [file for file in by_file["undecodable_bytes"] if file]
        where = f" in {len(named):,} files" if named else ""
        what = f"{counts['undecodable_bytes']:,} bytes{where} could not be decoded and became U+FFFD"
        log(f"warning: {what}{_most(by_file['undecodable_bytes'])}; name their encoding, as in data.encoding=latin1")
    if counts["nul_bytes"]:
        what = f"{counts['nul_bytes']:,} NUL bytes{_most(by_file['nul_bytes'])}"
        log(f"warning: {what}; UTF-16 is recognised by its byte-order mark alone")
    if counts["wikiextractor_tags"]:
        what = f"{counts['wikiextractor_tags']:,} lines are WikiExtractor's tags <doc ...>, which are taken for text"
        log(f"warning: {what}; use wikiextractor:GLOB")
    for kind, meaning in LOST.items():
        if counts[kind]:
            log(f"warning: {counts[kind]:,} {meaning}{_most(by_file[kind])}")
    if counts["comment_lines"]:
        log(f"{counts['comment_lines']:,} comment lines (;) were left out")
    for kind in ("empty_files", "empty_documents", "lines_outside_documents"):
        if counts[kind]:
            log(f"warning: {counts[kind]:,} {kind.replace('_', ' ')}{_most(by_file[kind])}")


def _most(by_file: Counter[str]) -> str:
    names = [file for file, _ in by_file.most_common(3) if file]
    return f", most in {', '.join(names)}" if names else ""
