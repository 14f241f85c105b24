"""Tokenizers of every kind keep the same promises."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from flax_mlm.config.schema import TokenizerConfig
from flax_mlm.data import sentencepiece_tokenizer
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from tests.helpers.paths import SHARED
from tests.helpers.tokenizer_files import folder

VOCABULARIES = SHARED / "tokenizers"
TEXT = [
    "The cat sat on the mat, and the dog looked on.\nThen the cat left; the dog stayed on the mat.",
    "A masked language model sees words, hides some of them, and guesses what they were.",
    "Nothing is lost: every word of every sentence is read, cut into pieces, and written down.",
] * 20
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {"bpe": 380, "unigram": 315}
KINDS = ["bpe", "unigram", "wordpiece", "byte_level", "metaspace"]
CONFIG = TokenizerConfig(
    path="",
    extra_tokens_file="",
    model_type="bpe",
    vocab_size=400,
    normalization="nmt_nfkc",
    character_coverage=0.9995,
    sample_bytes=1,
)


def configured(**changes) -> TokenizerConfig:
    return TokenizerConfig(**{**CONFIG.__dict__, **changes})


def hugging_face(kind: str) -> tokenizers.Tokenizer:
    if kind == "wordpiece":
        t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer = normalizers.BertNormalizer(lowercase=True)
        t.pre_tokenizer, t.decoder = (pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    elif kind == "byte_level":
        t = tokenizers.Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel())
        names = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
    else:
        t = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        names = [*SPECIAL[:-1], AddedToken("[MASK]", lstrip=True)]
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    t.train_from_iterator(TEXT, trainer)
    t.enable_truncation(4)  # a file may ask for both; documents must not be touched
    t.enable_padding()
    return t


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tok(kind, tmp_path_factory) -> Tokenizer:
    if kind in ("bpe", "unigram"):
        return train_tokenizer(TEXT, configured(model_type=kind, vocab_size=SIZES[kind]))
    path = tmp_path_factory.mktemp(kind) / "tokenizer.json"
    hugging_face(kind).save(str(path))
    return load_tokenizer(path)


def test_round_trip_and_no_special_ids(tok, kind):
    texts = [TEXT[0], "", "cat", TEXT[1]]
    ids = tok.encode(texts)
    assert len(ids) == 4
    assert all(i.dtype == np.int32 and i.ndim == 1 for i in ids)
    assert len(ids[1]) == 0
    for text, i in zip(texts, ids, strict=True):
        if kind == "wordpiece":
            text = text.lower()
        assert " ".join(tok.decode(i).split()).replace(" ;", ";") == " ".join(text.split())
        assert not tok.is_special[i].any()
        np.testing.assert_array_equal(tok.encode([text])[0], i)


def test_text_that_spells_special_tokens_is_text(tok):
    for name in (*SPECIAL, "<s>", "</s>", "<pad>", "<mask>", "<unk>"):
        ids = tok.encode([f"the {name} cat{name}"])[0]
        assert len(ids) > 3
        assert not set(ids.tolist()) & {tok.pad_id, tok.cls_id, tok.sep_id, tok.mask_id}


def test_tables(tok):
    v = tok.vocab_size
    assert tok.is_special.shape == tok.starts_word.shape == (v,)
    assert len(tok.tokens) == v
    five = [tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id]
    assert len(set(five)) == 5
    assert tok.is_special[five].all()
    assert tok.is_special.sum() == 5
    assert tok.starts_word[tok.is_special].all()


def test_starts_word_finds_the_words(tok, kind):
    text = " hides some of them and guesses" if kind == "byte_level" else "hides some of them and guesses"
    starts = tok.starts_word[tok.encode([text])[0]]
    assert starts.sum() == len(text.split())
    assert starts[0]


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / tok.filename, str(tmp_path)):
        again = load_tokenizer(path)
        assert again.fingerprint == tok.fingerprint
        assert again.tokens == tok.tokens
        np.testing.assert_array_equal(again.encode(TEXT[:1])[0], tok.encode(TEXT[:1])[0])


def test_mask_in_text_looks_as_in_training(tok, kind):
    """Hiding a word that is one piece gives the ids of the text that says [MASK] in its place."""
    text = "every word of the text, and of it the mat"
    ids = tok.encode([text])[0].tolist()
    spelt = [tok.decode([i]).strip() for i in ids]
    once = [word for word in ("every", "word", "the", "of", "and") if word in spelt]
    assert "the" in once
    for word in once:
        at = spelt.index(word)
        expected = [*ids[:at], tok.mask_id, *ids[at + 1 :]]
        assert tok.encode_with_mask(text.replace(word, "[MASK]", 1)) == expected
    comma = tok.encode_with_mask("the [MASK], and")
    assert comma[1] == tok.mask_id
    if kind not in ("byte_level", "metaspace"):  # these put a space in front of all that follows a mask
        assert tok.decode(comma[2:3]) == ","
    first = tok.encode_with_mask("[MASK] the cat")
    assert first[0] == tok.mask_id
    assert first[1:] == tok.encode([" the cat"])[0].tolist()
    assert tok.encode_with_mask("[MASK]  [MASK]") == [tok.mask_id] * 2
    assert tok.encode_with_mask("the cat") == tok.encode(["the cat"])[0].tolist()
    assert tok.encode_answer("the", "and [MASK] cat") == tok.encode(["the"])[0].tolist()
    assert tok.encode_with_mask("") == []


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_does_not_depend_on_the_machine(model_type):
    config = configured(model_type=model_type, vocab_size=SIZES[model_type])
    assert train_tokenizer(TEXT, config).fingerprint == train_tokenizer(iter(TEXT), config).fingerprint


def test_trained_specials_come_first_and_bytes_cover_everything(tmp_path):
    tok = train_tokenizer(TEXT, configured(vocab_size=380))
    assert tok.vocab_size == 380
    assert [tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id] == [0, 1, 2, 3, 4]
    assert tuple(tok.tokens[:5]) == SPECIAL
    tok.save(tmp_path)  # other readers of the file must not find them in text either
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert plain.is_unknown(1)
    assert all(plain.is_control(i) for i in (0, 2, 3, 4))
    strange = "北京 🙂 ▅ \u0e01"
    assert tok.decode(tok.encode([strange])[0]) == strange
    assert tok.unk_id not in tok.encode([strange])[0]


def test_long_and_odd_lines_are_not_lost_in_training():
    """SentencePiece drops lines over its limit, and lines with U+2585; here the text is nothing else."""
    tok = train_tokenizer([" ".join(TEXT).replace("\n", " ") * 5 + " \u2585"], configured(vocab_size=380))
    assert tok.vocab_size == 380
    assert "▁the" in tok.tokens


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_impossible_vocabulary_sizes_say_what_is_possible(model_type):
    with pytest.raises(UserError, match=r"tokenizer.vocab_size is 50000; expected at most (\d+)") as error:
        train_tokenizer(TEXT, configured(model_type=model_type, vocab_size=50_000))
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_tokenizer(TEXT, configured(model_type=model_type, vocab_size=largest)).vocab_size == largest
    with pytest.raises(UserError, match=r"tokenizer.vocab_size is 99; expected at least \d+"):
        train_tokenizer(TEXT, configured(model_type=model_type, vocab_size=99))
    with pytest.raises(UserError, match="the training text is empty"):
        train_tokenizer([], configured(model_type=model_type))


@given(st.text(st.sampled_from("abc \n\t,é"), max_size=40), st.integers(1, 50))
def test_long_text_is_encoded_as_if_at_once(text, limit):
    tok = SMALL
    whole = tok._sp.encode(text)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sentencepiece_tokenizer, "MAX_CHARS", limit)
        tok._cache.clear()  # as it was with another limit
        # Inside a word longer than the limit there is no place to cut; that takes 4096 characters in earnest.
        if all(len(w) < limit for w in re.split("[ \\n]", text)):
            assert tok.encode([text])[0].tolist() == whole
        parts = tok.encode([text, "ab", text])
        np.testing.assert_array_equal(parts[0], parts[2])


SMALL = train_tokenizer(TEXT, configured(vocab_size=380))


def test_words_evicted_from_the_cache_are_encoded_again(tok, monkeypatch):
    monkeypatch.setattr(sentencepiece_tokenizer, "_CACHE_WORDS", 5)
    first = [tok.encode([text])[0].tolist() for text in TEXT]
    assert first == [ids.tolist() for ids in tok.encode(TEXT)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization_rule_name": "identity"}, {"remove_extra_whitespaces": False}, {"split_by_whitespace": False}],
    ids=str,
)
def test_text_whose_words_depend_on_each_other_is_encoded_whole(tmp_path, settings):
    """By a model to which a line feed is no space, that keeps every space, or whose pieces go across them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3), model_prefix=str(tmp_path / "m"), vocab_size=315, byte_fallback=True,
        pad_id=0, pad_piece="[PAD]", unk_id=1, bos_id=2, bos_piece="[CLS]", eos_id=3, eos_piece="[SEP]",
        control_symbols=["[MASK]"], minloglevel=2, **settings,
    )  # fmt: skip
    tok = load_tokenizer(tmp_path / "m.model")
    assert tok._words_are_independent == (not settings)
    for text in (" two  spaces\nand a line ", *TEXT[:3]):
        assert tok.encode([text])[0].tolist() == tok._sp.encode(text)


