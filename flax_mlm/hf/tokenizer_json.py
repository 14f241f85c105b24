"""Conversion of a SentencePiece model to `tokenizer.json`, for the `tokenizers` library of Hugging Face.

BPE gives the same ids. Unigram does too, except where two segmentations of a word have the same score ("333": 33 3, or
3 33): the two libraries may choose different ones. Without normalisation, U+2581 in a text, SentencePiece's mark for a
space, may be segmented differently too.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.errors import UserError

TIE = "two segmentations have the same score"


def content(tokenizer: Tokenizer, pair_type: int) -> bytes:
    """Returns the tokenizer.json of a tokenizer: its own file, or its SentencePiece model converted.

    Args:
      pair_type: token type of the second text of a pair.

    Raises:
      UserError: the SentencePiece model is neither BPE nor Unigram.
    """
    if tokenizer.filename == "tokenizer.json":
        return tokenizer.content
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)  # type: ignore[attr-defined]
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    if kind not in ("BPE", "UNIGRAM") or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"the tokenizer, a SentencePiece {kind} model, cannot be written as tokenizer.json")
    spaces = any("▁" in p.piece[1:] and p.type == p.NORMAL for p in proto.pieces)  # a piece of several words
    prefix = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    specials = [tokenizer.tokens[i] for i in (tokenizer.cls_id, tokenizer.sep_id)]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": p.piece,
                "single_word": False,
                "lstrip": i == tokenizer.mask_id,  # the space before a mask is part of the masked word
                "rstrip": False,
                "normalized": p.type == p.USER_DEFINED,
                "special": p.type != p.USER_DEFINED,
            }
            for i, p in enumerate(proto.pieces)
            if p.type in (p.CONTROL, p.UNKNOWN) or (p.type == p.USER_DEFINED and not p.piece.startswith("▁"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(proto.normalizer_spec))},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix, "split": not spaces},
        "post_processor": _template(tokenizer, specials, pair_type),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _bpe(proto, tokenizer) if kind == "BPE" else _unigram(proto, tokenizer),
    }
    return json.dumps(spec, ensure_ascii=False, indent=1).encode()


def _normalizers(spec: Any) -> Iterable[dict[str, Any]]:
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
    if spec.remove_extra_whitespaces:
        # Kept at the beginning: after a mask, a space there separates a new word from the rest of the masked one.
        yield {"type": "Replace", "pattern": {"Regex": r" +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def _template(tokenizer: Tokenizer, specials: list[str], pair_type: int) -> dict[str, Any]:
    cls, sep = specials

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    first = [special(cls, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(sep, 0)]
    ids = {cls: tokenizer.cls_id, sep: tokenizer.sep_id}
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": pair_type}}, special(sep, pair_type)],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
    }


def _bpe(proto: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Derives the merges, which SentencePiece does not store: all pairs that spell a piece, by its score."""
    scores = {p.piece: p.score for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)}
    vocab = {token: i for i, token in enumerate(tokenizer.tokens)}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[left], vocab[right], [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokenizer.tokens[tokenizer.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [merge[3] for merge in merges],
    }


def _unigram(proto: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": tokenizer.unk_id,
        "vocab": [[p.piece, p.score] for p in proto.pieces],
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
    }


def differences(tokenizer: Tokenizer, converted: bytes, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the texts that the converted tokenizer encodes to other ids, each with the reason (`why`)."""
    import tokenizers

    hf_tokenizer = tokenizers.Tokenizer.from_str(converted.decode())
    hf_tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
    encodings = hf_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
        (text, why(tokenizer, ids.tolist(), encoding.ids))
        for text, ids, encoding in zip(texts, tokenizer.encode(texts), encodings, strict=True)
        if ids.tolist() != encoding.ids
    ]


def why(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str:
    """Returns why a text has other ids in `tokenizers`: `TIE`, or the first tokens that differ, ours | theirs."""
    if tokenizer.filename == "tokenizer.model":
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)  # type: ignore[attr-defined]
        scores = [sum(proto.pieces[i].score for i in ids) for ids in (ours, theirs)]
        if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM and abs(scores[0] - scores[1]) < 1e-3:
            return TIE
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return " | ".join(" ".join(tokenizer.tokens[i] for i in ids[first : first + 4]) for ids in (ours, theirs))


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns role -> token, the content of special_tokens_map.json."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    tokens: dict[str, Any] = {f"{role}_token": tokenizer.tokens[i] for role, i in ids.items()}
    if tokenizer.filename == "tokenizer.model":  # as in its tokenizer.json
        flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
        tokens["mask_token"] = {"content": tokens["mask_token"], **flags}
    return tokens


def settings(tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json."""
    tokens = special_tokens(tokenizer)
    if isinstance(tokens["mask_token"], dict):
        tokens["mask_token"] = {"__type": "AddedToken", "special": True, **tokens["mask_token"]}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
