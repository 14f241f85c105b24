"""FASTA: one sequence a record, as BioPython reads it, wherever the file is divided."""

import gzip
import importlib.util
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.data.sources.open import open_source
from flax_mlm.data.text import CHUNK_CHARS
from flax_mlm.errors import UserError
from tests.helpers.preparing import check_kills
from tests.helpers.sources import read, units_of

SMALL = b"; from somewhere\n>sp|P1|ONE first\nMKTA\r\nyiv\n\n>two\n>three with * and > inside\nAC*\nDE F*\n;note\nGG\n"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_are_documents_without_their_headers(tmp_path, suffix):
    file = tmp_path / f"a.fasta{suffix}"
    file.write_bytes(gzip.compress(SMALL) if suffix else SMALL)
    texts, counts = read(f"fasta:{file}")
    assert texts == ["MKTAyiv", "AC*DEF*GG"]
    assert counts["empty_documents"] == 1
    assert counts["comment_lines"] == 2


@pytest.mark.parametrize(
    ("content", "shown"), [("MKT\n>a\nMKT\n", "MKT"), ("\n@read1\nACGT\n+\nFFFF\n", "@read1"), ("words\n", "words")]
)
def test_a_file_that_does_not_begin_with_a_record_is_refused_by_name(tmp_path, content, shown):
    (tmp_path / "a.fasta").write_text(content)
    with pytest.raises(UserError, match=rf"a.fasta does not begin with a record of FASTA, but with '{shown}'"):
        open_source(f"fasta:{tmp_path}/a.fasta").check()


def test_an_empty_file_is_counted(tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMK\n")
    (tmp_path / "b.fasta").write_text("\n")
    texts, counts = read(f"fasta:{tmp_path}/*")
    assert texts == ["MK"]
    assert counts["empty_files"] == 1


@pytest.mark.parametrize("width", [70, 10**9])
def test_a_long_sequence_is_one_document_in_bounded_chunks(tmp_path, width):
    sequence = "".join(random.Random(0).choices("ACGTN", k=500_000))
    lines = "\n".join(sequence[i : i + width] for i in range(0, len(sequence), width))
    (tmp_path / "a.fasta").write_text(f">chromosome\n{lines}\n>b\nAC\n")
    source = f"fasta:{tmp_path}/a.fasta"
    assert read(source)[0] == [sequence, "AC"]
    assert max(len(chunk.text) for chunk in open_source(source).chunks()) <= CHUNK_CHARS


LINES = st.lists(
    st.sampled_from([">a", ">b c", "> ", ">", "MK", "m k", "A*", "", " ", ";x", ">" + "x" * 20, "\u00e9"]), max_size=20
)


@settings(deadline=None)
@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 25))
def test_ranges_hold_each_record_once_wherever_they_are_cut(tmp_path_factory, lines, newline, ends, size):
    path = tmp_path_factory.mktemp("fasta") / "a"
    path.write_bytes((newline.join([">first", "M", *lines]) + newline * ends).encode())
    expected = read(f"fasta:{path}")
    with units_of(size):
        assert len(open_source(f"fasta:{path}").units) == -(-path.stat().st_size // size)
        assert read(f"fasta:{path}") == expected


@pytest.mark.skipif(not importlib.util.find_spec("Bio"), reason="needs BioPython")
@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["MK", "m k", "A*", "", "GG ", " A"]), max_size=4), max_size=6))
def test_sequences_are_those_of_biopython(tmp_path_factory, records):
    from Bio import SeqIO

    path = tmp_path_factory.mktemp("fasta") / "a"
    path.write_text("".join(f">id{i} x\n" + "".join(f"{line}\n" for line in r) for i, r in enumerate(records)))
    with path.open() as file:
        theirs = [str(record.seq) for record in SeqIO.parse(file, "fasta")]
    texts, counts = read(f"fasta:{path}")
    assert texts == [sequence for sequence in theirs if sequence]
    assert counts["empty_documents"] == theirs.count("")


def test_killed_and_started_again(tmp_path):
    rng = random.Random(0)
    proteins = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(20, 200))) for _ in range(3000)]
    (tmp_path / "a.fasta").write_text("".join(f">p{i}\n{p[:60]}\n{p[60:]}\n" for i, p in enumerate(proteins)))
    changes = {"data.source": f"fasta:{tmp_path}/a.fasta", "tokenizer.model_type": "symbols"}
    check_kills(changes, tmp_path, 40_000, ("*/tokenizer", "*/units/00001.json", "*/units/00004.json"))
