"""Text to token ids and back: SentencePiece models, trained here or given, and Hugging Face `tokenizer.json`."""

import abc
import functools
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data.sources import cut
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs

MASK_TEXT = "[MASK]"  # how a mask is written in a cloze text, whatever the vocabulary calls it

_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_TRAIN_LINE = 2000  # characters; SentencePiece drops training lines of more than max_sentence_length bytes
_ENCODE_LINE = 4096  # characters; SentencePiece's time per character grows with the length of the text
_KNOWN_WORDS = 1 << 18  # whose pieces are remembered: 50 MB
_KNOWN_WORD = 64  # characters; what is longer, as a line of Chinese is, will hardly come again


class Tokenizer(abc.ABC):
    """A vocabulary of V pieces, and how text is cut into them.

    Attributes:
      filename: `tokenizer.model` or `tokenizer.json`.
      content: The bytes of that file.
      fingerprint: SHA-256 of that file, as hex.
      pieces: The V pieces as the library spells them.
      pad_id, unk_id, cls_id, sep_id, mask_id: Ids of the special pieces.
      is_special: bool (V,), the five above and every other piece that stands for no text.
      starts_word: bool (V,), pieces that begin a word; special pieces do.
      num_threads: Of `encode`; 0 for one per core.
    """

    filename: str
    content: bytes
    pieces: list[str]
    is_special: np.ndarray
    starts_word: np.ndarray
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    def __init__(self, content: bytes, pieces: list[str], special: set[int], word_mark: str, path: str):
        self.content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.num_threads = 0
        self.pieces = pieces
        ids = {piece: i for i, piece in enumerate(pieces)}
        for name, spellings in _NAMES.items():
            found = [ids[s] for s in spellings if s in ids]
            if not found:
                raise UserError(f"{path} has no {' or '.join(spellings)} piece; masked-LM training needs one")
            setattr(self, f"{name}_id", found[0])
            special = special | {found[0]}
        self.is_special = np.zeros(len(pieces), bool)
        self.is_special[list(special)] = True
        if word_mark.startswith("^"):
            starts = [not p.startswith(word_mark[1:]) for p in pieces]
        else:
            starts = [p.startswith(tuple(word_mark)) or not word_mark for p in pieces]
        self.starts_word = np.array(starts) | self.is_special

    @property
    def vocab_size(self) -> int:
        """V"""
        return len(self.pieces)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's file into a folder."""
        (epath.Path(folder) / self.filename).write_bytes(self.content)

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per text. No special piece is added, and none comes from text that spells it."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text without special pieces."""

    @abc.abstractmethod
    def extended(self, words: Iterable[str]) -> bytes:
        """The content of the tokenizer with more pieces: words that are none yet."""

    @abc.abstractmethod
    def _encode_continued(self, text: str) -> list[int]:
        """Ids of text that goes on right after a piece, without a space between."""

    @functools.cached_property
    def _space_counts(self) -> bool:
        """Whether a word has the mark of its beginning only where a space is before it (byte-level BPE)."""
        plain, spaced = (bool(self.starts_word[ids[:1]].all()) for ids in self.encode(["a", " a"]))
        return spaced and not plain

    def encode_words(self, words: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per word, as it stands after a space."""
        return self.encode([f" {word}" for word in words] if self._space_counts else words)

    def encode_answer(self, word: str, text: str) -> list[int]:
        """Ids of a word in the place of the `[MASK]` of a text, with the space before that, if there is one."""
        before = text.partition(MASK_TEXT)[0]
        if before and not before[-1].isspace():
            return self._encode_continued(word)
        return (self.encode_words if before else self.encode)([word])[0].tolist()

    def encode_with_mask(self, text: str) -> list[int]:
        """Ids of a text in which `[MASK]` stands for a piece; after a space, for a piece that has that space."""
        ids: list[int] = []
        for i, part in enumerate(text.split(MASK_TEXT)):
            ids += [self.mask_id] if i else []
            last = i == text.count(MASK_TEXT)
            part = part if last else part.rstrip()
            if part.strip():
                continued = i > 0 and not part[0].isspace()
                ids += self._encode_continued(part) if continued else self.encode([part])[0].tolist()
        return ids


class _SentencePiece(Tokenizer):
    filename = "tokenizer.model"

    def __init__(self, content: bytes, path: str):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(content)
            if not proto.pieces:
                raise ValueError("it has no pieces")
            for piece in proto.pieces:  # a user-defined [MASK] would be found in ordinary text
                if any(piece.piece in spellings for spellings in _NAMES.values()) and piece.type == piece.USER_DEFINED:
                    piece.type = piece.CONTROL
            self._sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._sp_continued = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as e:  # protobuf's DecodeError and SentencePiece's RuntimeError have no useful base
            raise UserError(f"{path} is not a SentencePiece model: {e}") from e
        types = {i for i, p in enumerate(proto.pieces) if p.type in (p.UNKNOWN, p.CONTROL, p.UNUSED)}
        super().__init__(content, [p.piece for p in proto.pieces], types, "▁", path)
        # In nearly every model a word's pieces depend on nothing else; most words of a text have then been seen before.
        self._separable = not any("▁" in piece.piece.lstrip("▁") for piece in proto.pieces) and all(
            self._sp.encode(f" a b{space}c ") == self._sp.encode("a") + self._sp.encode("b") + self._sp.encode("c")
            for space in (" ", "\n", "  ")
        )
        self._known: dict[str, bytes] = {}  # word -> ids, int32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._separable:
            return [np.array(ids, np.int32) for ids in self._encoded(texts)]
        words = [text.replace("\n", " ").split(" ") for text in texts]
        if len(self._known) > _KNOWN_WORDS:
            self._known.clear()
        new = list(set(chain(*words)).difference(self._known))
        parts = [[word] if len(word) <= _ENCODE_LINE else list(cut(word, _ENCODE_LINE)) for word in new]
        ids = (array("i", i).tobytes() for i in self._encoded(list(chain(*parts))))
        self._known.update((word, b"".join(islice(ids, len(p)))) for word, p in zip(new, parts, strict=True))
        result = [np.frombuffer(b"".join(map(self._known.__getitem__, ws)), np.int32) for ws in words]
        for word in new:
            if len(word) > _KNOWN_WORD:
                del self._known[word]
        return result

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return self._sp.encode(list(texts), num_threads=self.num_threads or -1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([int(i) for i in ids])

    def extended(self, words: Iterable[str]) -> bytes:
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(self.content)  # type: ignore[attr-defined]
        for word in words:
            if f"▁{word}" not in self.pieces:
                proto.pieces.add(piece=f"▁{word}", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        return proto.SerializeToString()

    def _encode_continued(self, text: str) -> list[int]:
        return self._sp_continued.encode(text)


class _HuggingFace(Tokenizer):
    filename = "tokenizer.json"

    def __init__(self, content: bytes, path: str):
        import tokenizers

        try:
            spec = json.loads(content)
            for token in spec["added_tokens"]:  # only tokens marked special can be kept from matching text
                token["special"] |= any(token["content"] in spellings for spellings in _NAMES.values())
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
        except Exception as e:  # `tokenizers` raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {e}") from e
        for tokenizer in (self._tokenizer, self._continued):
            tokenizer.encode_special_tokens = True  # "[MASK]" in a document is text
            tokenizer.no_truncation()
            tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab()
        pieces = [""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            pieces[i] = piece
        special = {t["id"] for t in spec["added_tokens"] if t["special"]} | {i for i, p in enumerate(pieces) if not p}
        model, cutter = (spec["model"], json.dumps([spec["pre_tokenizer"], spec["normalizer"]], ensure_ascii=False))
        if model["type"] == "WordPiece":
            mark = "^" + model["continuing_subword_prefix"]
        else:
            mark = "ĠĊĉč" if "ByteLevel" in cutter else "▁" if "▁" in cutter else ""
        super().__init__(content, pieces, special, mark, path)
        self.starts_word[[t["id"] for t in spec["added_tokens"]]] = True  # they carry no mark

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def extended(self, words: Iterable[str]) -> bytes:
        spec = json.loads(self.content)
        is_wordpiece = spec["model"]["type"] == "WordPiece"
        if is_wordpiece and (normalizer := self._tokenizer.normalizer):
            words = [normalizer.normalize_str(word).strip() for word in words]
        new = [word for word in dict.fromkeys(words) if word and word not in self.pieces]
        for i, word in enumerate(new, len(self.pieces)):
            if is_wordpiece:
                spec["model"]["vocab"][word] = i
            else:  # these are found before the text is cut, with the space in front
                flags = {"single_word": True, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
                spec["added_tokens"].append({"id": i, "content": word, **flags})
        return json.dumps(spec, ensure_ascii=False).encode()

    def _encode_continued(self, text: str) -> list[int]:
        return self._continued.encode(text, add_special_tokens=False).ids


def _without_prefix(spec: Any) -> Any:
    """The same tokenizer.json, but no space is put in front of a text."""
    if isinstance(spec, list):
        return [_without_prefix(s) for s in spec]
    if not isinstance(spec, dict):
        return spec
    changes: dict[Any, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Prepend": {"prepend": ""},
    }
    return {k: v if k == "vocab" else _without_prefix(v) for k, v in spec.items()} | changes.get(spec.get("type"), {})


def load(path: str | Path, extend: str | Path = "") -> Tokenizer:
    """Reads a SentencePiece `.model`, a Hugging Face `tokenizer.json` or a WordPiece `vocab.txt`, or that of a folder.

    Args:
      extend: a file of words, one a line, each of which becomes a piece. They come last in the vocabulary.

    Raises:
      UserError: there is none, it cannot be read, or a special piece is missing.
    """
    file = gcs.parse("tokenizer.path", os.fspath(path)) or epath.Path(path).expanduser()
    if file.is_dir():
        names = ("tokenizer.model", "tokenizer.json", "vocab.txt")
        found = [file / name for name in names if (file / name).exists()]
        if not found:
            raise UserError(f"{file} holds no {', no '.join(names)}")
        file = found[0]
    if not file.exists():
        raise UserError(f"tokenizer file {file} does not exist; give a SentencePiece .model or a tokenizer.json")
    content, kind = file.read_bytes(), _SentencePiece if file.suffix == ".model" else _HuggingFace
    if file.suffix == ".txt":
        content = _wordpiece(file)
    tokenizer: Tokenizer = kind(content, str(file))
    if extend:
        try:
            lines = epath.Path(extend).expanduser().read_text().split("\n")
        except (OSError, ValueError) as e:
            raise UserError(f"tokenizer.extra_tokens_file: {extend} cannot be read: {e}") from e
        words = [word for word in dict.fromkeys(line.strip() for line in lines) if word]
        tokenizer = kind(tokenizer.extended(words), f"{file} with {extend}")
    return tokenizer


def _wordpiece(file: epath.Path) -> bytes:
    """The tokenizer.json of a WordPiece vocabulary, lower-casing as its folder says, or as the vocabulary does."""
    import tokenizers

    try:
        pieces = file.read_text().removesuffix("\n").split("\n")  # and at nothing else: some pieces are odd spaces
        settings = file.parent / "tokenizer_config.json"
        lowers = json.loads(settings.read_text()).get("do_lower_case") if settings.exists() else None
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{file} cannot be read, or tokenizer_config.json beside it: {e}") from e
    if lowers is None:
        lowers = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    if lacking := [piece for piece in special.values() if piece not in vocab]:
        raise UserError(f"{file} has no {lacking[0]} piece; it is not a BERT vocabulary")
    return tokenizers.BertWordPieceTokenizer(vocab, lowercase=bool(lowers)).to_str().encode()


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a SentencePiece model; the same texts and config give the same bytes on any machine.

    Raises:
      UserError: the text does not support a vocabulary of this size.
    """
    from sentencepiece import SentencePieceTrainer

    def lines() -> Iterator[str]:
        for text in texts:
            for line in text.splitlines():
                # U+2585 is SentencePiece's own mark; it drops lines that hold it.
                yield from cut(line.replace("\u2585", " "), _TRAIN_LINE)

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization,
            byte_fallback=True,
            max_sentence_length=4 * _TRAIN_LINE,  # bytes
            # As control symbols, no text can spell them. num_threads is left alone: it is recorded in the model.
            pad_id=0, pad_piece="[PAD]", unk_id=1, unk_piece="[UNK]",
            bos_id=2, bos_piece="[CLS]", eos_id=3, eos_piece="[SEP]", control_symbols=["[MASK]"],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        if match := re.search(r"value <= (\d+)", str(e)):
            limit = f"at most {match[1]} for this text"
        elif match := re.search(r"(\d+) vs (\d+)", str(e)):
            limit = f"at least {match[2]} for this text"
        else:
            raise UserError(f"no tokenizer can be trained: is there any text? SentencePiece says: {e}") from e
        raise UserError(f"tokenizer.vocab_size is {config.vocab_size}; it can be {limit}") from e
    return _SentencePiece(model.getvalue(), "the trained tokenizer")
