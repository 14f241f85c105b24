"""Hugging Face's `tokenizer.json` as a `Tokenizer`, run by the `tokenizers` library."""

import copy
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_mlm.data.base_tokenizer import MASK_TEXT, Tokenizer, is_special_spelling
from flax_mlm.data.words import WordMarks, stands_alone
from flax_mlm.errors import UserError, as_user_error

Spec = dict[str, Any]  # the content of a tokenizer.json, as the library writes it
# The pre-tokenizer that makes each character a token, and drops whitespace.
_EACH = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
CHARACTERS: Spec = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _EACH]}
# As the library's: Unicode's White_Space.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_UNNORMALIZED = ("A", "é", "e\u0301", "ﬁ", "\u00a0", "人")  # each is changed by some normalizer


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, whose added tokens may have a key more than the library's: `roles`, a list such as ["cls"]."""

    filename = "tokenizer.json"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `tokenizer.json`; `path` names it in errors."""
        from tokenizers import decoders

        # `tokenizers` raises bare Exception.
        with as_user_error(f"{path} is not a Hugging Face tokenizer.json: ", Exception):
            self._tokenizer, roles = read_json(content)
            self._spec: Spec = json.loads(self._tokenizer.to_str())  # with every default, and the ids in use
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if (suffix := self._spec["model"].get("end_of_word_suffix")) and not self._spec["decoder"]:
                self._tokenizer.decoder = decoders.BPEDecoder(suffix)
            size = max(self._tokenizer.get_vocab().values()) + 1
        tokens = [self._tokenizer.id_to_token(i) or "" for i in range(size)]
        added = self._spec["added_tokens"]
        self.added_words = {t["id"]: t["content"] for t in added if not t["special"]}
        special_ids = {t["id"] for t in added if t["special"] or is_special_spelling(t["content"])}
        special_ids |= {i for i, token in enumerate(tokens) if not token}
        self._marks = marks = _word_marks(self._spec)
        super().__init__(content, tokens, special_ids, marks, path, roles)
        added_ids = [t["id"] for t in added]  # they carry no mark
        self.starts_word[added_ids], self.ends_word[added_ids] = True, bool(marks.ends)
        self._name_unknown(path)
        # The model itself would find special tokens in text. No text holds these names: U+10FFFF is no character.
        self._hidden = {tokens[i]: f"\U0010ffff {tokens[i]}" for i in np.flatnonzero(self.is_special) if tokens[i]}
        self._encoder = _open(_renamed(self._spec, self._hidden))

    def _name_unknown(self, path: str) -> None:
        """Gives the model the token for what has none; BPE, unlike the others, can do without."""
        model, unknown = self._spec["model"], self.tokens[self.unk_id]
        if model["type"] == "Unigram" and model["unk_id"] is None:
            model["unk_id"] = next((i for i, (token, _) in enumerate(model["vocab"]) if token == unknown), None)
            is_there = model["unk_id"] is not None
        elif model["type"] in ("WordPiece", "WordLevel") and model["unk_token"] not in model["vocab"]:
            model["unk_token"], is_there = unknown, unknown in model["vocab"]
        else:
            return
        if not is_there:
            raise UserError(f"{path} has no unknown token, and {unknown} is none of its model's tokens; add one")

    @functools.cached_property
    def _mask_encoder(self) -> Any:
        """An encoder that finds `[MASK]` as `transformers` finds the mask token."""
        mask = self.tokens[self.mask_id]
        others = [t for t in self._spec["added_tokens"] if t["id"] != self.mask_id]
        spec = {**self._spec, "added_tokens": [*others, self._mask]}
        # An ordinary token that is spelled [MASK] would be found as well.
        names = {MASK_TEXT: f"\U0010ffff {MASK_TEXT}", **self._hidden, mask: MASK_TEXT}
        spec = _renamed(spec, names)
        spec["added_tokens"][-1] |= {"special": False, "normalized": False}
        return _open(spec)

    @functools.cached_property
    def _mask(self) -> Spec:
        """The mask as an added token."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        new = {"id": self.mask_id, "content": self.tokens[self.mask_id], **flags}
        return next((t for t in self._spec["added_tokens"] if t["id"] == self.mask_id), new)

    @property
    def mask_takes_space(self) -> bool:
        return self._mask["lstrip"]

    @functools.cached_property
    def _continued(self) -> Any:
        """An encoder that puts no space in front of a text."""
        return _open(_without_prefix(_renamed(self._spec, self._hidden)))

    @functools.cached_property
    def _space_counts(self) -> bool:
        """True where a word begins with its mark only after a space (byte-level BPE)."""
        bare, spaced = (bool(self.starts_word[ids[:1]].all()) for ids in self.encode(["a", " a"]))
        return spaced and not bare

    @functools.cached_property
    def pair_separators(self) -> int:
        ids = self._tokenizer.encode("a", "a").ids  # as the file's template says; RoBERTa's has two
        return max(1, ids.count(self.sep_id) - 1)

    @property
    def puts_ends(self) -> bool:
        ids = self._tokenizer.encode("a").ids
        return ids[:1] == [self.cls_id] and ids[-1:] == [self.sep_id]

    @functools.cached_property
    def _id_of_character(self) -> np.ndarray | None:
        """Ids of all characters, -1 for whitespace, where each one is a token: faster than the library."""
        model, others = self._spec["model"], [self._spec[rule] for rule in ("normalizer", "pre_tokenizer")]
        if model["type"] != "WordLevel" or others != [None, CHARACTERS] or self.added_words:
            return None
        ids = np.full(0x110000, self.unk_id, np.int32)
        for token, i in model["vocab"].items():
            if len(token) == 1 and not self.is_special[i]:
                ids[ord(token)] = i
        ids[[ord(char) for char in _WHITESPACE]] = -1
        return ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if (ids := self._id_of_character) is None:
            return _encode(self._encoder, texts)
        return [(i := ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)])[i >= 0] for text in texts]

    def _encode_with_mask(self, text: str) -> list[int]:
        return _encode(self._mask_encoder, [text])[0].tolist()

    def _encode_after(self, texts: Sequence[str], spaced: bool) -> list[np.ndarray]:
        if not spaced:
            return _encode(self._continued, texts)
        return self.encode([f" {text}" for text in texts] if self._space_counts else texts)

    @functools.cached_property
    def _added_text(self) -> dict[int, Spec]:
        return {t["id"]: t for t in self._spec["added_tokens"] if not self.is_special[t["id"]]}

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if not self.is_special[i]]
        if self._added_text.keys().isdisjoint(kept):
            return self._tokenizer.decode(kept)
        # The library joins added words to the text before them, and takes their letters for those of byte-level BPE.
        spelled = [self.tokens[i] for i in kept]
        for n, i in enumerate(kept):
            if token := self._added_text.get(i):
                spelled[n] = self._marks.spell(token["content"], n > 0 and token["lstrip"])
        return self._tokenizer.decoder.decode(spelled) if self._tokenizer.decoder else " ".join(spelled)

    def extended(self, words: Iterable[str]) -> bytes:
        from tokenizers import AddedToken

        if self._id_of_character is not None:
            what = "tokenizer.extra_tokens_file adds words, and each token of this vocabulary is one character"
            raise UserError(f"{what}; make another vocabulary from text that has the new ones")
        tokenizer, roles = read_json(self.content)
        normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        # Where the normalizer changes text, but does not mark its words, words are found in normalized text.
        normalized = normalize("a") == "a" and any(normalize(text) != text for text in _UNNORMALIZED)
        for word in words:
            (ids,) = self.encode_words([word])
            if len(ids) != 1 or ids[0] == self.unk_id:  # the space in front is part of a word
                spelled = " ".join(normalize(word).split())
                if not normalized or normalize(spelled) != normalize(word):  # as with spaces around ideographs
                    spelled = word
                flags = {"single_word": stands_alone(word), "lstrip": True, "normalized": normalized}
                tokenizer.add_tokens([AddedToken(spelled, **flags)])
        return to_json(tokenizer, roles)


