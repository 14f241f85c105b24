"""Making a corpus: documents -> tokenizer -> packed rows on disk.

Killed at any moment and started again, `prepare` continues, and ends with the same bytes, which do not depend on the
number of workers either. Unfinished work is kept in OUTPUT.tmp, which is removed at the end.
"""

import contextlib
import fcntl
import io
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config, TokenizerConfig
from flax_mlm.data import sources, units
from flax_mlm.data.corpus import FORMAT, MANIFEST, Corpus, row_dtype, write_manifest
from flax_mlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_mlm.data.text import cut
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import files

Log = Callable[[str], None]

_SECONDS = 10.0  # between lines about progress
_WARNED_FRACTION = 0.01  # of unknown tokens
_LINE_CHARS = 2000  # SentencePiece drops training lines of more than max_sentence_length bytes


def prepare(config: Config, output: str | Path | None = None, log: Log = print) -> Corpus:
    """Makes the corpus that a config describes, or opens it where it is made already.

    It starts processes that import the main module, so a script that calls it needs `if __name__ == "__main__":`.

    Args:
      output: folder of the corpus; None: one in `data.cache_dir`, named after the source and a hash of the settings.
      log: called with each line about the progress.

    Raises:
      UserError: the source cannot be read, or `output` holds something else or cannot be written.
    """
    source = sources.open_source(config.data.source)
    request = _request(config, source)
    if output is None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[:40]
        output = Path(config.data.cache_dir) / f"{name}-{request[:16]}"
    if "://" in str(output):
        raise UserError(f"the output is {output}; expected a local folder, which you can copy there")
    output = Path(output).expanduser().absolute()
    work = output.with_name(output.name + ".tmp")
    try:
        if _is_done(output, request) and not work.exists():
            log(f"corpus: {output}, already prepared")
            return Corpus.open(output)
        with _lock(work, log):
            try:
                if not _is_done(output, request):  # another process may have made it during the wait for the lock
                    _build(config, source, request, output, work / request[:16], log)
            except UserError:
                if not any(work.glob("*/units/*.json")):  # only finished units are worth keeping
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}; fix this and rerun; finished work is reused") from e
    return Corpus.open(output)


def _request(config: Config, source: sources.Source) -> str:
    """Hashes all that decides the bytes of the corpus."""
    d, t = config.data, config.tokenizer
    tokenizer: Any = [t.model_type, t.vocab_size, t.normalization, t.character_coverage, t.sample_bytes]
    if t.path:
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file).fingerprint
    return files.digest([FORMAT, source.version, tokenizer, d.seq_len, d.packing, d.validation_fraction])


def _is_done(output: Path, request: str) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).exists():
        raise UserError(f"the output, {output}, exists and is not a corpus; name another folder")
    if Corpus.open(output).manifest["request"] != request:
        raise UserError(f"{output} holds a corpus of other text or settings; name another folder, or delete that one")
    return True


@contextlib.contextmanager
def _lock(work: Path, log: Log) -> Iterator[None]:
    """Makes the work folder, and locks out other processes until the block ends."""
    with contextlib.suppress(FileNotFoundError):
        for path in work.iterdir():
            if not re.fullmatch("lock|[0-9a-f]{16}", path.name):
                raise UserError(f"{path} is not ours, and its folder is for unfinished work; move it away")
    while True:
        work.mkdir(parents=True, exist_ok=True)
        # The last owner of the lock may have finished, and be removing the folder.
        with contextlib.suppress(FileNotFoundError):
            file = (work / "lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"another process is at work in {work}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), (work / "lock").stat()):
                break
    with file:
        yield


