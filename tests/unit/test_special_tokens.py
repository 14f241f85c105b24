"""No text becomes a special token, and special tokens are those that the folder names."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from flax_mlm.data.json_tokenizer import HuggingFaceTokenizer
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError
from tests.helpers import tokenizer_files
from tests.helpers.tokenizer_files import BERT, ROBERTA, TEXT, folder, vocabulary

TOKENS = ("<pad>", "<s>", "</s>", "<mask>", "keys")
KINDS = ["unigram", "wordlevel", "wordpiece", "bpe", "metaspace", "byte_level"]


@pytest.fixture(scope="module", params=KINDS)
def library(request) -> Tokenizer:
    return vocabulary(request.param, ROBERTA)


@pytest.fixture(scope="module")
def tok(library):
    return HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer")


@pytest.mark.parametrize("text", ["{}", "the {} baker", "{}{}", " {} ", "the{}"])
@pytest.mark.parametrize("token", [*ROBERTA, *BERT])
def test_text_that_spells_a_special_token_is_text(tok, token, text):
    ids = tok.encode([text.format(token, token)])[0]
    assert not tok.is_special[ids[ids != tok.unk_id]].any()


def test_words_that_spell_a_special_token_are_text(tok):
    ids = np.concatenate(tok.encode_words([*ROBERTA]))
    assert not tok.is_special[ids[ids != tok.unk_id]].any()


def test_a_mask_may_be_spelled_as_the_vocabulary_spells_it(tok):
    ids = tok.encode_with_mask("the [MASK] <mask> </s> keys")
    assert [i for i in ids if tok.is_special[i] and i != tok.unk_id] == [tok.mask_id] * 2
    assert tok.encode_with_mask("the <mask> keys") == tok.encode_with_mask("the [MASK] keys")
    assert tok.encode_answer("baker", "the <mask> keys") == tok.encode_answer("baker", "the [MASK] keys")


def test_other_text_has_the_ids_of_the_library(library, tok):
    assert tok.encode(TEXT[:1])[0].tolist() == library.encode(TEXT[0], add_special_tokens=False).ids


def test_a_merge_that_spells_a_special_token_is_not_made():
    library = vocabulary("bpe", BERT)  # the training text spells [MASK], so merges make it
    tok = HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer")
    assert tok.mask_id not in tok.encode(["the [MASK] sold"])[0]


def test_a_word_that_ignores_merges_is_no_special_token():
    spec = json.loads(vocabulary("byte_level", ROBERTA).to_str())
    spec["model"]["ignore_merges"] = True
    tok = HuggingFaceTokenizer(json.dumps(spec).encode(), "a tokenizer")
    assert not tok.is_special[tok.encode(["</s>"])[0]].any()


def test_special_tokens_beyond_the_five_are_not_found_in_text():
    library = vocabulary("unigram", ROBERTA)
    library.add_tokens([AddedToken("<sep>", special=True), AddedToken("covid", special=False)])
    tok = HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer")
    ids = tok.encode(["<sep> covid"])[0]
    assert ids.tolist().count(library.token_to_id("covid")) == 1
    assert not tok.is_special[ids[ids != tok.unk_id]].any()


def test_decoding_leaves_out_special_tokens_that_only_the_model_holds():
    spec = json.loads(vocabulary("wordlevel", BERT).to_str()) | {"added_tokens": []}
    tok = HuggingFaceTokenizer(json.dumps(spec).encode(), "a tokenizer")
    assert tok.decode([tok.cls_id, *tok.encode(["baker sold"])[0], tok.sep_id]) == "baker sold"


def test_the_type_of_the_model_may_be_absent(library, tmp_path):
    spec = json.loads(library.to_str())
    whole = load_tokenizer(folder(tmp_path / "whole", spec))
    del spec["model"]["type"]
    old = load_tokenizer(folder(tmp_path / "old", spec))
    assert old.encode(TEXT[:1])[0].tolist() == whole.encode(TEXT[:1])[0].tolist()


@pytest.mark.parametrize("absent", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "padding"])
def test_optional_parts_may_be_absent(absent, tmp_path):
    spec = json.loads(vocabulary("wordpiece").to_str())
    del spec[absent]
    assert load_tokenizer(folder(tmp_path, spec)).mask_id == 4


def test_dropout_of_merges_is_off():
    spec = json.loads(vocabulary("byte_level").to_str())
    expected = HuggingFaceTokenizer(json.dumps(spec).encode(), "the file").encode(TEXT[:1])[0].tolist()
    spec["model"]["dropout"] = 0.5
    found = HuggingFaceTokenizer(json.dumps(spec).encode(), "the file").encode(TEXT)
    assert [ids.tolist() for ids in found] == [expected] * len(TEXT)


def test_the_ids_of_added_tokens_are_those_of_the_library(tmp_path):
    spec = json.loads(vocabulary("unigram", ROBERTA).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"].append({"id": 5000, "content": "covid", **flags})
    tok = load_tokenizer(folder(tmp_path, spec))
    assert tok.tokens[-1] == "covid"


@pytest.mark.parametrize("special", [
    ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>"),
    ("<|pad|>", "<|unk|>", "<|begin_of_text|>", "<|end_of_text|>", "<|mask|>"),
])  # fmt: skip
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("where", ["tokenizer_config", "special_tokens_map"])
def test_roles_are_those_of_the_folder(special, as_dict, where, tmp_path):
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token", "mask_token"), special, strict=True))
    named = {name: {"content": token, "lstrip": False} if as_dict else token for name, token in names.items()}
    tok = load_tokenizer(folder(tmp_path, vocabulary("byte_level", special), **{where: named}))
    ids = tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id
    assert tuple(tok.tokens[i] for i in ids) == special


def with_separators(path, **files):
    """A RoBERTa to which [SEP] and [CLS] were added."""
    library = vocabulary("byte_level", ROBERTA)
    library.add_special_tokens(["[SEP]", "[CLS]"])
    return folder(path, library, **files)


def test_a_folder_that_names_its_tokens_keeps_them_where_others_were_added(tmp_path):
    tok = load_tokenizer(with_separators(tmp_path, tokenizer_config={"cls_token": "<s>", "sep_token": "</s>"}))
    assert (tok.tokens[tok.cls_id], tok.tokens[tok.sep_id]) == ("<s>", "</s>")


def test_the_post_processor_tells_the_ends_of_a_text(tmp_path):
    path = with_separators(tmp_path)
    library = Tokenizer.from_file(str(path / "tokenizer.json"))
    library.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    tok = load_tokenizer(folder(path, library))
    assert (tok.tokens[tok.cls_id], tok.tokens[tok.sep_id]) == ("<s>", "</s>")


def test_roles_are_stored_with_the_tokenizer(tmp_path):
    tok = load_tokenizer(with_separators(tmp_path, tokenizer_config={"cls_token": "<s>", "sep_token": "</s>"}))
    (tmp_path / "stored").mkdir()
    tok.save(tmp_path / "stored")
    again = load_tokenizer(tmp_path / "stored")
    assert (again.cls_id, again.sep_id, again.fingerprint) == (tok.cls_id, tok.sep_id, tok.fingerprint)


def test_a_file_whose_tokens_are_spelled_as_usual_is_stored_as_it_is(tmp_path):
    names = {f"{role}_token": token for role, token in zip(("pad", "unk", "cls", "sep", "mask"), BERT, strict=True)}
    library = tokenizer_files.bert()
    library.post_processor = processors.BertProcessing(
        *((token, library.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
    )
    path = folder(tmp_path, library, tokenizer_config={"tokenizer_class": "BertTokenizer", **names})
    assert load_tokenizer(path).content == (path / "tokenizer.json").read_bytes()


def test_a_role_without_token_names_the_field(tmp_path):
    with pytest.raises(
        UserError, match=r"has no \[PAD\] or <pad> token; name .* in tokenizer_config.json beside it as pad_token"
    ):
        load_tokenizer(folder(tmp_path, vocabulary("byte_level", ("<|endoftext|>", "<s>", "</s>", "<mask>"))))


def test_one_token_for_two_roles_is_refused(tmp_path):
    settings = {"cls_token": "<s>", "sep_token": "<s>"}
    with pytest.raises(UserError, match="has one token, <s>, for two"):
        load_tokenizer(folder(tmp_path, vocabulary("byte_level", ROBERTA), tokenizer_config=settings))


def test_without_an_unknown_token_the_mask_stands_for_what_has_no_token(tmp_path):
    tok = load_tokenizer(folder(tmp_path, vocabulary("byte_level", ("<pad>", "<s>", "</s>", "<mask>"))))
    assert tok.unk_id == tok.mask_id


@pytest.mark.parametrize("model", [
    models.WordPiece({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"),
    models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"),
    models.Unigram([(token, -1.0) for token in TOKENS]),
])  # fmt: skip
def test_models_that_need_an_unknown_token_get_the_mask(model):
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer")
    assert tok.encode(["keys é keys"])[0].tolist() == [4, tok.mask_id, 4]
    assert tok.encode_with_mask("é [MASK]") == [tok.mask_id] * 2


def test_an_unknown_token_that_the_model_cannot_make_is_asked_for():
    library = Tokenizer(models.WordPiece({"keys": 0}, unk_token="[UNK]"))
    library.add_special_tokens(["<pad>", "<s>", "</s>", "<mask>"])
    with pytest.raises(UserError, match="has no unknown token, and <mask> is none of its model's tokens; add one"):
        HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer")


@pytest.mark.parametrize("template, puts", [(None, False), ("$A </s>", False), ("<s> $A </s>", True)])
def test_a_template_without_ends_is_known(template, puts):
    library = vocabulary("byte_level", ROBERTA)
    ids = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    library.post_processor = template and processors.TemplateProcessing(template, special_tokens=ids)
    assert HuggingFaceTokenizer(library.to_str().encode(), "a tokenizer").puts_ends == puts


@pytest.mark.parametrize("text", ["un[MASK]able", "the [MASK] keys", "[MASK] sold", "sold [MASK].", "[MASK] [MASK]"])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("lstrip", [False, True])
def test_masks_are_found_as_by_the_library(text, scheme, lstrip, tmp_path):
    library = vocabulary("metaspace", ROBERTA)
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tok = load_tokenizer(folder(tmp_path, with_mask(library, lstrip=lstrip)))
    theirs = Tokenizer.from_str(json.dumps(with_mask(library, lstrip=lstrip)))
    assert tok.encode_with_mask(text) == theirs.encode(text.replace("[MASK]", "<mask>"), add_special_tokens=False).ids


def with_mask(library: Tokenizer, **flags: bool) -> dict:
    """The content of a tokenizer.json, with other flags of its mask."""
    spec = json.loads(library.to_str())
    for token in spec["added_tokens"]:
        token |= flags if token["content"] == "<mask>" else {}
    return spec


@pytest.mark.parametrize(
    "lstrip, expected", [(True, ["The", "<mask>", "Ġsold"]), (False, ["The", "Ġ", "<mask>", "Ġsold"])]
)
@pytest.mark.parametrize("where", ["tokenizer_json", "added_tokens_decoder", "mask_token"])
def test_the_space_before_a_mask_is_kept_unless_the_mask_strips_it(where, lstrip, expected, tmp_path):
    spec, settings = with_mask(vocabulary("byte_level", ROBERTA), lstrip=lstrip), {}
    flags = {"lstrip": lstrip, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    if where == "added_tokens_decoder":  # goes before tokenizer.json
        spec = with_mask(vocabulary("byte_level", ROBERTA), lstrip=not lstrip)
        settings = {"added_tokens_decoder": {"4": {"content": "<mask>", **flags}}}
    elif where == "mask_token":  # counts where tokenizer.json has no flags
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<mask>"]
        settings = {"mask_token": {"content": "<mask>", **flags}}
    tok = load_tokenizer(folder(tmp_path, spec, tokenizer_config=settings))
    tokens = [tok.tokens[i] for i in tok.encode_with_mask("The <mask> sold")]
    assert [t for t in tokens if t not in ("T", "h", "e", "The")] == [t for t in expected if t != "The"]
    assert tok.tokens[tok.encode_answer("keys", "The <mask> sold")[0]].startswith("Ġ") == lstrip
