"""The interface of all tokenizers, and the tables of their vocabularies."""

import abc
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from flax_mlm.data.words import WordMarks
from flax_mlm.errors import UserError

MASK_TEXT = "[MASK]"  # how texts of users spell a mask, whatever the vocabulary calls it

SPECIAL_TOKENS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


_NEEDED = ("pad", "cls", "sep", "mask")


def is_special_spelling(token: str) -> bool:
    return any(token in spellings for spellings in SPECIAL_TOKENS.values())


class Tokenizer(abc.ABC):
    """A vocabulary of V tokens, and the rule that cuts text into them.

    Attributes:
      filename: `tokenizer.model` or `tokenizer.json`.
      content: the bytes of that file.
      fingerprint: SHA-256 of that file, as hex.
      tokens: the V tokens as the library spells them.
      pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens. Without an unknown token, a mask stands for
        what has no token.
      is_special: bool (V,), the five above and every other token that stands for no text.
      starts_word: bool (V,), tokens that begin a word; special tokens do.
      ends_word: bool (V,), tokens after which a word begins.
      marks_words: whether the vocabulary marks words; otherwise each token counts as one.
      added_words: id -> word of the words that were added to the vocabulary (`tokenizer.extra_tokens_file`). Each is
        found where no letter, digit or underscore stands beside it, and the space before it belongs to it.
      num_threads: threads that `encode` uses; 0: one per core.
    """

    filename: str
    added_words: dict[int, str]

    def __init__(
        self,
        content: bytes,
        tokens: list[str],
        special_ids: set[int],
        marks: WordMarks,
        path: str,
        roles: Mapping[str, str] = {},
    ):
        """Builds the tables of the vocabulary.

        Args:
          special_ids: ids of tokens that stand for no text, besides the five special ones.
          path: names the tokenizer in errors.
          roles: role -> token, for special tokens that are not spelled as in `SPECIAL_TOKENS`.
        """
        self.content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.num_threads = 0
        self.tokens = tokens
        ids = {token: i for i, token in enumerate(tokens)}
        spellings = {**SPECIAL_TOKENS, **{role: (token,) for role, token in roles.items()}}
        found = {role: [ids[token] for token in names if token in ids] for role, names in spellings.items()}
        if missing := [role for role in _NEEDED if not found[role]]:
            what = ", no ".join(f"{' or '.join(spellings[role])} token" for role in missing)
            fields = ", ".join(f"{role}_token" for role in missing)
            raise UserError(f"{path} has no {what}; name such tokens in tokenizer_config.json beside it as {fields}")
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = distinct = [found[role][0] for role in _NEEDED]
        self.unk_id = (found["unk"] or [self.mask_id])[0]
        if shared := [tokens[i] for i in distinct if distinct.count(i) > 1]:
            raise UserError(f"{path} has one token, {shared[0]}, for two of pad, cls, sep and mask; each needs its own")
        self.is_special = np.isin(np.arange(len(tokens)), [*special_ids, *distinct, self.unk_id])
        self.starts_word, self.ends_word = marks.tables(tokens)
        has_begin = bool(marks.begins) and bool(self.starts_word[~self.is_special].any())
        self.marks_words = has_begin or bool(marks.continues or marks.ends or marks.are_words)
        self.starts_word |= self.is_special

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return len(self.tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file into a folder."""
        (epath.Path(folder) / self.filename).write_bytes(self.content)

    def require_words(self, masking: str) -> None:
        """Raises UserError where `objective.masking` needs word boundaries, and the vocabulary marks none."""
        if masking == "whole_word" and not self.marks_words:
            what = "no token has a mark of words, such as ▁, Ġ, ## or </w>"
            raise UserError(f"objective.masking is whole_word; expected token or span with this tokenizer: {what}")

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Returns bool (..., L), the first tokens of the words in int (..., L)."""
        return self.starts_word[ids] | np.roll(self.ends_word[ids], 1, axis=-1)

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text as int32 ids, without adding special tokens; text that spells one stays text."""

    def split_masks(self, text: str) -> list[str]:
        """Splits a text at its masks, `[MASK]` or the vocabulary's own, which are the odd ones of the parts."""
        return re.split(f"({re.escape(MASK_TEXT)}|{re.escape(self.tokens[self.mask_id])})", text)

    def encode_with_mask(self, text: str) -> list[int]:
        """Encodes a text in which `[MASK]`, or the vocabulary's own mask, stands for one token.

        As in transformers, a space before it belongs to that token where the tokenizer says so, and stays else.
        """
        parts = self.split_masks(text)
        parts[1::2] = [MASK_TEXT] * (len(parts) // 2)
        return self._encode_with_mask("".join(parts))

    @abc.abstractmethod
    def _encode_with_mask(self, text: str) -> list[int]:
        """Encodes a text in which `[MASK]` stands for one token."""

    @property
    def mask_takes_space(self) -> bool:
        """True where the space before a mask belongs to the masked token."""
        return True

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, leaving out special tokens."""

    @abc.abstractmethod
    def extended(self, words: Iterable[str]) -> bytes:
        """Returns the content of a tokenizer file with a token for each of the words that has none yet.

        The token stands for the word alone, not for the beginning of a longer one.
        """

    @abc.abstractmethod
    def _encode_after(self, texts: Sequence[str], spaced: bool) -> list[np.ndarray]:
        """Encodes texts that follow another token, after a space or without one."""

    @property
    def pair_separators(self) -> int:
        """Number of [SEP] between the two texts of a pair."""
        return 1

    @property
    def puts_ends(self) -> bool:
        """True where the library itself puts [CLS] before a text and [SEP] after it, as is always done here."""
        return True

    def encode_words(self, words: Sequence[str]) -> list[np.ndarray]:
        """Encodes each word, as it stands after a space, to int32 ids."""
        return self._encode_after(words, spaced=True)

    def encode_answer(self, word: str, text: str) -> list[int]:
        """Encodes a word as it would stand in place of the mask of a text, with the space that belongs to the mask."""
        before = self.split_masks(text)[0]
        spaced = self.mask_takes_space and before[-1:].isspace()
        ids = self._encode_after([word], spaced) if before else self.encode([word])
        return ids[0].tolist()