def _build(config: Config, source: sources.Source, request: str, output: Path, work: Path, log: Log) -> None:
    """Makes the corpus in the work folder and renames it to `output`."""
    log(f"source: {source.name}; licence: {source.licence}")
    data, counts, undecodable = config.data, Counter[str](), Counter[str]()
    source.check()
    sources.check_fraction(source, data.validation_fraction)
    work.mkdir(exist_ok=True)
    tokenizer = _tokenizer(config, source, work / "tokenizer", log)
    if config.objective.name != "clm":
        tokenizer.require_words(config.objective.masking)
    chunks = _with_progress("tokenising", source, counts, undecodable, log)
    splits, unknown = units.make_units(chunks, work, tokenizer, data, log)
    for name, split in splits.items():
        if not split["rows"]:
            raise UserError(f"data.source is '{data.source}'; its {name} documents hold no text")

    folder = work / "corpus"
    tokenizer.save(folder)
    about = {"file": tokenizer.filename, "size": len(tokenizer.content), "sha256": tokenizer.fingerprint}
    manifest = {
        "format": FORMAT,
        "request": request,
        "source": {"name": source.name, "licence": source.licence, "counts": dict(sorted(counts.items()))},
        "tokenizer": about | {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id},
        "seq_len": data.seq_len,
        "packing": data.packing,
        "validation_fraction": data.validation_fraction,
        "dtype": row_dtype(tokenizer.vocab_size).name,
        "splits": splits,
    }
    write_manifest(folder, manifest)
    folder.rename(output)
    _log_summary(manifest, log)
    _log_lost_text(splits, counts, undecodable, unknown, tokenizer.tokens[tokenizer.unk_id], log)
    log(f"corpus: {output}")


def _log_summary(manifest: dict[str, Any], log: Log) -> None:
    """Logs the size of a corpus."""
    for name, s in manifest["splits"].items():
        text = f"{s['documents']:,} documents, {s['words']:,} words, {s['bytes']:,} bytes, {s['tokens']:,} tokens"
        padding = s["padding"] / (s["rows"] * manifest["seq_len"])
        log(f"{name}: {text} ({s['tokens'] / s['bytes']:.3f} per byte), {s['rows']:,} rows, {padding:.2%} padding")


def _log_lost_text(
    splits: dict[str, Any],
    counts: Counter[str],
    undecodable: Counter[str],
    unknown: Counter[str],
    unknown_token: str,
    log: Log,
) -> None:
    """Logs which fraction of the text is lost, and warnings with the files that lose most.

    Args:
      counts: of `Source.chunks`.
      undecodable: file -> bytes that were replaced.
      unknown: file -> unknown tokens.
    """
    num_tokens, num_bytes = (sum(s[key] for s in splits.values()) for key in ("tokens", "bytes"))
    lost_tokens, lost_bytes = unknown.total() / num_tokens, min(1.0, counts["undecodable_bytes"] / num_bytes)
    log(f"text: {lost_tokens:.2%} of the tokens are unknown, {lost_bytes:.2%} of the bytes were no UTF-8")
    if lost_tokens >= _WARNED_FRACTION:
        what = f"the tokenizer has no tokens for {lost_tokens:.0%} of the text, which becomes {unknown_token}"
        log(f"warning: {what}{_most(unknown)}; use a tokenizer made for this text (tokenizer.path)")
    if counts["undecodable_bytes"]:
        where = f" in {counts['undecodable_files']:,} files" if counts["undecodable_files"] else ""
        what = f"{counts['undecodable_bytes']:,} bytes{where} were not UTF-8 and became U+FFFD{_most(undecodable)}"
        log(f"warning: {what}; convert such files, as with iconv -f LATIN1 -t UTF-8")
    if counts["nul_bytes"]:
        log(f"warning: {counts['nul_bytes']:,} NUL bytes; UTF-16 is recognised by its byte-order mark alone")
    if counts["wikiextractor_tags"]:
        what = f"{counts['wikiextractor_tags']:,} lines are WikiExtractor's tags <doc ...>, which are taken for text"
        log(f"warning: {what}; use `wikiextractor --json` and jsonl:GLOB")
    for kind in ("empty_files", "empty_documents"):
        if counts[kind]:
            log(f"warning: {counts[kind]:,} {kind.replace('_', ' ')}")


