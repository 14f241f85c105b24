"""Vocabularies of symbols: characters, or what whitespace separates."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.data import json_tokenizer, symbol_training
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.prepare import merge, prepare_shard
from flax_mlm.data.sources.base import TextChunk
from flax_mlm.data.sources.open import open_source
from flax_mlm.data.symbol_training import Symbols, make_tokenizer
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.hf import tokenizer_json
from tests.helpers.preparing import config, contents, make, rows
from tests.helpers.sources import units_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PROTEINS = ["MKTAYIAKQR", "MAAAK", "mkq*"]
EVENTS = ["login view:12 buy", "login login", "login"]


def tokenizer_of(texts: list[str], vocab_size: int = 99, log=lambda line: None) -> Tokenizer:
    symbols = Symbols()
    for text in texts:
        symbols.documents += 1
        symbols.separated += symbols.add(TextChunk(0, 0, text), is_counted=True)
    return make_tokenizer(symbols, vocab_size, log)


def test_characters_are_symbols_where_no_text_has_whitespace():
    tok = tokenizer_of(PROTEINS)
    assert tok.tokens == [*SPECIAL, "A", "K", "M", "*", "I", "Q", "R", "T", "Y", "k", "m", "q"]
    assert (tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id) == (0, 1, 2, 3, 4)
    assert [ids.tolist() for ids in tok.encode(["MAK", "", "Mé"])] == [[7, 5, 6], [], [7, 1]]
    assert tok.decode([2, 7, 5, 6, 3]) == "MAK"


def test_symbols_stand_between_whitespace_where_a_text_has_some():
    tok = tokenizer_of(EVENTS)
    assert tok.tokens == [*SPECIAL, "login", "buy", "view:12"]
    assert tok.encode(["buy\tlogin\nelse"])[0].tolist() == [6, 5, 1]
    assert tok.decode([2, 6, 5, 3]) == "buy login"


def test_the_rarest_symbols_have_no_token_and_this_is_said():
    lines: list[str] = []
    tok = tokenizer_of(["a a a b b c", "c d d [MASK]"], 7, lines.append)
    assert tok.tokens == [*SPECIAL, "a", "b"]
    assert lines[0] == "tokenizer: 2 symbols, between whitespace"
    assert lines[1].startswith("tokenizer: 3 rarer or special symbols, 50.00% of the text, have no token")


@pytest.mark.parametrize("texts", [PROTEINS, ["C[C@H](O)C", "[MASK]"], EVENTS, ["a [MASK] [CLS] b"]])
def test_no_text_becomes_a_special_token(texts):
    tok = tokenizer_of(texts)
    special = {tok.pad_id, tok.cls_id, tok.sep_id, tok.mask_id}
    for ids in tok.encode(["[MASK]", "a [PAD] [SEP] [CLS] b", "[CLS]"]):
        assert not special & set(ids.tolist())


def test_masks_are_found_beside_symbols():
    assert tokenizer_of(PROTEINS).encode_with_mask("MK[MASK] A [MASK]") == [7, 6, 4, 5, 4]
    assert tokenizer_of(EVENTS).encode_with_mask("login [MASK] buy") == [5, 4, 6]
    assert tokenizer_of(PROTEINS).encode_answer("K", "M[MASK]") == [6]


def test_each_symbol_is_a_word_for_masking():
    for tok in (tokenizer_of(PROTEINS), tokenizer_of(EVENTS)):
        tok.require_words("whole_word")
        assert tok.starts_word.all()


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=30))
def test_characters_have_the_ids_of_the_library(texts, other):
    texts = ["".join(text.split()) for text in texts]
    tok = tokenizer_of([*texts, "x"])
    library = tokenizers.Tokenizer.from_str(tok.content.decode())
    for text in (*texts, other):
        text = text.replace("[", "")  # which could spell a special token for the library
        assert tok.encode([text])[0].tolist() == library.encode(text, add_special_tokens=False).ids
        assert tok.encode([text])[0].tolist() == json_tokenizer._encode(tok._encoder, [text])[0].tolist()


@pytest.mark.parametrize("pair_type", [0, 1])
@pytest.mark.parametrize("texts", [PROTEINS, EVENTS])
def test_the_file_is_what_is_exported(texts, pair_type):
    tok = tokenizer_of(texts)
    assert tokenizer_json.content(tok, pair_type) == tok.content
    assert tok.puts_ends
    library = tokenizers.Tokenizer.from_str(tok.content.decode())
    first, second = (ids.tolist() for ids in tok.encode(texts[:2]))
    pair = library.encode(texts[0], texts[1])
    assert pair.ids == [2, *first, 3, *second, 3]
    assert pair.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)


@settings(deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=6).filter(str.strip), min_size=2, max_size=9), st.integers(1, 20))
def test_the_vocabulary_does_not_depend_on_the_units(tmp_path_factory, texts, size):
    file = tmp_path_factory.mktemp("symbols") / "a"
    file.write_text("\n".join(["ab", *texts]))
    expected = symbol_training.count_symbols(open_source(f"symbols:{file}"), 0.0).counts()
    with units_of(size), pytest.MonkeyPatch.context() as m:
        m.setattr(symbol_training, "_BATCH_CHARS", 3)
        assert symbol_training.count_symbols(open_source(f"symbols:{file}"), 0.0).counts() == expected


def test_too_many_symbols_are_refused_with_their_reason(monkeypatch):
    monkeypatch.setattr(symbol_training, "MAX_SYMBOLS", 3)
    assert tokenizer_of([*"abcdef"]).vocab_size == 11
    with pytest.raises(UserError, match=r"more than 3 different symbols, which whitespace separates, as in 'g h'"):
        tokenizer_of([*"abcdef", "g h"])


def test_rare_whitespace_is_warned_of(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join([*PROTEINS, "M K"]))
    lines: list[str] = []
    source = open_source(f"symbols:{tmp_path}/a.txt")
    make_tokenizer(symbol_training.count_symbols(source, 0.0), 99, lines.append)
    assert lines[0].startswith("warning: only 1 of 4 documents have whitespace in them, such as 'M K' in")
    assert lines[0].endswith("a.txt; without it, each character would be a symbol")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [([], 99, "the training documents hold none"), (["a"], 5, "vocab_size is 5; expected at least 6")],
)
def test_what_cannot_be_a_vocabulary_is_refused(texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        tokenizer_of(texts, vocab_size)


def test_words_are_not_added_to_characters(tmp_path):
    tokenizer_of(PROTEINS).save(tmp_path)
    (tmp_path / "words").write_text("B\n")
    with pytest.raises(UserError, match=r"extra_tokens_file adds words, and each token of this vocabulary is one char"):
        load_tokenizer(tmp_path, tmp_path / "words")


def documents(corpus: Path) -> list[str]:
    """The texts of a corpus's rows, sorted."""
    tok = load_tokenizer(corpus)
    found = []
    for split in ("train", "validation"):
        rows = Corpus.open(corpus).split(split)
        ids = rows.read(np.arange(rows.num_rows)).ravel()
        found += [tok.decode(part) for part in np.split(ids, np.flatnonzero(ids == tok.cls_id))]
    return sorted(filter(None, found))


