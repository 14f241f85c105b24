"""Ids that were made elsewhere become the corpus that their text would become."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from flax_mlm.data.sources import ids as ids_source
from flax_mlm.data.sources.open import Options, open_source
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.errors import UserError
from tests.helpers.preparing import check_kills, make, rows
from tests.helpers.sources import read, read_ids, units_of

END = 2  # </s>, as in files of RoBERTa's ids


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Documents, one of them long, with letters of several bytes, line ends and spaces in a row."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "baker", "sold", "Zürich", "人", "🙂", "keys,", "to\n\nthe", " two", "x" * 30])
    texts = [" ".join(words[rng.integers(0, len(words), rng.integers(1, 80))]) for _ in range(400)]
    return [*texts, " ".join(words[rng.integers(0, len(words), 60_000)]), "last"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, documents) -> str:
    """A byte-level BPE, which loses nothing."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    t.save(str(folder / "tokenizer.json"))
    return str(folder)


def write(file: Path, documents: list[list[int]], end: int = END, dtype: str = "uint16", ends: bool = True) -> Path:
    """Writes documents as ids, with their side file."""
    ids = np.array([i for document in documents for i in (*document, end)][: None if ends else -1], dtype)
    if file.suffix == ".npy":
        np.save(file, ids)
    else:
        ids.tofile(file)
    about: dict[str, Any] = {"dtype": dtype, "document_end": end}
    file.with_suffix(".json").write_text(json.dumps(about))
    return file


def encoded(tokenizer: str, documents: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in load_tokenizer(tokenizer).encode(documents)]


FORMS = [("a.bin", "uint16"), ("a.bin", "uint32"), ("a.npy", "uint16"), ("a.npy", "int64"), ("a.npy", ">i4")]


@pytest.mark.parametrize(("name", "dtype"), FORMS)
@pytest.mark.parametrize("ends", [True, False])
def test_documents_have_their_ids_and_their_text(tmp_path, tokenizer, documents, name, dtype, ends):
    ids = encoded(tokenizer, documents)
    file = write(tmp_path / name, ids, dtype=dtype, ends=ends)
    options = Options(tokenizer_path=tokenizer)
    assert read_ids(f"ids:{file}", options) == ids
    assert read(f"ids:{tmp_path}/*", options)[0] == documents
    sizes = [len(chunk.ids) for chunk in open_source(f"ids:{file}", options).chunks()]
    assert max(sizes) <= ids_source._CHUNK_IDS
    assert len(sizes) > len(documents)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_corpus_is_that_of_the_same_text_with_the_same_tokenizer(tmp_path, tokenizer, documents, kind):
    texts = [text for text in documents if len(text) < 60_000]
    changes: dict[str, Any] = {"data.validation_fraction": 0.2}
    if kind == "sentencepiece":  # whose decoding puts a space for any whitespace
        texts = [" ".join(text.split()) for text in texts]
        (tmp_path / "text.txt").write_text("\n\n".join(texts))
        changes["tokenizer.vocab_size"] = 340
        trained = make(changes | {"data.source": f"text:{tmp_path}/text.txt"}, tmp_path / "trained", 1 << 26)
        tokenizer, end = str(trained / "tokenizer.model"), 3
    else:
        end = END
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write(tmp_path / "a.bin", encoded(tokenizer, texts), end)
    changes["tokenizer.path"] = tokenizer
    corpora = [
        make(changes | {"data.source": source}, tmp_path / source[:3], 1 << 26)
        for source in (f"jsonl:{tmp_path}/a.jsonl", f"ids:{tmp_path}/a.bin")
    ]
    assert rows(corpora[0]) == rows(corpora[1])
    manifests = [json.loads((corpus / "corpus.json").read_text()) for corpus in corpora]
    assert manifests[0]["splits"] == manifests[1]["splits"]
    assert manifests[0]["splits"]["validation"]["documents"] > 20


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(5, 299), max_size=9), max_size=12), st.booleans(), st.integers(1, 40))
@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
def test_ranges_hold_each_document_once_wherever_they_are_cut(tmp_path_factory, tokenizer, name, documents, ends, size):
    file = write(tmp_path_factory.mktemp("ids") / name, [[40], *documents], ends=ends)
    options = Options(tokenizer_path=tokenizer)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ids_source, "_CHUNK_IDS", 4)
        m.setattr(ids_source, "_READ_IDS", 5)
        expected, counts = read(f"ids:{file}", options)
        ids = read_ids(f"ids:{file}", options)
        decode = load_tokenizer(tokenizer).decode
        assert ids == [d for d in ([40], *documents) if len(d) > 4 or decode(d).strip()]
        with units_of(size):
            texts, divided = read(f"ids:{file}", options)
            assert read_ids(f"ids:{file}", options) == ids
    assert texts == expected
    assert divided["empty_documents"] == counts["empty_documents"]


