"""SentencePiece models, and training one."""

import io
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data.text import cut
from flax_mlm.data.tokenizer.base import Tokenizer, is_special_spelling
from flax_mlm.errors import UserError

MAX_CHARS = 4096  # of a text encoded at once; SentencePiece's time per character grows with the length of the text
_CACHE_WORDS = 1 << 18  # about 50 MB
_CACHE_WORD_CHARS = 64  # longer words, such as a line of Chinese, hardly ever come again
_LINE_CHARS = 2000  # SentencePiece drops training lines of more than max_sentence_length bytes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or Unigram."""

    filename = "tokenizer.model"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `.model` file; `path` names it in errors."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(content)
            if not proto.pieces:
                raise ValueError("it has no pieces")
            for piece in proto.pieces:  # a user-defined [MASK] would match ordinary text
                if piece.type == piece.USER_DEFINED and is_special_spelling(piece.piece):
                    piece.type = piece.CONTROL
            self._sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._sp_continued = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as e:  # protobuf's DecodeError and SentencePiece's RuntimeError have no useful base
            raise UserError(f"{path} is not a SentencePiece model: {e}") from e
        special_ids = {i for i, p in enumerate(proto.pieces) if p.type in (p.UNKNOWN, p.CONTROL, p.UNUSED)}
        super().__init__(content, [p.piece for p in proto.pieces], special_ids, "▁", path)
        # In nearly every model the tokens of a word depend on nothing else, and can be cached.
        self._words_are_independent = not any("▁" in token.lstrip("▁") for token in self.tokens) and all(
            self._sp.encode(f" a b{space}c ") == self._sp.encode("a") + self._sp.encode("b") + self._sp.encode("c")
            for space in (" ", "\n", "  ")
        )
        self._cache: dict[str, bytes] = {}  # word -> ids, int32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
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
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(self.content)  # type: ignore[attr-defined]
        for word in words:
            if f"▁{word}" not in self.tokens:
                proto.pieces.add(piece=f"▁{word}", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        return proto.SerializeToString()

    def _encode_continued(self, text: str) -> list[int]:
        return self._sp_continued.encode(text)


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