def read_json(content: bytes) -> tuple[Any, dict[str, str]]:
    """Opens the content of a tokenizer.json with the `tokenizers` library; returns also role -> token."""
    spec = json.loads(content)
    if not isinstance(spec, dict):
        raise ValueError("it holds no JSON object")
    if spec and all(type(i) is int for i in spec.values()):
        raise ValueError("it is a vocabulary alone; name it vocab.json, with merges.txt (GPT-2's vocab.bpe) beside it")
    roles = {role: t["content"] for t in spec.get("added_tokens", []) for role in t.get("roles", [])}
    return _open(spec), roles


def to_json(tokenizer: Any, roles: Mapping[str, str]) -> bytes:
    """Returns the content of a tokenizer.json for a tokenizer of the `tokenizers` library."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([token for token in roles.values() if token not in added])
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        if own := [role for role, content in roles.items() if content == token["content"]]:
            token["roles"] = own
    return json.dumps(spec, ensure_ascii=False).encode()


def components(spec: Spec) -> Iterator[Spec]:
    """Yields each normalizer and pre-tokenizer of a tokenizer.json, those inside of others included."""
    parts = [spec["normalizer"], spec["pre_tokenizer"]]
    for part in filter(None, parts):
        yield part
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])  # which are visited in their turn


def _open(spec: Spec) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encodings]


def _word_marks(spec: Spec) -> WordMarks:
    model = spec["model"]
    parts = {part["type"]: part for part in components(spec)}
    if suffix := model.get("end_of_word_suffix"):
        return WordMarks(ends=suffix, is_byte_level="ByteLevel" in parts)
    if prefix := model.get("continuing_subword_prefix"):
        return WordMarks(continues=prefix)
    if "ByteLevel" in parts:
        return WordMarks(begins="ĠĊĉč", is_byte_level=True)
    if "Metaspace" in parts:
        return WordMarks(begins=parts["Metaspace"]["replacement"])
    if "▁" in json.dumps([spec["normalizer"], spec["pre_tokenizer"]], ensure_ascii=False):
        return WordMarks(begins="▁")
    return WordMarks(are_words=model["type"] == "WordLevel")


def _renamed(spec: Spec, names: Mapping[str, str]) -> Spec:
    """Copies a tokenizer.json with other names for some tokens, which no merge makes any more; ids are the same."""
    model = {**spec["model"], **({"dropout": None} if "dropout" in spec["model"] else {})}  # the same ids every time
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        kept = ((a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix))))
        model["merges"] = list(kept)
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    hidden = {"special": True, "normalized": False}
    added = [
        {**t, "content": names[t["content"]], **hidden} if t["content"] in names else t for t in spec["added_tokens"]
    ]
    # Documents are neither cut nor padded, whatever the file asks for.
    return {**spec, "model": model, "added_tokens": added, "truncation": None, "padding": None, "post_processor": None}


def _without_prefix(spec: Spec) -> Spec:
    """Copies a tokenizer.json, without the space that it puts in front of a text."""
    changes: dict[Any, Spec] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Prepend": {"prepend": ""},
    }
    spec = {**spec, **{rule: copy.deepcopy(spec[rule]) for rule in ("normalizer", "pre_tokenizer")}}
    for part in components(spec):
        part |= {key: value for key, value in changes.get(part["type"], {}).items() if key in part}
    return spec
