"""Conversion of a SentencePiece model to `tokenizer.json`, for the `tokenizers` library of Hugging Face.

BPE gives the same ids. Unigram does too, except where two segmentations of a word have the same score ("333": 33 3, or
3 33): the two libraries may choose different ones. Without normalisation, U+2581 in a text, SentencePiece's mark for a
space, may be segmented differently too.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax_mlm.data.sentencepiece_tokenizer import model_proto
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.data.words import stands_alone
from flax_mlm.errors import UserError

TIE = "two segmentations have the same score"


def content(tokenizer: Tokenizer, pair_type: int) -> bytes:
    """Returns the tokenizer.json of a tokenizer: its own file, or its SentencePiece model converted.

    It writes [CLS] and [SEP] around a text or a pair. The file's own template is kept where it does this.

    Args:
      pair_type: token type of the second text of a pair.

    Raises:
      UserError: the SentencePiece model is neither BPE nor Unigram, or has a word that cannot be written.
    """
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import processors

    is_own = tokenizer.filename == "tokenizer.json"
    result = HfTokenizer.from_str(tokenizer.content.decode()) if is_own else _converted(tokenizer)
    result.no_padding()
    pair, text = result.encode("a", "a"), tokenizer.encode(["a"])[0].tolist()
    ends = [tokenizer.sep_id] * tokenizer.pair_separators
    ids = [tokenizer.cls_id, *text, *ends, *text, tokenizer.sep_id]
    if is_own and pair.ids == ids and pair_type * pair.type_ids[-1] == pair_type:
        is_plain = b'"roles"' not in tokenizer.content  # a key of ours, which transformers warns of
        return tokenizer.content if is_plain else result.to_str(pretty=True).encode()
    names = {tokenizer.tokens[i]: i for i in (tokenizer.cls_id, tokenizer.sep_id)}
    cls, sep = names
    second = f"{sep}:{pair_type}"
    template = f"{cls} $A {sep} {f'{second} ' * (len(ends) - 1)}$B:{pair_type} {second}"
    result.post_processor = processors.TemplateProcessing(f"{cls} $A {sep}", template, list(names.items()))
    return result.to_str(pretty=True).encode()


def _converted(tokenizer: Tokenizer) -> Any:
    """Converts a SentencePiece model."""
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.normalizers import Sequence

    proto, words, tokens = _proto(tokenizer), tokenizer.added_words, set(tokenizer.tokens)
    for i, word in words.items():
        if word in tokens:
            problem = f"{tokenizer.tokens[i]}, an added word, and {word}, which continues words"
            raise UserError(f"the tokenizer has both {problem}; tokenizer.json cannot tell them apart")
    converted = HfTokenizer(_model(proto, tokenizer, words))
    added = []
    for i, p in enumerate(proto.pieces):
        is_own = p.type == p.USER_DEFINED
        if i in words:
            added.append(AddedToken(words[i], single_word=stands_alone(words[i]), lstrip=True, special=False))
        elif p.type in (p.CONTROL, p.UNKNOWN) or (is_own and not p.piece.startswith("▁")):
            # The space before a mask is part of the masked word.
            added.append(AddedToken(p.piece, lstrip=i == tokenizer.mask_id, normalized=is_own, special=not is_own))
    converted.add_tokens(added)
    converted.normalizer = Sequence(list(_normalizers(proto.normalizer_spec)))
    has_spaces = any("▁" in p.piece[1:] and p.type == p.NORMAL for p in proto.pieces)  # a token of several words
    prefix = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    converted.pre_tokenizer = metaspace = pre_tokenizers.Metaspace("▁", prefix, split=not has_spaces)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:  # which would find special tokens in text
        special = [p.piece for p in proto.pieces if p.type not in (p.NORMAL, p.USER_DEFINED) and len(p.piece) > 1]
        inside = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special)
        splits = [metaspace, pre_tokenizers.Split(Regex(inside), "merged_with_previous")]
        # An added word is likelier than what has no token at all, so that is cut off.
        known = set("".join(p.piece for i, p in enumerate(proto.pieces) if i not in words)) | {" "}
        if unknown := sorted(set("".join(words.values())) - known):
            splits.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, unknown))), "isolated"))
        converted.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    converted.decoder = decoders.Sequence(steps)
    return converted


def _proto(tokenizer: Tokenizer) -> Any:
    return model_proto().FromString(tokenizer.content)


def _normalizers(spec: Any) -> Iterable[Any]:
    from tokenizers import Regex, normalizers

    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        # Kept at the beginning: after a mask, a space there separates a new word from the rest of the masked one.
        yield normalizers.Replace(Regex(r" +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")


def _model(proto: Any, tokenizer: Tokenizer, words: Mapping[int, str]) -> Any:
    """Converts the vocabulary.

    SentencePiece stores no merges of BPE: they are all pairs that spell a token, by its score.

    Args:
      words: id -> word that the model must not find in other words.
    """
    from tokenizers import models

    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    byte_fallback = proto.trainer_spec.byte_fallback
    if kind not in ("BPE", "UNIGRAM") or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"the tokenizer, a SentencePiece {kind} model, cannot be written as tokenizer.json")
    vocab = {words.get(i, token): i for i, token in enumerate(tokenizer.tokens)}
    scores = {p.piece: p.score for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED) and p.piece in vocab}
    if kind == "UNIGRAM":
        lowest = min(scores.values()) - 100
        scored = [(t, lowest if i in words else proto.pieces[i].score) for t, i in vocab.items()]
        return models.Unigram(scored, tokenizer.unk_id, byte_fallback)
    merges = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[left], vocab[right], (left, right)))
    pairs = [merge[-1] for merge in sorted(merges)]
    unknown = tokenizer.tokens[tokenizer.unk_id]
    return models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def why(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str:
    """Returns why a text has other ids in `tokenizers`: `TIE`, or the first tokens that differ, ours | theirs."""
    if tokenizer.filename == "tokenizer.model":
        proto = _proto(tokenizer)
        scores = [sum(proto.pieces[i].score for i in ids) for ids in (ours, theirs)]
        if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM and abs(scores[0] - scores[1]) < 1e-3:
            return TIE
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return " | ".join(" ".join(tokenizer.tokens[i] for i in ids[first : first + 4]) for ids in (ours, theirs))


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns role -> token, the content of special_tokens_map.json."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    if ids["unk"] == ids["mask"]:  # there is none
        del ids["unk"]
    tokens: dict[str, Any] = {f"{role}_token": tokenizer.tokens[i] for role, i in ids.items()}
    if tokenizer.filename == "tokenizer.model":  # as in its tokenizer.json
        flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
        tokens["mask_token"] = {"content": tokens["mask_token"], **flags}
    return tokens


def settings(tokenizer: Tokenizer, max_length: int, type_vocab_size: int) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json.

    Args:
      max_length: tokens that a text may have.
      type_vocab_size: of the model; with at least 2, the texts of a pair have token types.
    """
    tokens = special_tokens(tokenizer)
    if isinstance(tokens["mask_token"], dict):
        tokens["mask_token"] = {"__type": "AddedToken", "special": True, **tokens["mask_token"]}
    types = ["token_type_ids"] if type_vocab_size > 1 else []
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", *types, "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
