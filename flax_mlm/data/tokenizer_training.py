"""Training a tokenizer on a sample of a source."""

import io
import re
from collections.abc import Callable, Iterable, Iterator

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_mlm.data.sources.base import Source, TextChunk
from flax_mlm.data.text import cut
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError

_LINE_CHARS = 2000  # SentencePiece drops training lines of more than max_sentence_length bytes
_READ_FACTOR = 8  # as much of a unit as this times what is kept of it is read


def sample(
    source: Source, validation_fraction: float, max_bytes: int, progress: Callable[[int], None] = lambda size: None
) -> list[str]:
    """Samples at most `max_bytes` of text from the training documents, spread over all units in proportion to their
    sizes, and in each over what is at most `_READ_FACTOR` times as much."""

    def texts() -> Iterator[str]:
        finished = 0
        for unit in source.units:
            limit = max(1, max_bytes * unit.size // max(source.size, 1))
            yield from thinned(_first(unit.chunks(), validation_fraction, limit), limit)
            progress(finished := finished + unit.size)

    return thinned(texts(), max_bytes)


def _first(chunks: Iterable[TextChunk], validation_fraction: float, limit: int) -> Iterator[str]:
    """Reads the beginning of a unit."""
    left = _READ_FACTOR * limit
    for chunk in chunks:
        if chunk.hash >= validation_fraction:
            yield from cut(chunk.text, max(limit, _LINE_CHARS))
        left -= len(chunk.text)
        if left <= 0:
            return


def thinned(texts: Iterable[str], max_bytes: int) -> list[str]:
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
