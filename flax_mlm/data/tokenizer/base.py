"""Interface that all tokenizers share."""

import abc
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from flax_mlm.errors import UserError

MASK_TEXT = "[MASK]"  # how texts of users spell a mask, whatever the vocabulary calls it

SPECIAL_TOKENS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def is_special_spelling(token: str) -> bool:
    return any(token in spellings for spellings in SPECIAL_TOKENS.values())


class Tokenizer(abc.ABC):
    """A vocabulary of V tokens, and the rule that cuts text into them.

    Attributes:
      filename: `tokenizer.model` or `tokenizer.json`.
      content: the bytes of that file.
      fingerprint: SHA-256 of that file, as hex.
      tokens: the V tokens as the library spells them.
      pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
      is_special: bool (V,), the five above and every other token that stands for no text.
      starts_word: bool (V,), tokens that begin a word; special tokens do.
      num_threads: threads that `encode` uses; 0: one per core.
    """

    filename: str

    def __init__(self, content: bytes, tokens: list[str], special_ids: set[int], word_mark: str, path: str):
        """Builds the tables of the vocabulary.

        Args:
          special_ids: ids of tokens that stand for no text, besides the five special ones.
          word_mark: characters one of which begins a token that begins a word; or `^` and the prefix of tokens that
            continue a word; empty: every token begins a word.
          path: names the tokenizer in errors.
        """
        self.content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.num_threads = 0
        self.tokens = tokens
        ids = {token: i for i, token in enumerate(tokens)}

        def find(name: str) -> int:
            spellings = SPECIAL_TOKENS[name]
            if found := [ids[spelling] for spelling in spellings if spelling in ids]:
                return found[0]
            raise UserError(f"{path} has no {' or '.join(spellings)} token; masked-LM training needs one")

        own = self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = tuple(map(find, SPECIAL_TOKENS))
        self.is_special = np.isin(np.arange(len(tokens)), [*special_ids, *own])
        if word_mark.startswith("^"):
            starts = [not token.startswith(word_mark[1:]) for token in tokens]
        else:
            starts = [token.startswith(tuple(word_mark)) or not word_mark for token in tokens]
        self.starts_word = np.array(starts) | self.is_special

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return len(self.tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file into a folder."""
        (epath.Path(folder) / self.filename).write_bytes(self.content)

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text as int32 ids, without adding special tokens; text that spells one stays text."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, leaving out special tokens."""

    @abc.abstractmethod
    def extended(self, words: Iterable[str]) -> bytes:
        """Returns the content of a tokenizer file with a token for each of the words that has none yet."""

    @abc.abstractmethod
    def _encode_continued(self, text: str) -> list[int]:
        """Encodes text that follows another token without a space."""

    @functools.cached_property
    def _space_counts(self) -> bool:
        """True where a word begins with its mark only after a space (byte-level BPE)."""
        bare, spaced = (bool(self.starts_word[ids[:1]].all()) for ids in self.encode(["a", " a"]))
        return spaced and not bare

    def encode_words(self, words: Sequence[str]) -> list[np.ndarray]:
        """Encodes each word, as it stands after a space, to int32 ids."""
        return self.encode([f" {word}" for word in words] if self._space_counts else words)

    def encode_answer(self, word: str, text: str) -> list[int]:
        """Encodes a word as it would stand in place of the `[MASK]` of a text, with the space before it, if any."""
        before = text.partition(MASK_TEXT)[0]
        if before and not before[-1].isspace():
            return self._encode_continued(word)
        return (self.encode_words if before else self.encode)([word])[0].tolist()

    def encode_with_mask(self, text: str) -> list[int]:
        """Encodes a text in which `[MASK]` stands for one token; a space before it belongs to that token."""
        ids: list[int] = []
        *masked, last = text.split(MASK_TEXT)
        for i, part in enumerate([*(part.rstrip() for part in masked), last]):
            ids += [self.mask_id] if i else []
            if part.strip():
                continued = i > 0 and not part[0].isspace()
                ids += self._encode_continued(part) if continued else self.encode([part])[0].tolist()
        return ids
