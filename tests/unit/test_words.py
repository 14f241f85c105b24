"""Word boundaries are read from the marks of a vocabulary, and an ideograph is a word."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from flax_mlm.data.json_tokenizer import HuggingFaceTokenizer
from flax_mlm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_mlm.data.words import WordMarks, unspaced
from flax_mlm.errors import UserError
from tests.helpers.tokenizer_files import BERT, TEXT, vocabulary


def trained(**settings) -> SentencePieceTokenizer:
    """A SentencePiece model of `TEXT`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=320, byte_fallback=True, model_type="bpe",
        pad_id=0, pad_piece="[PAD]", unk_id=1, unk_piece="[UNK]", bos_id=2, bos_piece="[CLS]", eos_id=3,
        eos_piece="[SEP]", control_symbols=["[MASK]"], minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "the model")


def bpe(**marks) -> HuggingFaceTokenizer:
    t = Tokenizer(models.BPE(unk_token="[UNK]", **marks))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=list(BERT), show_progress=False, **marks)
    t.train_from_iterator(TEXT, trainer)
    return HuggingFaceTokenizer(t.to_str().encode(), "the file")


def words(tok) -> int:
    ids = tok.encode([TEXT[0]])[0]
    starts = tok.word_starts(np.array([tok.cls_id, *ids]))[1:]
    starts[0] = True  # after [CLS]
    assert len(ids) > len(TEXT[0].split())
    return int(starts.sum())


MARKED = {
    "BPE with a prefix": lambda: bpe(continuing_subword_prefix="##"),
    "BPE with a suffix": lambda: bpe(end_of_word_suffix="</w>"),
    "SentencePiece": trained,
    "SentencePiece without dummy prefix": lambda: trained(add_dummy_prefix=False),
    "SentencePiece with suffixes": lambda: trained(treat_whitespace_as_suffix=True),
    "Metaspace": lambda: HuggingFaceTokenizer(vocabulary("metaspace").to_str().encode(), "the file"),
    "byte-level": lambda: HuggingFaceTokenizer(vocabulary("byte_level").to_str().encode(), "the file"),
    "WordPiece": lambda: HuggingFaceTokenizer(vocabulary("wordpiece").to_str().encode(), "the file"),
}


@pytest.mark.parametrize("kind", MARKED)
def test_words_are_those_between_spaces(kind):
    assert words(MARKED[kind]()) == len(TEXT[0].split())


def test_suffixes_are_no_text():
    tok = MARKED["BPE with a suffix"]()
    assert tok.decode(tok.encode([TEXT[0]])[0]) == TEXT[0]


def test_another_replacement_of_spaces_marks_words():
    spec = json.loads(vocabulary("metaspace").to_str().replace("▁", "_"))
    assert words(HuggingFaceTokenizer(json.dumps(spec).encode(), "the file")) == len(TEXT[0].split())


@pytest.mark.parametrize("kind", ["BPE", "WordPiece"])
def test_whole_words_need_marks(kind):
    spec = vocabulary("wordpiece").to_str().replace('"##"', '""').replace('"##', '"~')
    tok = bpe() if kind == "BPE" else HuggingFaceTokenizer(spec.encode(), "the file")
    with pytest.raises(UserError, match=r"objective.masking is whole_word; expected token or span"):
        tok.require_words("whole_word")


@pytest.mark.parametrize("kind", MARKED)
def test_marked_words_can_be_masked(kind):
    MARKED[kind]().require_words("whole_word")


def test_words_as_tokens_can_be_masked():
    HuggingFaceTokenizer(vocabulary("wordlevel").to_str().encode(), "the file").require_words("whole_word")


