"""Hugging Face `tokenizer.json` files, and BERT's `vocab.txt`."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from flax_mlm.data.tokenizer.base import Tokenizer, is_special_spelling
from flax_mlm.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    filename = "tokenizer.json"

    def __init__(self, content: bytes, path: str):
        """Opens the content of a `tokenizer.json`; `path` names it in errors."""
        import tokenizers

        try:
            spec = json.loads(content)
            for token in spec["added_tokens"]:  # only tokens marked special can be kept from matching text
                token["special"] |= is_special_spelling(token["content"])
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
        except Exception as e:  # `tokenizers` raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {e}") from e
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

    try:
        tokens = file.read_text().removesuffix("\n").split("\n")  # not splitlines(): some tokens are odd spaces
        settings = file.parent / "tokenizer_config.json"
        lowercase = json.loads(settings.read_text()).get("do_lower_case") if settings.exists() else None
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{file} cannot be read, or tokenizer_config.json beside it: {e}") from e
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    vocab = {token: i for i, token in enumerate(tokens)}
    if missing := [token for token in ("[UNK]", "[SEP]", "[CLS]") if token not in vocab]:
        raise UserError(f"{file} has no {missing[0]} token; it is not a BERT vocabulary")
    return tokenizers.BertWordPieceTokenizer(vocab, lowercase=bool(lowercase)).to_str().encode()
