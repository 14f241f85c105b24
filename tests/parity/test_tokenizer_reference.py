"""Tokenizers of Hugging Face folders give the ids that transformers gives.

Run by `bash launch/test.sh --references`.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from flax_mlm.data.sources.base import TextChunk
from flax_mlm.data.symbol_training import Symbols, make_tokenizer
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.hf import tokenizer_json
from tests.helpers.tokenizer_files import BERT, ROBERTA, TEXT, bert, bert_vocab, folder, vocabulary

transformers = pytest.importorskip("transformers", "5", reason="the reference needs transformers 5")

WORDS = (
    "möchte",
    "mochte",
    "schön",
    "schon",
    "Keys",
    "keys",
    "the",
    "##s",
    "人",
    "##的",
    "的",
    "co",
    "##vid",
    "İ",
    "i",
)
TEXTS = [
    "",
    " ",
    "The baker sold keys",
    "möchte schön Keys İ",
    "人的 keys人",
    "two  spaces\tand\ttabs",
    "un.known,covids 🙂",
]
MARKED = ["un<mask>able", "The <mask> sold", "<mask> sold keys", "sold <mask>.", "a <mask> <mask> b"]
EURO = ("<|pad|>", "<|unk|>", "<|begin_of_text|>", "<|end_of_text|>", "<|mask|>")
GEMMA = ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>")


def check(ours: Path, theirs, texts=TEXTS) -> None:
    tok = load_tokenizer(ours)
    for text in texts:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert tok.encode([text])[0].tolist() == expected, text
    spelled = {role: getattr(theirs, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask")}
    named = {role: i for role, i in spelled.items() if i is not None}
    assert {role: getattr(tok, f"{role}_id") for role in named} == named


@pytest.mark.parametrize("settings", [
    {},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": True, "strip_accents": None},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
    {"do_lower_case": True, "additional_special_tokens": ["<ent>"]},
    {"do_lower_case": True, "added_tokens_decoder": {"20": {"content": "covid", "normalized": True}}},
])  # fmt: skip
def test_vocab_txt(settings, tmp_path):
    settings = {"do_lower_case": True, **settings}
    path = bert_vocab(tmp_path, *WORDS, **settings)
    check(path, transformers.BertTokenizer.from_pretrained(path))


def test_vocab_txt_with_added_tokens(tmp_path):
    path = folder(bert_vocab(tmp_path, *WORDS, do_lower_case=True), added_tokens={"covid": 20, "New York": 21})
    check(path, transformers.BertTokenizer.from_pretrained(path), [*TEXTS, "in New York covid", "COVID"])


@pytest.mark.parametrize("settings", [{"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}])
@pytest.mark.parametrize("lowercase", [True, False])
def test_settings_beside_tokenizer_json(settings, lowercase, tmp_path):
    path = folder(tmp_path, bert(lowercase), tokenizer_config={"tokenizer_class": "BertTokenizer", **settings})
    check(path, transformers.BertTokenizer.from_pretrained(path), [*TEXTS, *TEXT[:1]])


@pytest.mark.parametrize("changes", [
    {"normalizer": None},
    {"normalizer": {"type": "NFC"}},
    {"normalizer": {"type": "BertNormalizer", "handle_chinese_chars": False, "strip_accents": False}},
    {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    {"max_input_chars_per_word": 4},
    {"post_processor": None},
])  # fmt: skip
@pytest.mark.parametrize("files", [
    {"tokenizer_config": {"tokenizer_class": "BertTokenizerFast"}},
    {"config": {"model_type": "distilbert"}},
])  # fmt: skip
def test_a_class_of_bert_makes_the_tokenizer_anew_of_the_vocabulary(changes, files, tmp_path):
    spec = json.loads(bert().to_str())
    spec["model"] |= {key: x for key, x in changes.items() if key in spec["model"]}
    if "clean_text" in (spec["normalizer"] or {}) and changes.get("normalizer"):
        changes = {"normalizer": {**spec["normalizer"], **changes["normalizer"]}}
    spec |= {key: x for key, x in changes.items() if key in spec}
    path = folder(tmp_path, spec, **files)
    check(path, transformers.AutoTokenizer.from_pretrained(path), [*TEXTS, *TEXT[:1]])
    assert load_tokenizer(path).puts_ends


@pytest.mark.parametrize("add_prefix_space", [False, True, None])
def test_vocab_json(add_prefix_space, tmp_path):
    vocabulary("byte_level", ROBERTA).model.save(str(tmp_path))
    settings = {} if add_prefix_space is None else {"add_prefix_space": add_prefix_space}
    folder(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizer", **settings})
    check(tmp_path, transformers.RobertaTokenizer.from_pretrained(tmp_path), [*TEXTS, *TEXT[:1]])


@pytest.mark.parametrize("special", [BERT, ROBERTA, EURO, GEMMA])
@pytest.mark.parametrize("kind", ["unigram", "byte_level", "metaspace"])
@pytest.mark.parametrize("names", [("bos", "eos"), ("cls", "sep")])
def test_roles(special, kind, names, tmp_path):
    roles = dict(zip(("pad", "unk", *names, "mask"), special, strict=True))
    settings = {f"{role}_token": token for role, token in roles.items()}
    path = folder(tmp_path, vocabulary(kind, special), tokenizer_config=settings)
    check(path, transformers.PreTrainedTokenizerFast.from_pretrained(path))


def test_special_tokens_that_the_vocabulary_lacks(tmp_path):
    names = dict(zip(("pad", "bos", "cls", "sep", "mask"), ("<pad>", "<bos>", "<cls>", "<sep>", "<mask>"), strict=True))
    settings = {f"{role}_token": token for role, token in names.items()}
    path = folder(tmp_path, vocabulary("byte_level", ("<unk>",)), tokenizer_config=settings)
    check(path, transformers.PreTrainedTokenizerFast.from_pretrained(path))


def test_roles_beside_other_spellings(tmp_path):
    library = vocabulary("byte_level", ROBERTA)
    library.add_special_tokens(["[SEP]", "[CLS]"])
    settings = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    path = folder(tmp_path, library, tokenizer_config=settings)
    check(path, transformers.PreTrainedTokenizerFast.from_pretrained(path))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_special_tokens_in_text_are_text(kind, tmp_path):
    """Not where the model itself finds them, which split_special_tokens does not prevent."""
    library = vocabulary(kind, ROBERTA)
    path = folder(tmp_path, library, tokenizer_config={"mask_token": "<mask>", "pad_token": "<pad>"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path, split_special_tokens=True)
    check(path, theirs, ["sold<s>keys</s>", "the<pad>keys", "un<mask>able"])


@pytest.mark.parametrize("text", MARKED)
@pytest.mark.parametrize("scheme", ["always", "first", "never", "byte-level", "byte-level with prefix"])
def test_masks(text, scheme, tmp_path):
    spec = json.loads(vocabulary("byte_level" if "byte" in scheme else "metaspace", ROBERTA).to_str())
    spec["added_tokens"][ROBERTA.index("<mask>")]["lstrip"] = True
    library = Tokenizer.from_str(json.dumps(spec))
    if "byte" in scheme:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="with" in scheme)
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    path = folder(tmp_path, library, tokenizer_config={"mask_token": "<mask>"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ours = load_tokenizer(path).encode_with_mask(text.replace("<mask>", "[MASK]"))
    assert ours == theirs(text, add_special_tokens=False)["input_ids"]


FLAGS = {"rstrip": False, "normalized": False, "single_word": False, "special": True, "content": "<mask>"}
ADDED = {"__type": "AddedToken", **FLAGS}


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram", "wordpiece", "bpe", "wordlevel"])
@pytest.mark.parametrize("strips", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("settings", [
    {},
    {"mask_token": {**ADDED, "lstrip": True}},
    {"mask_token": {**ADDED, "lstrip": False}},
    {"mask_token": "<mask>", "added_tokens_decoder": {**FLAGS, "lstrip": True}},
    {"mask_token": "<mask>", "added_tokens_decoder": {**FLAGS, "lstrip": False}},
])  # fmt: skip
def test_space_around_masks(kind, strips, settings, tmp_path):
    spec = json.loads(vocabulary(kind, ROBERTA).to_str())
    mask = next(token for token in spec["added_tokens"] if token["content"] == "<mask>")
    mask["lstrip"], mask["rstrip"] = strips
    if "added_tokens_decoder" in settings:
        settings = {**settings, "added_tokens_decoder": {str(mask["id"]): settings["added_tokens_decoder"]}}
    path = folder(tmp_path, spec, tokenizer_config={"mask_token": "<mask>"} | settings)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    tok = load_tokenizer(path)
    for text in [*MARKED, "a  <mask>", "a<mask> b", "<mask>", "a <mask><mask>"]:
        assert tok.encode_with_mask(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_every_part_of_a_tokenizer_json(tmp_path):
    library = vocabulary("metaspace", ROBERTA)
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    library.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 2), ("</s>", 3)])
    library.enable_padding(pad_token="<pad>")
    path = folder(tmp_path, library, tokenizer_config={"mask_token": "<mask>"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    theirs.backend_tokenizer.no_padding()
    check(path, theirs)


@pytest.mark.parametrize("kind", ["characters", "separated"])
def test_symbols_have_the_ids_of_transformers_after_export(tmp_path, kind):
    texts = {"characters": ["MKTAYIAKQR", "mkq*é", "人", "MKX"], "separated": ["login view:12 buy", "a  b\tlogin", "é"]}
    symbols = Symbols()
    for text in texts[kind][:2]:
        symbols.separated += symbols.add(TextChunk(0, 0, text), is_counted=True)
    tok = make_tokenizer(symbols, 99, lambda line: None)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.content(tok, 1))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_json.settings(tok, 64, 2)))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    check(tmp_path, theirs, ["", " ", *texts[kind]])
    for text in texts[kind]:
        ids = tok.encode([text])[0].tolist()
        assert theirs(text)["input_ids"] == [tok.cls_id, *ids, tok.sep_id]
        pair = theirs(text, text)
        assert pair["input_ids"] == [tok.cls_id, *ids, tok.sep_id, *ids, tok.sep_id]
        assert pair["token_type_ids"] == [0] * (len(ids) + 2) + [1] * (len(ids) + 1)
        assert theirs.decode(ids, skip_special_tokens=True) == tok.decode(ids)
        masked = f"{text} [MASK]{text}"
        assert tok.encode_with_mask(masked) == theirs(masked, add_special_tokens=False)["input_ids"]
