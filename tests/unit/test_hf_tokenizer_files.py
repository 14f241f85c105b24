"""Vocabularies and the settings beside them give the ids that transformers gives, or are refused by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers

from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.hf.folder import open_folder
from tests.helpers import tokenizer_files
from tests.helpers.tokenizer_files import BERT, ROBERTA, TEXT, bert_vocab, folder, vocabulary

UMLAUTS = ("möchte", "mochte", "schön", "schon", "Keys", "keys", "人", "##的", "的")


def cut(path: Path, text: str) -> list[str]:
    tok = load_tokenizer(path)
    return [tok.tokens[i] for i in tok.encode([text])[0]]


@pytest.mark.parametrize(
    ("settings", "text", "tokens"),
    [
        ({"do_lower_case": True}, "möchte schön", ["mochte", "schon"]),
        ({"do_lower_case": True, "strip_accents": None}, "möchte", ["mochte"]),
        ({"do_lower_case": True, "strip_accents": False}, "möchte schön", ["möchte", "schön"]),
        ({"do_lower_case": False, "strip_accents": True}, "möchte Keys", ["mochte", "Keys"]),
        ({"do_lower_case": False}, "Keys möchte", ["Keys", "möchte"]),
        ({"do_lower_case": True, "tokenize_chinese_chars": False}, "人的", ["人", "##的"]),
        ({"do_lower_case": True, "tokenize_chinese_chars": True}, "人的", ["人", "的"]),
    ],
)
def test_settings_beside_vocab_txt(settings, text, tokens, tmp_path):
    assert cut(bert_vocab(tmp_path, *UMLAUTS, **settings), text) == tokens


def test_settings_beside_tokenizer_json_win_as_in_transformers(tmp_path):
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    assert "[UNK]" in cut(folder(tmp_path, tokenizer_files.bert(), tokenizer_config=settings), "KEYS")


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_an_upper_case_vocabulary_of_a_bert_needs_a_word_on_lower_case(file, tmp_path):
    if file == "vocab.txt":
        bert_vocab(tmp_path, "The", "the")
    else:
        folder(tmp_path, tokenizer_files.bert(lowercase=False), config={"model_type": "bert"})
    with pytest.raises(UserError, match='write "do_lower_case": false, or true, in'):
        load_tokenizer(tmp_path)
    folder(tmp_path, tokenizer_config={"do_lower_case": False})
    load_tokenizer(tmp_path)


def test_a_vocabulary_alone_is_lower_case_where_no_token_is_upper_case(tmp_path):
    bert_vocab(tmp_path, "The", "the")
    (tmp_path / "tokenizer_config.json").unlink()
    assert cut(tmp_path, "The the") == ["The", "the"]


def test_a_class_without_settings_of_its_own_takes_tokenizer_json_as_it_is(tmp_path):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}
    path = folder(tmp_path, tokenizer_files.bert(), tokenizer_config=settings)
    assert load_tokenizer(path).content == (path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_lower_case": "false"}, "do_lower_case is 'false'; expected true or false"),
        ({"strip_accents": 0}, "strip_accents is 0; expected true or false"),
        ({"tokenize_chinese_chars": "no"}, "tokenize_chinese_chars is 'no'"),
        ({"never_split": ["keys"]}, "never_split is"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize is False"),
        ({"word_tokenizer_type": "mecab"}, "word_tokenizer_type is 'mecab'"),
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "tokenizer_class is BertJapaneseTokenizer; expected",
        ),
        ({"tokenizer_class": "PhobertTokenizer"}, "tokenizer_class is PhobertTokenizer"),
        ({"additional_special_tokens": "<ent>"}, "is '<ent>'; expected a list of tokens"),
        ({"mask_token": 5}, "mask_token of its tokenizer settings is 5; expected a token"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tokenizer(bert_vocab(tmp_path, *UMLAUTS, **settings))


def test_a_class_that_only_config_json_names_is_refused(tmp_path):
    path = folder(bert_vocab(tmp_path, *UMLAUTS), tokenizer_config={}, config={"tokenizer_class": "PhobertTokenizer"})
    with pytest.raises(UserError, match="tokenizer_class is PhobertTokenizer; expected one of BertTokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", ["{", "[]", "\ufffd", '{"added_tokens_decoder": 5}'])
def test_settings_that_cannot_be_read_are_refused(content, tmp_path):
    path = bert_vocab(tmp_path, *UMLAUTS)
    (path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be read|holds no JSON object"):
        load_tokenizer(path)


def test_added_tokens_json(tmp_path):
    path = bert_vocab(tmp_path, "keys", "co", "##vid")
    folder(path, added_tokens={"covid": 8})
    assert cut(path, "covid keys") == ["covid", "keys"]


def test_added_tokens_decoder(tmp_path):
    token = {"content": "covid", "single_word": True, "lstrip": False, "rstrip": False, "normalized": True}
    path = bert_vocab(tmp_path, "keys", "co", "##vid", "##s", added_tokens_decoder={"9": token})
    assert cut(path, "COVID covids") == ["covid", "co", "##vid", "##s"]


def test_an_added_token_whose_id_does_not_follow_is_refused(tmp_path):
    path = folder(bert_vocab(tmp_path, "keys"), added_tokens={"covid": 40})
    with pytest.raises(UserError, match=r"'covid' has id 40, and vocab.txt leaves it 6"):
        load_tokenizer(path)


def test_special_tokens_that_the_folder_adds_are_special(tmp_path):
    path = bert_vocab(tmp_path, "keys", additional_special_tokens=["<ent>"])
    tok = load_tokenizer(path)
    assert (tok.tokens[-1], bool(tok.is_special[-1])) == ("<ent>", True)


def test_blank_lines_at_the_end_of_vocab_txt_are_no_tokens(tmp_path):
    path = bert_vocab(tmp_path, "keys")
    (path / "vocab.txt").write_text("\n".join([*BERT, "keys"]) + "\n\n\n")
    assert load_tokenizer(path).tokens == [*BERT, "keys"]


def byte_level(path: Path, **settings) -> Path:
    """vocab.json and merges.txt of a RoBERTa."""
    library = vocabulary("byte_level", ROBERTA)
    library.model.save(str(path))
    return folder(path, tokenizer_config={"tokenizer_class": "RobertaTokenizer", **settings})


def test_vocab_json_and_merges_are_byte_level_bpe(tmp_path):
    expected = vocabulary("byte_level", ROBERTA).encode(TEXT[0], add_special_tokens=False).tokens
    assert cut(byte_level(tmp_path), TEXT[0]) == expected


def test_vocab_json_follows_add_prefix_space(tmp_path):
    assert cut(byte_level(tmp_path, add_prefix_space=True), "keys")[0].startswith("Ġ")


@pytest.mark.parametrize("change", ["no merges", "no byte-level", "class"])
def test_other_vocab_json_is_refused(change, tmp_path):
    path = byte_level(tmp_path)
    if change == "no merges":
        (path / "merges.txt").unlink()
    elif change == "class":
        folder(path, tokenizer_config={"tokenizer_class": "CLIPTokenizer"})
    else:
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*ROBERTA, "keys"])}))
    with pytest.raises(UserError, match=r"no byte-level BPE|tokenizer_class is CLIPTokenizer"):
        load_tokenizer(path)


def test_tokenizer_json_is_preferred_to_a_sentencepiece_model(tmp_path):
    path = folder(tmp_path, vocabulary("unigram", ROBERTA))
    (path / "tokenizer.model").write_bytes(b"another tokenizer")
    assert load_tokenizer(path).filename == "tokenizer.json"


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model"])
def test_a_folder_with_a_sentencepiece_model_alone_says_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"a model")
    with pytest.raises(UserError, match=f"no vocab.json, but {name}; name that file .* save a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_unigram_follows_add_prefix_space(tmp_path):
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": False}
    path = folder(tmp_path, vocabulary("unigram", ROBERTA), tokenizer_config=settings)
    assert not cut(path, "keys")[0].startswith("▁")


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "metaspace", "unigram"])
@pytest.mark.parametrize("word", ["covid", "covid-19", "new york", "zyx_9"])
def test_added_words_are_found_whole(kind, word, tmp_path):
    path = folder(tmp_path / "folder", vocabulary(kind))
    (tmp_path / "words").write_text(word)
    tok = load_tokenizer(path, tmp_path / "words")
    ids = tok.encode([f"the {word} sold {word}"])[0].tolist()
    assert ids.count(tok.vocab_size - 1) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    path = folder(tmp_path / "folder", vocabulary("wordpiece"))
    (tmp_path / "words").write_text("covid\r\nzyxogene\r\n", encoding="utf-8-sig")
    assert load_tokenizer(path, tmp_path / "words").tokens[-2:] == ["covid", "zyxogene"]


NORMALIZED = [("cafe\u0301s", "cafés"), ("cafés", "cafe\u0301s"), ("ﬁshy", "fishy"), ("new york", "new\u00a0york")]


@pytest.mark.parametrize("word, text", NORMALIZED)
@pytest.mark.parametrize("kind", ["unigram", "byte_level", "sentencepiece"])
def test_added_words_are_normalized_as_the_text(kind, word, text, tmp_path):
    if kind == "sentencepiece":
        path = train_tokenizer(TEXT, replace(build(base.get_config()).tokenizer, vocab_size=300))
        path.save(tmp_path)
        path = tmp_path / path.filename
    else:
        library = vocabulary(kind)
        library.normalizer = normalizers.NFKC()
        path = folder(tmp_path / "folder", library)
    (tmp_path / "words").write_text(word)
    tok = load_tokenizer(path, tmp_path / "words")
    for spelled in (word, text):
        assert tok.encode([f"the {spelled} sold ({spelled})."])[0].tolist().count(tok.vocab_size - 1) == 2


@pytest.mark.parametrize("word", ["ΣΊΣΥΦΟΣ", "İstanbul", "Covid", "É\u200bclair"])
def test_added_words_are_lower_cased_as_the_text(word, tmp_path):
    path = folder(tmp_path / "folder", tokenizer_files.bert())
    (tmp_path / "words").write_text(word)
    tok = load_tokenizer(path, tmp_path / "words")
    assert tok.vocab_size - 1 in tok.encode([f"the {word} sold"])[0]


@pytest.mark.parametrize("kind", ["bert", "bert_cased", "wordpiece", "byte_level", "metaspace", "unigram"])
@pytest.mark.parametrize("word, text", [("東京", "私は東京に"), ("ไทย", "ภาษาไทยและ")])
def test_added_words_of_scripts_without_spaces_are_found_inside_text(kind, word, text, tmp_path):
    kinds = {"bert": tokenizer_files.bert, "bert_cased": lambda: tokenizer_files.bert(lowercase=False)}
    path = folder(tmp_path / "folder", kinds[kind]() if kind in kinds else vocabulary(kind))
    (tmp_path / "words").write_text(word)
    tok = load_tokenizer(path, tmp_path / "words")
    for sentence in (text, f"the {word} sold"):
        assert tok.vocab_size - 1 in tok.encode([sentence])[0]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "metaspace", "unigram", "bpe"])
@pytest.mark.parametrize("word", ["covid", "Ünïcode", "東京", "½cup"])
def test_added_words_are_decoded_with_their_space_and_letters(kind, word, tmp_path):
    path = folder(tmp_path / "folder", vocabulary(kind))
    (tmp_path / "words").write_text(word)
    tok = load_tokenizer(path, tmp_path / "words")
    assert tok.decode(tok.encode([f"the {word} sold"])[0]) == f"the {word} sold"
    assert tok.decode([tok.vocab_size - 1]) == word


def test_an_added_word_does_not_cut_longer_words(tmp_path):
    path = folder(tmp_path / "folder", tokenizer_files.bert())
    (tmp_path / "words").write_text("bake")
    before, after = load_tokenizer(path), load_tokenizer(path, tmp_path / "words")
    assert after.encode(["bakers"])[0].tolist() == before.encode(["bakers"])[0].tolist()


@pytest.mark.parametrize(("word", "message"), [("[MASK]", "spells a special token"), ("\u200b", "not found as one")])
def test_words_that_cannot_be_added_are_refused(word, message, tmp_path):
    path = folder(tmp_path / "folder", tokenizer_files.bert())
    (tmp_path / "words").write_text(f"covid\n{word}\n")
    with pytest.raises(UserError, match=f"tokenizer.extra_tokens_file: .*words has '{re.escape(word)}', .*{message}"):
        load_tokenizer(path, tmp_path / "words")


def test_roles_outlive_added_words(tmp_path):
    library = vocabulary("byte_level", ROBERTA)
    library.add_special_tokens([AddedToken("[CLS]")])
    path = folder(tmp_path / "folder", library, tokenizer_config={"cls_token": "<s>"})
    (tmp_path / "words").write_text("covid")
    tok = load_tokenizer(path, tmp_path / "words")
    assert tok.tokens[tok.cls_id] == "<s>"


@pytest.mark.parametrize("name", ["bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"])
@pytest.mark.parametrize("opens", [load_tokenizer, open_folder])
def test_a_name_of_the_hub_is_answered_with_how_to_download_it(name, opens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"if it names a model of the Hub, give hf:{name}$"):
        opens(name)


@pytest.mark.parametrize("path", ["/nowhere/tokenizer.json", "tokenizer.json", "runs/a b"])
def test_a_path_is_no_name_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"give a SentencePiece \.model or a tokenizer\.json"):
        load_tokenizer(path)


def test_a_vocabulary_alone_is_answered_with_the_names_of_its_files(tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps({"the": 0, "added_tokens": 1, "model": 2}))
    with pytest.raises(UserError, match=r"encoder.json .* is a vocabulary alone; name it vocab.json, with merges.txt"):
        load_tokenizer(tmp_path / "encoder.json")
