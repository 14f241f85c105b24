"""Vocabularies of symbols, such as amino acids or event codes: single characters, or what stands between whitespace.

All documents are read. Where none has whitespace in it, each character is a symbol. The vocabulary has the symbols of
the training documents, the most frequent ones first, in a tokenizer.json that needs no code of ours.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_mlm.data.base_tokenizer import SPECIAL_TOKENS, is_special_spelling
from flax_mlm.data.json_tokenizer import CHARACTERS, HuggingFaceTokenizer
from flax_mlm.data.sources.base import Source, TextChunk
from flax_mlm.errors import UserError

MAX_SYMBOLS = 1_000_000  # different ones that are counted, and with
MAX_CHARS = 1 << 26  # characters in all
_BATCH_CHARS = 1 << 20
_SPECIAL = [SPECIAL_TOKENS[role][0] for role in ("pad", "unk", "cls", "sep", "mask")]


class Symbols:
    """Counts the symbols of texts, in bounded memory, both as characters and between whitespace."""

    def __init__(self) -> None:
        self.documents = self.separated = 0  # all of them, and those that have whitespace in them
        self.first = ""  # a text with whitespace
        self._characters = np.zeros(0x110000, np.int64)
        self._batch: list[str] = []
        self._batch_chars = 0
        self._words: Counter[str] | None = Counter()  # None: there are too many
        self._word_chars = 0

    def add(self, chunk: TextChunk, is_counted: bool) -> bool:
        """Adds a chunk, and counts its symbols if `is_counted`; returns whether it has whitespace in it."""
        parts = chunk.text.split()
        if len(parts) > 1 and not self.first:
            self.first = f"'{' '.join(parts)[:40]}'" + f" in {chunk.file}" * bool(chunk.file)
        if is_counted:
            self._batch.append(chunk.text)
            self._batch_chars += len(chunk.text)
            if self._batch_chars >= _BATCH_CHARS:
                self._count_characters()
            self._count_words(parts)
        return len(parts) > 1

    def _count_words(self, parts: list[str]) -> None:
        if self._words is not None:
            self._word_chars += sum(len(part) for part in set(parts) if part not in self._words)
            self._words.update(parts)
            if len(self._words) > MAX_SYMBOLS or self._word_chars > MAX_CHARS:
                self._words = None

    def _count_characters(self) -> None:
        codes = np.frombuffer("".join(self._batch).encode("utf-32-le"), np.uint32)
        self._characters += np.bincount(codes, minlength=len(self._characters))
        self._batch, self._batch_chars = [], 0

    def counts(self) -> Counter[str]:
        """Returns how often each symbol occurs.

        Raises:
          UserError: there are no symbols, or too many that are separated by whitespace.
        """
        if self.separated and self._words is None:
            what = f"tokenizer.model_type is symbols, and the text has more than {MAX_SYMBOLS:,} different symbols"
            how = f"which whitespace separates, as in {self.first}"
            raise UserError(f"{what}, {how}; expected few; remove the whitespace, or use tokenizer.model_type=bpe")
        if self.separated:
            counts = Counter(self._words)
        else:
            self._count_characters()
            present = np.flatnonzero(self._characters).tolist()
            counts = Counter({chr(i): int(self._characters[i]) for i in present if not chr(i).isspace()})
        if not counts:
            raise UserError("tokenizer.model_type is symbols, and the training documents hold none")
        return counts


def count_symbols(
    source: Source, validation_fraction: float, progress: Callable[[int], None] = lambda size: None
) -> Symbols:
    """Counts the symbols of a source's training documents."""
    symbols = Symbols()
    finished = 0
    for unit in source.units:
        numbers = Counter[str]()
        for _, chunks in itertools.groupby(unit.chunks(numbers), lambda chunk: chunk.document):
            symbols.documents += 1
            symbols.separated += any([symbols.add(chunk, chunk.hash >= validation_fraction) for chunk in chunks])
            progress(finished + numbers["read"])
        finished += unit.size
    return symbols


def make_tokenizer(symbols: Symbols, vocab_size: int, log: Callable[[str], None]) -> HuggingFaceTokenizer:
    """Makes a tokenizer of at most `vocab_size` tokens; symbols without a token become [UNK].

    Raises:
      UserError: there are no symbols, or too many, or there is no room for one.
    """
    counts = symbols.counts()
    if vocab_size <= len(_SPECIAL):
        what = f"expected at least {len(_SPECIAL) + 1}, as {len(_SPECIAL)} tokens are special"
        raise UserError(f"tokenizer.vocab_size is {vocab_size}; {what}")
    if symbols.separated:
        kind = "between whitespace"
        if symbols.separated < symbols.documents / 2:
            what = f"only {symbols.separated:,} of {symbols.documents:,} documents have whitespace in them"
            log(f"warning: {what}, such as {symbols.first}; without it, each character would be a symbol")
    else:
        kind = "single characters, as no document has whitespace in it"
    kept = sorted(
        (symbol for symbol in counts if not is_special_spelling(symbol)), key=lambda symbol: (-counts[symbol], symbol)
    )[: vocab_size - len(_SPECIAL)]
    lost = counts.total() - sum(counts[symbol] for symbol in kept)
    log(f"tokenizer: {len(kept):,} symbols, {kind}")
    if lost:
        what = f"{len(counts) - len(kept):,} rarer or special symbols, {lost / counts.total():.2%} of the text"
        log(f"tokenizer: {what}, have no token and become {_SPECIAL[1]}; tokenizer.vocab_size is {vocab_size:,}")
    content = json.dumps(_spec(kept, not symbols.separated), ensure_ascii=False).encode()
    return HuggingFaceTokenizer(content, "the tokenizer of the symbols")


def _spec(symbols: list[str], are_characters: bool) -> dict[str, Any]:
    """Writes a vocabulary as the content of a tokenizer.json, which puts [CLS] and [SEP] around a text or a pair."""
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *symbols])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cls, sep = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("[CLS]", "[SEP]"))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    last = {"SpecialToken": {"id": "[SEP]", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in _SPECIAL],
        "normalizer": None,
        "pre_tokenizer": CHARACTERS if are_characters else CHARACTERS["pretokenizers"][0],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, first, sep],
            "pair": [cls, first, sep, second, last],
            "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "Fuse"} if are_characters else None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }
