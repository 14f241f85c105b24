"""Duplicates are found, the lowest document survives, and text shared with evaluation files is dropped."""

import gzip
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import planted
from flax_mlm.data.cleaning import clusters, contamination, signatures, word_hashes
from flax_mlm.data.cleaning.dropped import CONTAMINATED, EXACT, NEAR, Dropped, read_heads
from flax_mlm.data.sources.open import open_source
from flax_mlm.data.text import cut
from flax_mlm.errors import UserError
from tests.helpers.paths import ROOT

Units = dict[int, list[tuple[int, str]]]  # unit -> (document number, text)
_PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40)
_TEXTS = st.lists(st.text("ab \n.", max_size=6), max_size=12)


def collect(folder: Path, units: Units, dedup: str = "near", threshold: float = 0.8, evaluation=None):
    """The collection of documents, each of one chunk; unit files are made in the order of the mapping."""
    files = {unit: folder / f"{unit}.signatures" for unit in units}
    for unit, documents in units.items():
        signatures.write(files[unit], ((number, [text]) for number, text in documents), dedup, evaluation)
    return clusters.merge(files, threshold)


def one_unit(folder: Path, texts: list[str], **settings):
    return collect(folder, {0: list(enumerate(texts))}, **settings)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """120 different paragraphs of 220 to 500 words of the built-in corpus."""
    found: dict[str, None] = {}
    for chunk in open_source("builtin").chunks():
        found.update((p, None) for p in chunk.text.split("\n") if 220 <= len(p.split()) <= 500)
        if len(found) >= 120:
            break
    return list(found)[:120]


# Words and n-grams.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP—now, 3.5%!", ["don", "t", "stop", "now", "3", "5"]),
        ("na\u0308ive Straße ÄÖ", ["näive", "straße", "äö"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("我们 BERT模型", ["我", "们", "bert", "模", "型"]),
        (" \n🙂 _-_ ", []),
    ],
)
def test_words_are_runs_of_letters_digits_and_marks(text, expected):
    assert planted.words(text) == expected
    (block,) = word_hashes.word_blocks([(0, [text]), (1, [" ".join(expected)])], 0)
    first, second = np.split(block.hashes, block.offsets[1:-1])
    assert len(first) == len(expected)
    assert first.tolist() == second.tolist()
    assert len(set(first.tolist())) == len(set(expected))


@given(
    st.lists(st.lists(st.text("ab, 人İ\u0301", max_size=8), max_size=4), max_size=6),
    st.integers(1, 30),
    st.sampled_from([5, 13]),
)
def test_ngrams_are_those_of_a_brute_force_reference(documents, block_chars, n):
    found: dict[int, set[int]] = {number: set() for number in range(len(documents))}
    chunked = [(number, [f"{chunk}\n" for chunk in chunks]) for number, chunks in enumerate(documents)]
    for block in word_hashes.word_blocks(chunked, n - 1, block_chars):
        hashes, bounds = block.ngrams(n, whole_below=True)
        for number, first, last in zip(block.documents, bounds, bounds[1:], strict=False):
            found[number] |= set(hashes[first:last].tolist())
    for number, chunks in chunked:
        expected = planted.ngrams(planted.words("".join(chunks)), n)
        assert len(found[number]) == len(expected)
        for other, grams in found.items():
            both = expected & planted.ngrams(planted.words("".join(chunked[other][1])), n)
            assert len(found[number] & grams) == len(both)


def test_signature_is_the_minimum_of_permutations_and_follows_from_the_text_alone():
    rng = random.Random(0)
    text = " ".join(str(rng.randrange(10_000)) for _ in range(60_000))
    chunks = list(cut(text, 1 << 16))
    around = [(0, ["other words " * 9000]), (1, chunks), (2, ["a"])]
    alone = np.concatenate([block.near for block in signatures.make([(1, chunks)], "near")])
    inside = np.concatenate([block.near for block in signatures.make(around, "near")])
    assert len(chunks) > word_hashes.BLOCK_CHARS // (1 << 16), "the document has several blocks"
    assert inside[1].tolist() == alone[0].tolist()
    tokens, starts = word_hashes.hash_words(text)
    first = np.arange(len(starts) - 4)
    values = (word_hashes.polynomial(tokens, first, first + 5) >> np.uint64(32)).tolist()
    for i in (0, 127):
        a, b = int(signatures._FACTORS[i]), int(signatures._TERMS[i])
        assert alone[0, i] == min((a * value + b) % (1 << 32) for value in values)