def test_a_corpus_of_symbols_holds_its_sequences(tmp_path):
    rng = np.random.default_rng(0)
    proteins = sorted({"".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(5, 29))) for _ in range(300)})
    (tmp_path / "a.fasta").write_text("".join(f">{i}\n{p}\n" for i, p in enumerate(proteins)))
    (tmp_path / "a.txt").write_text("\n".join(proteins))
    for source in ("fasta:{}/a.fasta", "symbols:{}/a.txt"):
        changes = {"data.source": source.format(tmp_path), "tokenizer.model_type": "symbols"}
        corpus = make(changes | {"objective.masking": "whole_word"}, tmp_path / source[:5], 1000)
        assert documents(corpus) == proteins
        assert Corpus.open(corpus).vocab_size == 25


def test_every_format_gives_the_same_corpus(tmp_path):
    rng = np.random.default_rng(0)
    proteins = sorted({"".join(rng.choice(list("ACDEFGHIKL"), rng.integers(5, 90))) for _ in range(600)})
    tags = (f'<doc id="{i}" url="u" title="t">\n{p}\n\n</doc>\n' for i, p in enumerate(proteins))
    objects = [json.dumps({"id": str(i), "text": p}) + "\n" for i, p in enumerate(proteins)]
    files = {
        "fasta:a.fasta": "".join(f">{i}\n{p[:60]}\n{p[60:]}\n" for i, p in enumerate(proteins)),
        "symbols:a.txt": "\n".join(proteins),
        "text:b.txt": "\n\n".join(proteins),
        "jsonl:a.jsonl": "".join(objects),
        "wikiextractor:wiki_00": "".join(tags),
        "wikiextractor:wiki_01": "".join(objects),
    }
    changes = {"tokenizer.model_type": "symbols", "data.validation_fraction": 0.2}
    corpora = []
    for source, content in files.items():
        kind, _, name = source.partition(":")
        (tmp_path / name).write_text(content)
        corpora.append(
            make(changes | {"data.source": f"{kind}:{tmp_path}/{name}"}, tmp_path / f"{name}.corpus", 1 << 26)
        )
    ids = load_tokenizer(corpora[0]).encode(proteins)
    np.save(tmp_path / "a.npy", np.concatenate([np.append(document, 3) for document in ids]))
    (tmp_path / "a.json").write_text('{"document_end": 3}')
    changes |= {"data.source": f"ids:{tmp_path}/a.npy", "tokenizer.path": str(corpora[0])}
    corpora.append(make(changes, tmp_path / "ids", 1 << 26))
    expected = rows(corpora[0])
    assert len(expected) == 4
    for corpus in corpora[1:]:
        assert rows(corpus) == expected, corpus.name
        assert (corpus / "tokenizer.json").read_bytes() == (corpora[0] / "tokenizer.json").read_bytes()