def test_bad_files(tmp_path):
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    spec = json.loads(hugging_face("wordpiece").to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "[MASK]"]
    del spec["model"]["vocab"]["[MASK]"]
    for path, message in [
        (tmp_path / "none.model", "does not exist"),
        (tmp_path, "holds no tokenizer.json, no tokenizer.model, no vocab.txt, no vocab.json"),
        (write("a.model", b"junk"), "not a SentencePiece model"),
        (write("empty.model", b""), "not a SentencePiece model"),
        (write("c.json", b"[]"), "not a Hugging Face tokenizer.json: it holds no JSON object"),
        (write("a.json", b"{}"), "not a Hugging Face tokenizer.json"),
        (write("b.json", json.dumps(spec).encode()), r"has no \[MASK\] or <mask> token"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(path)


def shared(name: str) -> Path:
    if not (VOCABULARIES / name).exists():
        pytest.skip(f"{VOCABULARIES / name} is not here")
    return VOCABULARIES / name


def test_bert_vocabulary(tmp_path):
    vocab = {w: i for i, w in enumerate(shared("bert_base_uncased_vocab.txt").read_text().splitlines())}
    t = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = (normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer())
    t.decoder = decoders.WordPiece()
    t.add_special_tokens(list(SPECIAL))
    t.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path)
    assert (tok.vocab_size, tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id) == (
        30522,
        0,
        100,
        101,
        102,
        103,
    )
    assert tok.encode(["Hello, world"])[0].tolist() == [7592, 1010, 2088]
    assert tok.encode_with_mask("Paris is the [MASK] of France.") == [3000, 2003, 1996, 103, 1997, 2605, 1012]
    assert not tok.starts_word[vocab["##ing"]]
    assert tok.starts_word[vocab["the"]]


def test_gpt2_vocabulary(tmp_path):
    encoder, merges = shared("gpt2_bpe_encoder.json"), shared("gpt2_bpe_vocab.bpe")
    t = tokenizers.Tokenizer(models.BPE.from_file(str(encoder), str(merges)))
    t.pre_tokenizer, t.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    t.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    t.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path)
    assert tok.vocab_size == 50262
    assert tok.mask_id == 50261
    assert tok.encode(["Hello world<mask>"])[0].tolist()[:2] == [15496, 995]
    assert [tok.tokens[i] for i in tok.encode_with_mask("The [MASK] sat.")] == ["The", "<mask>", "Ġsat", "."]
    for text, word, piece in (
        ("The [MASK] sat.", "cat", "Ġcat"),
        ("[MASK] sat.", "cat", "cat"),
        ("The (cat[MASK] sat.", "s", "s"),
    ):
        assert [tok.tokens[i] for i in tok.encode_answer(word, text)] == [piece]
    assert [tok.tokens[i] for ids in tok.encode_words(["New", "York"]) for i in ids] == ["ĠNew", "ĠYork"]
    text = "tabs\tand  two spaces\n\nßé🙂 "
    assert tok.decode(tok.encode([text])[0]) == text


def test_albert_model():
    tok = load_tokenizer(shared("albert_30k-clean.model"))
    assert tok.mask_id == 4
    assert tok.mask_id not in tok.encode(["the [MASK] cat"])[0]
    assert [tok.tokens[i] for i in tok.encode_with_mask("the [MASK].")] == ["▁the", "[MASK]", "."]


@pytest.mark.parametrize(
    ("settings", "what"),
    [({}, "do_lower_case is true"), ({"do_lower_case": False}, "keep_accents is false")],
)
def test_an_albert_that_folds_text_before_its_model_is_refused(settings, what, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(shared("albert_30k-clean.model").read_bytes())
    folder(tmp_path, config={"model_type": "albert"}, tokenizer_config=settings)
    with pytest.raises(UserError, match=f"{what}, which a SentencePiece model alone does not do"):
        load_tokenizer(tmp_path)


def test_user_defined_mask_of_a_given_model_is_not_found_in_text(tmp_path):
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=prefix,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    plain, tok = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model"), load_tokenizer(tmp_path)
    assert tok.mask_id in plain.encode("the <mask> cat")
    assert tok.mask_id not in tok.encode(["the <mask> cat"])[0]