def test_signatures_of_known_texts_do_not_change():
    (block,) = signatures.make([(0, ["We hold these truths to be self-evident"]), (1, [""])], "near")
    assert block.near[0, :3].tolist() == [2801579137, 462865053, 19017069]
    assert block.texts[0].tolist() == [8308585410024344669, 4872945080569727117]
    assert (block.near[1] == signatures.NO_WORDS).all()


# Clusters.


@given(_PAIRS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_union_is_independent_of_order_and_grouping(pairs, rng, groups):
    expected = list(range(20))
    for _ in range(20):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    shuffled = [pair[:: rng.choice([1, -1])] for pair in rng.sample(pairs, len(pairs))]
    parents = np.arange(20)
    for group in range(groups):
        part = np.array(shuffled[group::groups], int).reshape(-1, 2)
        clusters.unite(parents, part[:, 0], part[:, 1])
    assert clusters.find_roots(parents).tolist() == expected


@settings(deadline=None)
@given(_TEXTS, st.randoms(use_true_random=False), st.sampled_from(["exact", "near"]))
def test_equal_texts_are_one_cluster_and_the_lowest_survives(tmp_path_factory, texts, rng, dedup):
    folder = tmp_path_factory.mktemp("exact")
    where = sorted(rng.sample(range(40), len(texts)))  # unit = number // 10
    units: Units = {unit: [] for unit in rng.sample(range(4), 4)}
    for number, text in zip(where, texts, strict=True):
        units[number // 10].append((number, text))
    found = collect(folder, units, dedup, threshold=1.0)
    assert found.documents.tolist() == where
    survivors = found.documents[found.survivors].tolist()
    if dedup == "exact":
        key = [text.strip() for text in texts]
    else:
        key = [planted.ngrams(planted.words(text)) or text.strip() for text in texts]
    assert survivors == [where[key.index(k)] for k in key]


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_text_hash_does_not_depend_on_chunks_or_surrounding_whitespace(cuts):
    text = " \n a  b\u00a0c\n\n d \u2003"
    chunks = [text[i : i + cuts] for i in range(0, len(text), cuts)]
    (block,) = signatures.make([(0, chunks), (1, [text.strip()]), (2, ["a b"]), (3, [" "]), (4, [])], "exact")
    assert block.sizes.tolist() == [len(text.encode()), len(text.strip().encode()), 3, 1, 0]
    keys = [tuple(row) for row in block.texts.tolist()]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_put_the_curve_at_the_threshold(threshold):
    bands, rows = clusters.choose_bands(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.98
    rows += 1
    assert rows > 128 or 1 - (1 - threshold**rows) ** (128 // rows) < 0.98, "more rows have fewer candidates"


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(UserError, match=r"data.dedup_threshold is .*; expected a number above 0 and at most 1"):
        clusters.choose_bands(threshold)


def test_planted_near_duplicates_are_found_as_all_pairs_are(tmp_path, paragraphs):
    rng = random.Random(0)
    kinds = {kind: [planted.variant(p, kind, rng) for p in paragraphs] for kind in (0.95, 0.8, 0.5)}
    for kind, variants in kinds.items():
        assert max(abs(reached - kind) for _, reached in variants) < 0.05
        texts = [*paragraphs, *(text for text, _ in variants)]
        truth = planted.all_pairs([planted.ngrams(planted.words(text)) for text in texts], 0.3)
        found = one_unit(tmp_path, texts)
        n = len(paragraphs)
        joined = [found.survivors[i] == found.survivors[n + i] for i in range(n)]
        recall = np.mean(joined)
        assert recall == 1 if kind == 0.95 else recall > 0.8 if kind == 0.8 else recall == 0, (kind, recall)
        dropped = np.flatnonzero(found.survivors != np.arange(len(texts)))
        for i in dropped:
            exact = truth.get((found.survivors[i], i), 0.0)
            assert exact > 0.66
            assert abs(found.jaccard[i] - exact) < 0.16, "four standard errors"


def test_results_do_not_depend_on_workers_or_the_order_of_units(tmp_path, paragraphs):
    rng = random.Random(1)
    texts = paragraphs + [planted.variant(p, rng.choice([0.95, 0.85]), rng)[0] for p in paragraphs] + paragraphs[:9]
    rng.shuffle(texts)
    reference = one_unit(tmp_path, texts)
    assert (reference.survivors != np.arange(len(texts))).sum() > 100
    for count in (2, 7):
        numbers = np.array_split(np.arange(len(texts)), count)
        units = {unit: [(int(i), texts[i]) for i in numbers[unit]] for unit in rng.sample(range(count), count)}
        found = collect(tmp_path, units)
        assert found.documents.tolist() == reference.documents.tolist()
        assert found.survivors.tolist() == reference.survivors.tolist()
        assert found.jaccard.tolist() == reference.jaccard.tolist()


def test_a_large_band_needs_no_quadratic_work(tmp_path, paragraphs):
    text, count = paragraphs[0], 10_000
    texts = [text] * count + [f"{text} {i}" for i in range(count)]
    found = one_unit(tmp_path, texts)
    assert not found.survivors.any()
    assert found.is_copy.sum() == count - 1
    assert found.comparisons < 10 * count


def test_a_large_band_of_different_documents_has_a_bounded_number_of_comparisons(tmp_path):
    rng, count = np.random.default_rng(0), 3000
    near = rng.integers(0, 1 << 32, (count, 128), dtype=np.uint32)
    near[:, :7] = 5  # all in one bucket of the first band
    near[2000:] = near[1500]  # far apart in the bucket, and similar
    near[2000:, 7:10] = rng.integers(0, 1 << 32, (1000, 3), dtype=np.uint32)
    near[-1] = near[0]
    near[-1, 7:9] = 1  # similar to the first of the bucket
    numbers, no_hits = np.arange(count), np.zeros(0, contamination.HIT_DTYPE)
    texts = np.stack([numbers, numbers], axis=1).astype(np.uint64)
    signatures.save(tmp_path / "a", [signatures.Signatures(numbers, numbers, texts, near, no_hits)])
    found = clusters.merge({0: tmp_path / "a"}, 0.8)
    assert found.survivors[-1] == 0
    assert (found.survivors[2000:-1] == 1500).all()
    assert (found.survivors[:2000] == np.arange(2000)).all()
    assert found.comparisons < 2 * count * (clusters.WINDOW + clusters.LEADERS)


# Contamination.


def write_evaluation(folder: Path, texts: list[str]) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"x": {"y": [text, 3]}}) + "\n" for text in texts[:2]))
    (folder / "b.csv").write_text('text,label\n"' + texts[2].replace('"', '""') + '",yes\n')
    (folder / "c.tsv.gz").write_bytes(gzip.compress(f'{texts[3]}\t"0\n'.encode()))
    (folder / "d.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(texts[4].encode("utf-16")))
    (folder / "e.json").write_text(json.dumps([texts[5], None]))
    (folder / "f.txt").write_text("a few words only")


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_shared_ngrams_are_those_of_a_brute_force_reference(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("contamination")
    words = st.lists(st.sampled_from("ab"), min_size=10, max_size=24).map(" ".join)
    evaluation_texts = data.draw(st.lists(words, min_size=6, max_size=6))
    documents = data.draw(st.lists(words, min_size=1, max_size=8))
    write_evaluation(folder, evaluation_texts)
    evaluation = contamination.read_evaluation([f"{folder}/*"])
    by_file = [evaluation_texts[:2], *([text] for text in evaluation_texts[2:]), ["a few words only"]]
    grams = [
        {g for text in texts for g in planted.ngrams(planted.words(text), 13) if len(g) == 13} for texts in by_file
    ]
    expected = []
    for number, document in enumerate(documents):
        sequence = document.split()
        own = [tuple(sequence[i : i + 13]) for i in range(len(sequence) - 12)]
        expected += [(number, file, n) for file, g in enumerate(grams) if (n := sum(gram in g for gram in own))]
    (block,) = signatures.make(((i, [d]) for i, d in enumerate(documents)), "none", evaluation)
    assert block.hits.tolist() == expected
    short = [sum(len(text.split()) < 13 for text in texts) for texts in by_file]
    short[1] += 3  # text, label, yes
    short[2] += 1  # "0
    assert evaluation.short_texts == tuple(short)
    assert evaluation.texts == (2, 4, 2, 1, 1, 1)


def test_hits_of_a_document_of_many_blocks_are_added(tmp_path):
    rng = random.Random(0)
    text = " ".join(str(rng.randrange(100_000)) for _ in range(100_000))
    (tmp_path / "e.txt").write_text(text)
    evaluation = contamination.read_evaluation([str(tmp_path / "e.txt")])
    (block,) = signatures.make([(3, cut(text, 1 << 16)), (4, ["x"])], "none", evaluation)
    assert block.hits.tolist() == [(3, 0, 100_000 - 12)]


def test_contaminated_documents_are_dropped_and_their_duplicates_judged_by_themselves(tmp_path, paragraphs):
    parts = paragraphs[0].split(" ")
    altered = " ".join(part if i % 12 else "altered" for i, part in enumerate(parts))  # shares no 13 words in a row
    (tmp_path / "e.txt").write_text(altered)
    evaluation = contamination.read_evaluation([str(tmp_path / "e.txt")])
    texts = [f"{altered} end", *([paragraphs[0]] * 2), paragraphs[1]]
    found = Dropped.from_collection(one_unit(tmp_path, texts, threshold=0.3, evaluation=evaluation))
    rows = found.documents
    assert rows["document"].tolist() == [0, 2]
    assert rows["reason"].tolist() == [CONTAMINATED, EXACT]
    assert rows["survivor"].tolist() == [-1, 1]
    assert found.contaminated[["unit", "document", "file"]].tolist() == [(0, 0, 0)]
    alone = Dropped.from_collection(one_unit(tmp_path, texts, dedup="none", evaluation=evaluation))
    assert alone.documents["document"].tolist() == [0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{', r"a.jsonl:2 is not JSON: .*; expected JSON lines"),
        ("a.json", b"[1,\n2", r"a.json:1 is not JSON"),
        ("a.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:-9], r"a.txt.gz cannot be read to its end"),
        (
            "a.txt",
            b"PAR1" + bytes(99),
            r"a.txt is a Parquet file; expected JSON, .*write its columns of text as JSON lines",
        ),
        ("a.arrow", b"ARROW1" + bytes(99), r"a.arrow is an Arrow file; expected JSON, .*as JSON lines"),
    ],
)
def test_evaluation_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        contamination.read_evaluation([f"{tmp_path}/*"])


def test_a_glob_without_files_is_named():
    with pytest.raises(UserError, match=r"data.decontaminate has '/none/\*'; no file matches"):
        contamination.read_evaluation(["/none/*"])


def test_a_folder_in_place_of_evaluation_files_is_answered_with_its_files(tmp_path):
    with pytest.raises(UserError, match=rf"'{tmp_path}' is a folder; expected files: {tmp_path}/\* or {tmp_path}/\*\*"):
        contamination.read_evaluation([str(tmp_path)])


# Files and the report.


def test_units_of_a_source_are_signed_as_their_documents_are(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree\n\nfour")
    (unit,) = open_source(f"text:{tmp_path}/a.txt").units
    (found,) = signatures.make(word_hashes.documents_of(unit.chunks()), "near")
    (expected,) = signatures.make([(0, ["one two\nthree"]), (1, ["four"])], "near")
    assert found.documents.tolist() == [0, 1]
    assert found.near.tolist() == expected.near.tolist()
    assert found.texts.tolist() == expected.texts.tolist()


def test_files_of_different_settings_are_not_merged(tmp_path):
    files = {0: tmp_path / "0", 1: tmp_path / "1"}
    for file, dedup in zip(files.values(), ("near", "exact"), strict=True):
        signatures.write(file, [(0, ["text"])], dedup)
    with pytest.raises(UserError, match=r"1 was made with another data\.dedup than the units before"):
        clusters.merge(files)


@pytest.mark.parametrize("kind", [Path, epath.Path])  # a bucket's path is of the second kind
def test_a_signature_file_is_whole_or_absent(tmp_path, kind):
    tmp_path = kind(tmp_path)

    def documents():
        yield 0, ["text"]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        signatures.write(tmp_path / "a", documents(), "near")
    assert not list(tmp_path.iterdir()), "nothing is left"
    signatures.write(tmp_path / "a", [(0, ["text"])], "near")
    content = (tmp_path / "a").read_bytes()
    for end in (0, 100, len(content) // 2, len(content) - 1, len(content) - 144):
        (tmp_path / "b").write_bytes(content[:end])
        with pytest.raises(UserError, match=r"b is damaged: .*; delete it"):
            list(signatures.read(tmp_path / "b"))


def test_an_unknown_kind_of_deduplication_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.dedup is 'fuzzy'; expected none, exact or near"):
        signatures.write(tmp_path / "a", [], "fuzzy")


def test_no_documents(tmp_path):
    found = Dropped.from_collection(collect(tmp_path, {0: [], 1: []}))
    assert found.report()["documents"] == 0
    assert found.in_unit(0).tolist() == []


def test_the_list_is_read_as_it_was_written_and_the_report_counts_bytes(tmp_path, paragraphs):
    rng = random.Random(2)
    near = planted.variant(paragraphs[3], 0.9, rng)[0]
    units = {0: [(0, paragraphs[0]), (1, f" {paragraphs[3]}")], 2: [(5, paragraphs[3]), (6, "!"), (7, near)]}
    units[7] = [(9, paragraphs[5]), (10, paragraphs[0])]
    found = Dropped.from_collection(collect(tmp_path, units))
    found.write(tmp_path / "dropped.npy")
    read = Dropped.read(tmp_path / "dropped.npy")
    assert read.documents.tolist() == found.documents.tolist()
    assert [read.in_unit(unit).tolist() for unit in (0, 1, 2, 7)] == [[], [], [5, 7], [10]]
    assert read.documents["reason"].tolist() == [EXACT, NEAR, EXACT]
    wanted = [member[:2] for members in read.sample() for member in members]
    heads: dict[tuple[int, int], str] = {}
    for unit, documents in units.items():
        heads |= read_heads(unit, ((number, [text]) for number, text in documents), wanted)
    report = json.loads(json.dumps(read.report(heads)))
    assert report["documents"] == 7
    assert report["documents_kept"] == 4
    assert report["documents_dropped"] == {"exact": 2, "near": 1, "contaminated": 0}
    assert report["bytes_dropped"]["near"] == len(near.encode())
    assert report["bytes"] == sum(len(text.encode()) for documents in units.values() for _, text in documents)
    first = report["sample_clusters"][0]
    assert first["documents"] == 3
    assert [(m["unit"], m["document"]) for m in first["members"]] == [(0, 1), (2, 7), (2, 5)]
    assert [m["text"] for m in first["members"]] == [paragraphs[3][:200], near[:200], paragraphs[3][:200]]
    assert first["members"][2]["jaccard"] == 1
    (tmp_path / "dropped.npy").write_bytes((tmp_path / "dropped.npy").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"dropped.npy is damaged"):
        Dropped.read(tmp_path / "dropped.npy")


def test_the_report_names_documents_by_evaluation_file(tmp_path, paragraphs):
    (tmp_path / "e.txt").write_text(paragraphs[4])
    (tmp_path / "short.txt").write_text("a few words")
    evaluation = contamination.read_evaluation([f"{tmp_path}/*.txt", f"{tmp_path}/e*"])
    sent = pickle.loads(pickle.dumps(evaluation))
    assert sent.digest == evaluation.digest != contamination.read_evaluation([f"{tmp_path}/short*"]).digest
    report = Dropped.from_collection(one_unit(tmp_path, paragraphs[:6], evaluation=sent)).report({}, evaluation)
    first, second = report["decontamination"]
    assert (first["documents_dropped"], first["documents"]) == (1, [[0, 4]])
    assert (second["documents_dropped"], second["texts"], second["texts_too_short"]) == (0, 1, 1)


def test_workers_need_neither_jax_nor_tensorflow():
    program = "import sys, flax_mlm.data.cleaning.dropped; sys.exit(bool({'jax', 'tensorflow'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