def test_shards_give_the_same_corpus(tmp_path):
    rng = np.random.default_rng(0)
    proteins = ("".join(rng.choice(list("ACDEFGHIKL"), 50)) for _ in range(400))
    (tmp_path / "a.fasta").write_text("".join(f">p\n{p}\n" for p in proteins))
    changes = {"data.source": f"fasta:{tmp_path}/a.fasta", "tokenizer.model_type": "symbols"}
    expected = make(changes, tmp_path / "alone", 2000)
    with units_of(2000):
        for shard in (3, 1, 2):
            prepare_shard(config(changes), tmp_path / "shards", shard, 3, lambda line: None)
        merge(config(changes), tmp_path / "shards", lambda line: None)
    assert len(list(expected.iterdir())) > 20
    assert contents(tmp_path / "shards") == contents(expected)


def test_held_out_symbols_have_no_token(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(chr(0x4E00 + i) * 3 for i in range(100)))
    changes = {"data.source": f"symbols:{tmp_path}/a.txt", "tokenizer.model_type": "symbols"}
    corpus = make(changes | {"data.validation_fraction": 0.3}, tmp_path / "corpus", 1 << 20)
    held_out = json.loads((corpus / "corpus.json").read_text())["splits"]["validation"]["documents"]
    assert Corpus.open(corpus).vocab_size == 5 + 100 - held_out


def test_bpe_may_be_trained_on_sequences(tmp_path):
    rng = np.random.default_rng(0)
    lines = (f">{i}\n{''.join(rng.choice(list('ACDEFGHIKL'), 50))}\n" for i in range(200))
    (tmp_path / "a.fasta").write_text("".join(lines))
    corpus = make({"data.source": f"fasta:{tmp_path}/a.fasta"}, tmp_path / "corpus", 1 << 20)
    assert Corpus.open(corpus).vocab_size == 500