@pytest.mark.parametrize(
    ("marks", "token", "starts"),
    [
        (WordMarks(begins="▁"), "人", True),
        (WordMarks(begins="▁"), "人的", True),
        (WordMarks(begins="▁"), "𠀀", True),
        (WordMarks(begins="▁"), "豈", True),
        (WordMarks(begins="▁"), "<0xE4>", True),
        (WordMarks(begins="▁"), "<0xE3>", False),
        (WordMarks(begins="▁"), "の", False),
        (WordMarks(begins="▁"), "，", False),
        (WordMarks(begins="▁"), "한", False),
        (WordMarks(begins="▁"), "é人", False),
        (WordMarks(continues="##"), "##的", True),
        (WordMarks(continues="##"), "##s", False),
        (WordMarks(ends="</w>"), "人</w>", True),
        (WordMarks(begins="Ġ", is_byte_level=True), "äºº", True),
        (WordMarks(begins="Ġ", is_byte_level=True), "äº", True),
        (WordMarks(begins="Ġ", is_byte_level=True), "ãģ®", False),
    ],
)
def test_a_token_that_begins_with_an_ideograph_starts_a_word(marks, token, starts):
    assert marks.tables([token])[0].tolist() == [starts]


@pytest.mark.parametrize(("token", "ends"), [("人", True), ("▁人", True), ("人a", False), ("の", False), ("a人", True)])
def test_a_word_begins_after_an_ideograph(token, ends):
    assert WordMarks(begins="▁").tables([token])[1].tolist() == [ends]


@pytest.mark.parametrize("text", ["สวัสดี", "ສະບາຍ", "မြန်မာ", "ភាសាខ្មែរ", "ひらがな", "カタカナ", "བོད་ཡིག", "ﾊﾝｶｸ"])
def test_scripts_without_spaces(text):
    assert unspaced([text]) > 0.8


@pytest.mark.parametrize("text", ["plain text", "人的", "한국어", "עברית", "हिन्दी", ""])
def test_scripts_with_spaces_and_ideographs(text):
    assert unspaced([text]) == 0


@pytest.mark.parametrize("word", ["keys", "baker"])
def test_without_dummy_prefix_the_space_after_a_mask_stays(word):
    tok = trained(add_dummy_prefix=False)
    ids = tok.encode([f"The {word} sold"])[0].tolist()
    hidden = tok.encode_words([word])[0].tolist()
    masked = tok.encode_with_mask("The [MASK] sold")
    assert [*masked[: masked.index(tok.mask_id)], *hidden, *masked[masked.index(tok.mask_id) + 1 :]] == ids


def test_without_dummy_prefix_words_are_cut_as_in_text():
    tok = trained(add_dummy_prefix=False)
    assert tok.encode(["The baker sold"])[0].tolist()[-len(tok.encode_words(["sold"])[0]) :] == (
        tok.encode_words(["sold"])[0].tolist()
    )


@pytest.fixture(scope="module", params=[{}, {"add_dummy_prefix": False}, {"normalization_rule_name": "nmt_nfkc_cf"}])
def extended(request):
    """A SentencePiece model before and after words were added."""
    before = trained(**request.param)
    content = before.extended(["garde", "covid", "covid-19", "new york"])
    return before, SentencePieceTokenizer(content, "the model")


@pytest.mark.parametrize("text", ["gardener", "The gardeners", "ungarde", "covids", "covid_19", "newyork"])
def test_an_added_word_does_not_cut_longer_words(extended, text):
    before, after = extended
    assert after.encode([text])[0].tolist() == before.encode([text])[0].tolist()


@pytest.mark.parametrize("word", ["garde", "covid", "covid-19", "new york"])
@pytest.mark.parametrize("text", ["{}", "the {} sold", "({}), {}", "the {}\n{}.", "{}'s"])
def test_an_added_word_is_one_token(extended, word, text):
    before, after = extended
    ids = after.encode([text.format(word, word)])[0]
    assert (ids >= before.vocab_size).sum() == text.count("{}")


def test_text_around_an_added_word_is_cut_as_without_it(extended):
    before, after = extended
    text = after.encode(["The baker sold covid keys."])[0].tolist()
    (covid,) = after.encode_words(["covid"])[0].tolist()
    assert text == [*before.encode(["The baker sold"])[0], covid, *before.encode_words(["keys."])[0]]


def test_a_mask_beside_an_added_word(extended):
    _, after = extended
    (covid,) = after.encode_words(["covid"])[0].tolist()
    assert after.encode_with_mask("[MASK] covid [MASK]") == [after.mask_id, covid, after.mask_id]


def test_an_added_word_is_decoded(extended):
    _, after = extended
    assert after.decode(after.encode(["the new york baker"])[0]).lower() == "the new york baker"
