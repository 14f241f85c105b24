"""SentencePiece models as a `Tokenizer`."""

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from flax_mlm.data.base_tokenizer import MASK_TEXT, Tokenizer, is_special_spelling
from flax_mlm.data.text import cut
from flax_mlm.data.words import WordMarks, stands_alone
from flax_mlm.errors import as_user_error

MAX_CHARS = 4096  # of a text encoded at once; SentencePiece's time per character grows with the length of the text
_CACHE_WORDS = 1 << 18  # about 50 MB
_CACHE_WORD_CHARS = 64  # longer words, such as a line of Chinese, hardly ever come again
_NEVER = -1e9  # score of a token that no merge of BPE should prefer


def model_proto() -> Any:
    """Returns the class of SentencePiece's message for a model."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as messages
    except Exception as e:
        # Apache Beam asks for an older protobuf than the messages were generated with. It reads them all the same, and
        # refuses them by its version alone.
        if type(e).__name__ != "VersionError":
            raise
        os.environ["TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"] = "true"
        from sentencepiece import sentencepiece_model_pb2 as messages
    return messages.ModelProto  # type: ignore[attr-defined]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or Unigram.

    A user-defined token that begins with ▁ is a word that `extended` added. SentencePiece would find it at the
    beginning of longer words too, so it is found here, and as a whole word only.
    """

    filename = "tokenizer.model"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `.model` file; `path` names it in errors."""
        from sentencepiece import SentencePieceProcessor

        proto = model_proto()()
        added: dict[str, int] = {}
        # protobuf's DecodeError and SentencePiece's RuntimeError have no useful base.
        with as_user_error(f"{path} is not a SentencePiece model: ", Exception):
            proto.ParseFromString(content)
            if not proto.pieces:
                raise ValueError("it has no pieces")
            for piece in proto.pieces:  # a user-defined [MASK] would match ordinary text
                if piece.type == piece.USER_DEFINED and is_special_spelling(piece.piece):
                    piece.type = piece.CONTROL
            special_ids = {i for i, p in enumerate(proto.pieces) if p.type in (p.UNKNOWN, p.CONTROL, p.UNUSED)}
            for i, piece in enumerate(proto.pieces):
                if piece.type == piece.USER_DEFINED and re.match("▁[^▁]", piece.piece):
                    piece.type, piece.score = piece.UNUSED, _NEVER
                    added[piece.piece[1:]] = i
            self._sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
            self._puts_space = proto.normalizer_spec.add_dummy_prefix
            proto.normalizer_spec.add_dummy_prefix = not self._puts_space
            other = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._after = {self._puts_space: self._sp, not self._puts_space: other}  # by whether a space is put in front
        marks = WordMarks(ends="▁") if proto.trainer_spec.treat_whitespace_as_suffix else WordMarks(begins="▁")
        super().__init__(content, [p.piece for p in proto.pieces], special_ids, marks, path)
        self.added_words = {i: word.replace("▁", " ") for word, i in added.items()}
        self.ends_word[list(added.values())] = bool(marks.ends)
        self._normalizes = bool(proto.normalizer_spec.precompiled_charsmap)
        self._added = {self._key(word): i for word, i in added.items()}
        self._found = self._pattern() if added else None
        # In nearly every model the tokens of a word depend on nothing else, and can be cached.
        self._words_are_independent = not any("▁" in token.lstrip("▁") for token in self.tokens) and all(
            self._sp.encode(f" a b{space}c ") == self._sp.encode("a") + self._sp.encode("b") + self._sp.encode("c")
            for space in (" ", "\n", "  ")
        )
        self._cache: dict[str, bytes] = {}  # word -> ids, int32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_around(text) for text in texts] if self._found else self._encode_plain(texts)

    def _encode_with_mask(self, text: str) -> list[int]:
        first, *others = re.split(rf"\s*{re.escape(MASK_TEXT)}", text)
        ids = self._encode_around(first).tolist()
        for part in others:
            ids += [self.mask_id, *self._encode_around(part, follows=True).tolist()]
        return ids

    def _encode_after(self, texts: Sequence[str], spaced: bool) -> list[np.ndarray]:
        if spaced and self._puts_space:
            return self.encode(texts)
        return [self._encode_around(f" {text}" if spaced else text, follows=True) for text in texts]

    def _normalized(self, text: str) -> str:
        """Normalizes a text; a space at its beginning stays."""
        if not self._normalizes:
            return text
        normalized = self._sp.normalize(text).replace("▁", " ")
        return " " * text[:1].isspace() + (normalized.removeprefix(" ") if self._puts_space else normalized)

    def _key(self, word: str) -> str:
        return " ".join(self._normalized(word).split())

    def _pattern(self) -> re.Pattern[str]:
        """Matches each added word, by itself where texts have spaces, with the space in front."""
        longest_first = sorted(self._added, key=len, reverse=True)
        each = (
            rf"(?<!\w){spelled}(?!\w)" if stands_alone(word) else spelled
            for word in longest_first
            for spelled in [r"\s+".join(map(re.escape, word.split()))]
        )
        return re.compile(rf"\s*({'|'.join(each)})")

    def _encode_around(self, text: str, follows: bool = False) -> np.ndarray:
        """Encodes a text with one token for each added word.

        Args:
          follows: another token comes before the text.
        """
        ids: list[int] = []
        end = 0
        if self._found:
            text = self._normalized(text)
            for match in self._found.finditer(text):
                ids += self._encode_part(text[end : match.start()], follows or end > 0)
                ids.append(self._added[self._key(match[1])])
                end = match.end()
        return np.array(ids + self._encode_part(text[end:], follows or end > 0), np.int32)

    def _encode_part(self, text: str, follows: bool) -> list[int]:
        """Encodes what stands between two matches, or before the first or after the last one."""
        if not text or (follows and not text.strip()):
            return []
        if not follows:
            return self._encode_plain([text])[0].tolist()
        spaced = text[0].isspace()
        return self._after[spaced].encode(text[spaced:])

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts without looking for added words."""
        if not self._words_are_independent:
            return [np.array(ids, np.int32) for ids in self._encode_uncached(texts)]
        words = [text.replace("\n", " ").split(" ") for text in texts]
        if len(self._cache) > _CACHE_WORDS:
            self._cache.clear()
        new = list(set(chain(*words)).difference(self._cache))
        parts = [[word] if len(word) <= MAX_CHARS else list(cut(word, MAX_CHARS)) for word in new]
        ids = (array("i", i).tobytes() for i in self._encode_uncached(list(chain(*parts))))
        self._cache.update((word, b"".join(islice(ids, len(p)))) for word, p in zip(new, parts, strict=True))
        result = [np.frombuffer(b"".join(map(self._cache.__getitem__, ws)), np.int32) for ws in words]
        for word in new:
            if len(word) > _CACHE_WORD_CHARS:
                del self._cache[word]
        return result

    def _encode_uncached(self, texts: Sequence[str]) -> list[list[int]]:
        return self._sp.encode(list(texts), num_threads=self.num_threads or -1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def extended(self, words: Iterable[str]) -> bytes:
        proto = model_proto().FromString(self.content)
        for word in map(self._key, words):
            if f"▁{word}" not in self.tokens:
                proto.pieces.add(piece=f"▁{word}", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        return proto.SerializeToString()
