"""Tokenizers: SentencePiece models, Hugging Face's `tokenizer.json` and BERT's `vocab.txt` behind one interface."""

import abc
import functools
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.data.text import cut
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import gcs

MASK_TEXT = "[MASK]"  # how texts of users spell a mask, whatever the vocabulary calls it

SPECIAL_TOKENS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
MAX_CHARS = 4096  # of a text encoded at once; SentencePiece's time per character grows with the length of the text
_CACHE_WORDS = 1 << 18  # about 50 MB
_CACHE_WORD_CHARS = 64  # longer words, such as a line of Chinese, hardly ever come again


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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or Unigram."""

    filename = "tokenizer.model"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `.model` file; `path` names it in errors."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        # protobuf's DecodeError and SentencePiece's RuntimeError have no useful base.
        with as_user_error(f"{path} is not a SentencePiece model: ", Exception):
            proto.ParseFromString(content)
            if not proto.pieces:
                raise ValueError("it has no pieces")
            for piece in proto.pieces:  # a user-defined [MASK] would match ordinary text
                if piece.type == piece.USER_DEFINED and is_special_spelling(piece.piece):
                    piece.type = piece.CONTROL
            self._sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._sp_continued = SentencePieceProcessor(model_proto=proto.SerializeToString())
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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    filename = "tokenizer.json"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `tokenizer.json`; `path` names it in errors."""
        import tokenizers

        # `tokenizers` raises bare Exception.
        with as_user_error(f"{path} is not a Hugging Face tokenizer.json: ", Exception):
            spec = json.loads(content)
            for token in spec["added_tokens"]:  # only tokens marked special can be kept from matching text
                token["special"] |= is_special_spelling(token["content"])
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
        for tokenizer in (self._tokenizer, self._continued):
            tokenizer.encode_special_tokens = True  # "[MASK]" in a document is text
            tokenizer.no_truncation()
            tokenizer.no_padding()
        size = max(self._tokenizer.get_vocab().values()) + 1
        tokens = [self._tokenizer.id_to_token(i) or "" for i in range(size)]
        special_ids = {t["id"] for t in spec["added_tokens"] if t["special"]}
        special_ids |= {i for i, token in enumerate(tokens) if not token}
        model = spec["model"]
        word_rules = json.dumps([spec["pre_tokenizer"], spec["normalizer"]], ensure_ascii=False)
        if model["type"] == "WordPiece":
            mark = "^" + model["continuing_subword_prefix"]
        else:
            mark = "ĠĊĉč" if "ByteLevel" in word_rules else "▁" if "▁" in word_rules else ""
        super().__init__(content, tokens, special_ids, mark, path)
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
        new = [word for word in dict.fromkeys(words) if word and word not in self.tokens]
        for i, word in enumerate(new, len(self.tokens)):
            if is_wordpiece:
                spec["model"]["vocab"][word] = i
            else:  # added tokens match before the text is cut, with the space in front
                flags = {"single_word": True, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
                spec["added_tokens"].append({"id": i, "content": word, **flags})
        return json.dumps(spec, ensure_ascii=False).encode()

    def _encode_continued(self, text: str) -> list[int]:
        return self._continued.encode(text, add_special_tokens=False).ids


def _without_prefix(spec: Any) -> Any:
    """Copies a tokenizer.json, without the space that it puts in front of a text."""
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


def wordpiece_json(file: epath.Path) -> bytes:
    """Makes a tokenizer.json of BERT's `vocab.txt`.

    It lower-cases text where tokenizer_config.json beside the file says so; without that file, where the vocabulary has
    no upper-case token.

    Raises:
      UserError: a file cannot be read, or a special token is missing.
    """
    import tokenizers

    unreadable = f"{file} cannot be read, or tokenizer_config.json beside it: "
    with as_user_error(unreadable, OSError, ValueError, AttributeError):
        tokens = file.read_text().removesuffix("\n").split("\n")  # not splitlines(): some tokens are odd spaces
        settings = file.parent / "tokenizer_config.json"
        lowercase = json.loads(settings.read_text()).get("do_lower_case") if settings.exists() else None
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    vocab = {token: i for i, token in enumerate(tokens)}
    if missing := [token for token in ("[UNK]", "[SEP]", "[CLS]") if token not in vocab]:
        raise UserError(f"{file} has no {missing[0]} token; it is not a BERT vocabulary")
    return tokenizers.BertWordPieceTokenizer(vocab, lowercase=bool(lowercase)).to_str().encode()


# By the name of the file that `save` writes.
TOKENIZERS: dict[str, Callable[[bytes, str], Tokenizer]] = {
    kind.filename: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer)
}
_NAMES = (*TOKENIZERS, "vocab.txt")


def load_tokenizer(path: str | Path, extra_tokens_file: str | Path = "") -> Tokenizer:
    """Reads a SentencePiece `.model`, a Hugging Face `tokenizer.json` or a WordPiece `vocab.txt`, or that of a folder.

    Args:
      extra_tokens_file: words, one a line; each becomes a token at the end of the vocabulary.

    Raises:
      UserError: the file does not exist, cannot be read, or lacks a special token.
    """
    file = gcs.parse("tokenizer.path", os.fspath(path)) or epath.Path(path).expanduser()
    if file.is_dir():
        folder = file
        file = next((folder / name for name in _NAMES if (folder / name).exists()), folder)
        if file == folder:
            raise UserError(f"{folder} holds no {', no '.join(_NAMES)}")
    if not file.exists():
        raise UserError(f"tokenizer file {file} does not exist; give a SentencePiece .model or a tokenizer.json")
    kind = TOKENIZERS["tokenizer.model" if file.suffix == ".model" else "tokenizer.json"]
    tokenizer = kind(wordpiece_json(file) if file.suffix == ".txt" else file.read_bytes(), str(file))
    if extra_tokens_file:
        with as_user_error(f"tokenizer.extra_tokens_file: {extra_tokens_file} cannot be read: ", OSError, ValueError):
            lines = epath.Path(extra_tokens_file).expanduser().read_text().split("\n")
        words = [word for word in dict.fromkeys(line.strip() for line in lines) if word]
        tokenizer = kind(tokenizer.extended(words), f"{file} with {extra_tokens_file}")
    return tokenizer