def test_killed_and_started_again(tmp_path, tokenizer, documents):
    file = write(tmp_path / "a.bin", encoded(tokenizer, documents * 2))
    changes = {"data.source": f"ids:{file}", "tokenizer.path": tokenizer}
    check_kills(changes, tmp_path, 100_000, ("*/tokenizer", "*/units/00001.json", "*/units/00003.json"))


def test_chunks_end_where_words_do(tmp_path, tokenizer, documents):
    (ids,) = encoded(tokenizer, documents[-2:-1])
    file = write(tmp_path / "a.bin", [ids])
    chunks = list(open_source(f"ids:{file}", Options(tokenizer_path=tokenizer)).chunks())
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == documents[-2]
    assert sum(len(chunk.text.split()) for chunk in chunks) == len(documents[-2].split())


def test_a_document_without_text_is_counted(tmp_path, tokenizer):
    file = write(tmp_path / "a.bin", [[50, 51], [], [3, 3], [], []])
    found = read_ids(f"ids:{file}", Options(tokenizer_path=tokenizer))
    assert found == [[50, 51], [3, 3]], "an unknown token stands for text"
    assert read(f"ids:{file}", Options(tokenizer_path=tokenizer))[1]["empty_documents"] == 3


def about(file: Path, **changes: object) -> None:
    side = file.with_suffix(".json")
    side.write_text(json.dumps(json.loads(side.read_text()) | changes))


BAD = {
    "special": (lambda f: write(f, [[50], [51, 0, 52]]), r"a.bin: position 3 holds id 0, the special token <s>; leave"),
    "mask": (lambda f: write(f, [[4]]), "position 0 holds id 4, the special token <mask>"),
    "sep": (lambda f: write(f, [[50, 2]], end=299), r'id 2, .* </s>; .* write "document_end": 2 in the side file'),
    "outside": (lambda f: write(f, [[50], [7, 400]]), r"position 3 holds id 400; expected ids below 300"),
    "cut": (lambda f: write(f, [[50]]).write_bytes(b"123"), r"a.bin has 3 bytes of ids; expected 1 of 2 bytes each"),
    "no side file": (lambda f: f.write_bytes(b"12"), r"a.bin has no side file .*a.json; write it, such as \{"),
    "no JSON": (lambda f: write(f, [[50]]).with_suffix(".json").write_text("end"), "a.json does not say what"),
    "no dtype": (lambda f: about(write(f, [[50]]), dtype="int8"), "a.json does not say what .* with uint16 or uint32"),
    "no end": (lambda f: about(write(f, [[50]]), document_end="x"), "a.json does not say what"),
    "a.npy of two dimensions": (
        lambda f: np.save(write(f, [[50]]), np.zeros((2, 3), np.int32)),
        r"a.npy is an array of int32 and shape \(2, 3\); expected one dimension of integers",
    ),
    "a.npy of floats": (lambda f: np.save(write(f, [[50]]), np.zeros(3)), "a.npy is an array of float64"),
    "a.npy that is none": (lambda f: write(f, [[50]]).write_bytes(b"12"), "a.npy is no .npy file"),
    "a.npy that is cut": (
        lambda f: write(f, [[50]]).write_bytes(f.read_bytes()[:-1]),
        "a.npy has 3 bytes of ids; expected 2 of 2 bytes each",
    ),
    "a.npy below zero": (lambda f: write(f, [[-1]], dtype="int32"), "position 0 holds id -1; expected ids below"),
    "a.txt": (lambda f: f.write_text("50"), r"a.txt is no file of ids by its name; expected \.npy, or \.bin"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_named(tmp_path, tokenizer, kind):
    damage, message = BAD[kind]
    name = kind.split()[0] if "." in kind else "a.bin"
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message):
        read(f"ids:{tmp_path}/{name}", Options(tokenizer_path=tokenizer))


def test_the_tokenizer_must_be_named(tmp_path, tokenizer):
    file = write(tmp_path / "a.bin", [[50]])
    with pytest.raises(UserError, match=r"data.source is 'ids:.*'; expected tokenizer.path"):
        open_source(f"ids:{file}")
    with pytest.raises(UserError, match=r"has only \.json files"):
        open_source(f"ids:{tmp_path}/*.json", Options(tokenizer_path=tokenizer))


def test_the_version_depends_on_the_side_file(tmp_path, tokenizer):
    file = write(tmp_path / "a.bin", [[50]])
    versions = []
    for end in (2, 300):
        about(file, document_end=end)
        versions.append(open_source(f"ids:{file}", Options(tokenizer_path=tokenizer)).version)
    assert versions[0] != versions[1]
