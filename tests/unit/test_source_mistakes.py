"""Mistakes in what `data.source` names: one line that says what is wrong, and nothing left out in silence."""

import os

import pytest

from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import UserError
from tests.helpers.sources import read


def test_a_link_to_nothing_is_not_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"/b\.txt is a link to what is not there; expected files"):
        open_source(f"text:{tmp_path}/*.txt")


def test_a_pipe_is_not_left_out(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"/a\.txt is a pipe, a socket or a device; expected files"):
        open_source(f"text:{tmp_path}/a.txt")


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert read(f"text:{tmp_path}/*.txt")[0] == ["one", "one"]


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("s3://bucket/a/*.jsonl.gz#body", "jsonl:s3://bucket/a/*.jsonl.gz#body"),
        ("gs://bucket/a", "text:gs://bucket/a"),
        ("az://container/x.parquet", "parquet:az://container/x.parquet"),
    ],
)
def test_a_url_without_a_kind_is_answered_with_one(spec, meant):
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert str(error.value).endswith(f"; write {meant}")


@pytest.mark.parametrize("name", ["a.fasta", "a.faa.gz", "A.FNA"])
@pytest.mark.parametrize("kind", ["text", "lines", "symbols"])
def test_fasta_is_not_taken_for_lines_of_text(tmp_path, kind, name):
    (tmp_path / name).write_text(">a\nMKT\n")
    with pytest.raises(UserError, match="is FASTA by its name; use fasta:GLOB"):
        open_source(f"{kind}:{tmp_path}/*")
