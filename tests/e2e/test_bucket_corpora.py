"""Corpora in buckets of three services: their rows are those of the folder, and damage is noticed."""

import dataclasses
import json

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import DataConfig
from flax_mlm.configs import base
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.mixture import Mixture
from flax_mlm.data.tokenizer import load_tokenizer
from flax_mlm.data.tokenizer_training import train_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets
from tests.helpers.bucket_servers import SCHEMES, serving
from tests.helpers.corpora import write_corpus
from tests.helpers.runs import finish, metrics_of

STEPS = 6


@pytest.fixture(scope="module", params=SCHEMES)
def bucket(request):
    with serving(request.param) as server:
        buckets.parse("test", server.url)
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    config = dataclasses.replace(build(base.get_config()).tokenizer, vocab_size=280)
    tok = train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 20], config)
    for seed, name in enumerate(("wiki", "books")):
        write_corpus(folder / name, tok, seed)
    return folder


@pytest.fixture
def urls(bucket, folders):
    return [bucket.put_folder(folders / name, name) for name in ("wiki", "books")]


def data(corpus: str) -> DataConfig:
    return dataclasses.replace(build(base.get_config()).data, corpus=corpus)


def test_rows_are_those_of_the_folder(bucket, folders, urls):
    there, here = Corpus.open(urls[0]), Corpus.open(folders / "wiki")
    assert str(there.path) == urls[0]
    assert there.fingerprint == here.fingerprint
    assert there.tokenizer().fingerprint == here.tokenizer().fingerprint
    assert load_tokenizer(urls[0]).fingerprint == here.tokenizer().fingerprint
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        rows = rng.integers(0, here.split(split).num_rows, 20)
        np.testing.assert_array_equal(there.split(split).read(rows), here.split(split).read(rows))


def test_several_with_weights(bucket, folders, urls):
    there = Mixture.open(data(f"{urls[0]}:0.7, {urls[1]}/:0.3"))
    here = Mixture.open(data(f"{folders}/wiki:0.7,{folders}/books:0.3"))
    assert (there.weights, list(there.corpora)) == ((7, 3), ["wiki", "books"])
    assert there.fingerprint == here.fingerprint
    assert Mixture.open(data(str(there))).fingerprint == here.fingerprint
    rows = np.arange(0, here.split("train").num_rows, 3)
    np.testing.assert_array_equal(there.split("train").read(rows), here.split("train").read(rows))
    with pytest.raises(UserError, match="are the same folder; name it once"):
        Mixture.open(data(f"{urls[0]}:1,{urls[0]}/:2"))
    mixed = Mixture.open(data(f"{folders}/wiki:0.7,{urls[1]}:0.3"))
    assert mixed.fingerprint == here.fingerprint


def test_damage_is_noticed(bucket, folders, urls):
    shard = "train-00000.npy"
    content = (folders / "wiki" / shard).read_bytes()
    corpus = Corpus.open(urls[0])
    bucket.put(f"wiki/{shard}", content[:-1] + bytes([content[-1] ^ 1]))
    last = json.loads((folders / "wiki" / "corpus.json").read_text())["splits"]["train"]["shards"][0]["rows"] - 1
    corpus.split("train").read(np.arange(last))
    with pytest.raises(UserError, match=f"{urls[0]}/{shard} is damaged: row {last} differs from its checksum"):
        corpus.split("train").read(np.array([last]))
    bucket.put(f"wiki/{shard}", content[:-1])
    with pytest.raises(UserError, match=f"{shard} has {len(content) - 1} bytes; corpus.json says {len(content)}"):
        Corpus.open(urls[0])
    buckets.delete(f"{urls[0]}/{shard}")
    with pytest.raises(UserError, match=f"{urls[0]}/{shard} is missing"):
        Corpus.open(urls[0])
    with pytest.raises(UserError, match=f"{urls[0]}/{shard} ") as error:
        corpus.split("train").read(np.array([0]))
    assert "\n" not in str(error.value)


def test_what_is_no_corpus(bucket):
    with pytest.raises(UserError, match=f"{bucket.url}/nothing is not a corpus: it has no corpus.json"):
        Corpus.open(f"{bucket.url}/nothing")
    with pytest.raises(UserError, match=r"data.corpus: there is no bucket 'nosuchbucket'"):
        Mixture.open(data(f"{bucket.scheme}://nosuchbucket/x"))


def test_a_row_that_cannot_be_read(bucket, urls):
    rows = Corpus.open(urls[0]).split("train")
    bucket.fail(403, lambda method, name: name.endswith(".npy"))
    with pytest.raises(UserError, match=f"'{urls[0]}/train-.*' cannot be used: these credentials do not allow it"):
        rows.read(np.array([0]))
    bucket.mend()


def test_a_run_on_it_is_that_on_the_folder(toy, bucket, tmp_path):
    if bucket.scheme == "gs":
        pytest.skip("test_buckets.py trains on one there")
    url = bucket.put_folder(toy.corpus, "toy")
    flags = {"train__steps": STEPS, "train__checkpoint_every": STEPS, "train__eval_every": STEPS}
    here = toy.folder / "run on a folder"
    if not here.exists():
        finish(toy, here, *toy.flags(**flags))
    out = finish(toy, tmp_path / "there", *toy.flags(**flags, data__corpus=url))
    assert f"corpus      {url}" in out
    losses = [
        [(line["batch_fingerprint"], line["loss"]) for line in metrics_of(run)] for run in (tmp_path / "there", here)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_mistakes_are_one_line(toy, bucket, tmp_path):
    url = f"{bucket.scheme}://nosuchbucket/x"
    said = {url: "data.corpus: there is no bucket 'nosuchbucket'; create it, or correct the name"}
    said[f"{bucket.url}/x"] = f"{bucket.url}/x is not a corpus: it has no corpus.json"
    for corpus, line in said.items():
        done = toy.run("train", f"--workdir={tmp_path}/run", *toy.flags(data__corpus=corpus))
        assert done.returncode == 2, done.stderr
        assert line in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_workdir_there_is_refused(toy, bucket):
    if bucket.scheme == "gs":
        pytest.skip("it is one")
    done = toy.run("train", f"--workdir={bucket.url}/run", *toy.flags())
    assert done.returncode == 2
    assert "expected a folder or gs://BUCKET/FOLDER" in done.stderr