def _most(by_file: Counter[str]) -> str:
    names = [file for file, _ in by_file.most_common(3) if file]
    return f", most in {', '.join(names)}" if names else ""


def _tokenizer(config: Config, source: sources.Source, folder: Path, log: Log) -> Tokenizer:
    """Returns the given tokenizer, or trains one, and keeps it in a folder: a kill does not cost the work."""
    t = config.tokenizer
    if folder.exists():
        log("tokenizer: made before, used again")
        return load_tokenizer(folder)
    if t.path:
        log(f"tokenizer: {t.path}{f' with the words of {t.extra_tokens_file}' * bool(t.extra_tokens_file)}")
        tokenizer = load_tokenizer(t.path, t.extra_tokens_file)
    else:
        chunks = _with_progress("sampling text", source, Counter(), Counter(), log)
        training_texts = (chunk.text for chunk in chunks if chunk.hash >= config.data.validation_fraction)
        sample = _sample(training_texts, t.sample_bytes)
        size = sum(len(text.encode()) for text in sample)
        log(f"tokenizer: training {t.model_type}, vocabulary {t.vocab_size:,}, on {size:,} bytes")
        start = time.monotonic()
        tokenizer = train_tokenizer(sample, t)
        log(f"tokenizer: trained in {time.monotonic() - start:.1f} s")
    new = folder.with_suffix(".new")
    new.mkdir(exist_ok=True)
    tokenizer.save(new)
    new.rename(folder)
    return tokenizer


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Samples at most `max_bytes` of text: every text, or every 2nd, 4th, 8th ... of them."""
    kept: list[str] = []
    total, every = 0, 1
    for n, text in enumerate(texts):
        if n % every == 0:
            kept.append(text)
            total += len(text.encode())
        while total > max_bytes and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            total = sum(len(t.encode()) for t in kept)
    return kept


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a SentencePiece model; the same texts and config give the same bytes on any machine.

    Raises:
      UserError: the text does not support a vocabulary of this size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization,
            byte_fallback=True,
            max_sentence_length=4 * _LINE_CHARS,  # bytes
            # As control symbols, no text can spell them. num_threads is left alone: it is recorded in the model.
            pad_id=0, pad_piece="[PAD]", unk_id=1, unk_piece="[UNK]",
            bos_id=2, bos_piece="[CLS]", eos_id=3, eos_piece="[SEP]", control_symbols=["[MASK]"],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        if match := re.search(r"value <= (\d+)", str(e)):
            limit = f"at most {match[1]}"
        elif match := re.search(r"(\d+) vs (\d+)", str(e)):
            limit = f"at least {match[2]}"
        else:
            raise UserError(f"no tokenizer can be trained: the training text is empty ({e})") from e
        raise UserError(f"tokenizer.vocab_size is {config.vocab_size}; expected {limit} for this text") from e
    return SentencePieceTokenizer(model.getvalue(), "the trained tokenizer")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            # SentencePiece drops lines with U+2585, which it uses as a mark.
            yield from cut(line.replace("\u2585", " "), _LINE_CHARS)


def _with_progress(
    title: str, source: sources.Source, counts: Counter[str], undecodable: Counter[str], log: Log
) -> Iterator[sources.TextChunk]:
    """Reads the chunks of a source, with a bar on a terminal and a line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    has_bar = sys.stderr.isatty()
    start = last = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not has_bar) as bar:
        task = bar.add_task(title, total=source.size)
        for chunk in source.chunks(counts, undecodable):
            if has_bar:
                bar.update(task, completed=counts["read"])
            elif (now := time.monotonic()) - last > _SECONDS:
                last, fraction = now, counts["read"] / max(source.size, 1)
                left = (now - start) * (1 / fraction - 1) if fraction else float("inf")
                log(f"{title}: {fraction:.0%}, {left:.0f} s left")
            yield chunk
