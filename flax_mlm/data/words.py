"""Word boundaries: which tokens of a vocabulary begin or end a word, and text in scripts that put no spaces."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LEADS = range(0xE4, 0xEA)  # first bytes of ideographs in UTF-8, and of next to nothing else
# Thai to Tibetan, Myanmar, Khmer, Tai, Balinese, kana, Javanese and more Myanmar, halfwidth kana.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f"
    "\u3041-\u30ff\u31f0-\u31ff\ua980-\ua9ff\uaa60-\uaa7f\uff66-\uff9d]"
)


class WordMarks(NamedTuple):
    """How a vocabulary marks words. Without any mark, every token counts as a word.

    Attributes:
      begins: characters one of which begins a token that begins a word.
      continues: prefix of tokens that continue a word.
      ends: suffix of tokens that end a word.
      is_byte_level: the characters of tokens stand for bytes, as in GPT-2.
      are_words: tokens are whole words.
    """

    begins: str = ""
    continues: str = ""
    ends: str = ""
    is_byte_level: bool = False
    are_words: bool = False

    def tables(self, tokens: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns bool (V,), tokens that begin a word, and bool (V,), tokens after which one begins.

        An ideograph is a word, as in BERT's basic tokenizer.
        """
        starts, ends = [], []
        for token in tokens:
            is_end = bool(self.ends) and token.endswith(self.ends)
            if self.begins:
                is_start = token.startswith(tuple(self.begins))
            elif self.continues:
                is_start = not token.startswith(self.continues)
            else:
                is_start = not self.ends
            bare = token.removeprefix(self.continues).removesuffix(self.ends).lstrip(self.begins)
            if not bare.isascii() or bare.startswith("<0x"):
                data = self._bytes(bare)
                text = data.decode(errors="replace")
                is_start |= bool(_IDEOGRAPH.match(text)) or (text[:1] == "\ufffd" and data[0] in _LEADS)
                is_end |= bool(_IDEOGRAPH.match(text[-1:]))
            starts.append(is_start)
            ends.append(is_end)
        return np.array(starts, bool), np.array(ends, bool)

    def spell(self, word: str, spaced: bool) -> str:
        """Spells a whole word as a token of the vocabulary, after a space or without one."""
        if self.is_byte_level:
            word = "".join(_CHAR_OF[byte] for byte in word.encode())
        return self.begins[:1] * spaced + word + self.ends

    def _bytes(self, token: str) -> bytes:
        """Returns the bytes of a token without marks; a token may end inside a character."""
        if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(match[1])
        if self.is_byte_level and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Returns the characters that stand for bytes in GPT-2's vocabulary: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_CHAR_OF = {byte: char for char, byte in _BYTE_OF.items()}


def unspaced(texts: Iterable[str]) -> float:
    """Returns the fraction of the characters that belong to scripts without spaces between words."""
    characters = "".join("".join(texts).split())
    return len(_UNSPACED.findall(characters)) / max(len(characters), 1)


def stands_alone(word: str) -> bool:
    """Returns whether a text separates a word from others, unlike words of ideographs, kana, Thai and the like."""
    return not all(_UNSPACED.match(char) or _IDEOGRAPH.match(char) for char in word)
