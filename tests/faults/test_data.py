"""Damaged, hostile and impossible corpora: named when they are opened or read, never trained on."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import zstandard

from flax_mlm.config.schema import MeshConfig
from flax_mlm.data import pipeline
from flax_mlm.data.corpus import Corpus, write_manifest
from flax_mlm.distributed.mesh import check_batch, make_mesh
from flax_mlm.errors import UserError
from flax_mlm.storage import buckets, s3
from flax_mlm.storage.gcs import Unreachable
from tests.helpers.bucket_servers import serving
from tests.helpers.paths import ROOT


@pytest.fixture
def copy(toy, tmp_path) -> Path:
    return shutil.copytree(toy.corpus, tmp_path / "corpus")


def everything(folder: Path) -> list[np.ndarray]:
    """What a run reads: every row, in order."""
    corpus = Corpus.open(folder)
    corpus.tokenizer()
    splits = (corpus.split(name) for name in ("train", "validation"))
    return [rows.read(np.arange(rows.num_rows)) for rows in splits]


@pytest.fixture(scope="module")
def original(toy) -> list[np.ndarray]:
    return everything(toy.corpus)


def verdict(folder: Path, original: list[np.ndarray]) -> str:
    """ "detected": an error names a file of the corpus. "harmless": every row is what it was."""
    try:
        found = everything(folder)
    except UserError as e:
        assert str(folder) in str(e)
        assert "\n" not in str(e)
        return "detected"
    for a, b in zip(found, original, strict=True):
        np.testing.assert_array_equal(a, b)
    return "harmless"


@pytest.mark.fault(44)
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes(copy, original, outcome, seed):
    rng = random.Random(seed)
    files = sorted(p for p in copy.iterdir() if p.is_file())
    for i in range(20):
        file = files[i % len(files)]
        content = file.read_bytes()
        place = rng.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        what = verdict(copy, original)
        in_header = file.suffix == ".npy" and place < 128
        assert what == "detected" or in_header, f"{file.name} at {place}: only a header may change unseen"
        file.write_bytes(content)
        outcome(what, damages=1)


@pytest.mark.fault(44)
@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000.crc32.npy", "corpus.json", "tokenizer.model"])
def test_truncated_emptied_and_missing_files(copy, original, outcome, name):
    file, content = copy / name, (copy / name).read_bytes()
    row = Corpus.open(copy).seq_len * 2  # also at the boundary of a row
    for size in (0, 1, len(content) // 2, len(content) - row, len(content) - 1):
        file.write_bytes(content[: max(size, 0)])
        assert verdict(copy, original) == "detected"
    file.write_bytes(content + b"\0")
    assert verdict(copy, original) == "detected" or name == "corpus.json"
    file.unlink()
    assert verdict(copy, original) == "detected"
    outcome("detected", 7, damages=7)


@pytest.mark.fault(44)
def test_exchanged_files(copy, original, outcome):
    a, b = copy / "train-00000.npy", copy / "validation-00000.npy"
    a.rename(copy / "x")
    b.rename(a)
    (copy / "x").rename(b)
    assert verdict(copy, original) == "detected"
    outcome("detected", damages=2)


@pytest.mark.fault(44)
@pytest.mark.parametrize("change", ["rows", "size", "sha256", "order", "dropped", "seq_len", "vocab_size", "format"])
def test_a_changed_corpus_json(copy, original, outcome, change):
    manifest = json.loads((copy / "corpus.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    if change == "rows":
        shards[0]["rows"] -= 1
    elif change == "size":
        shards[0]["size"] += 2
    elif change == "sha256":
        shards[0]["sha256"] = "0" * 64
    elif change == "order":
        manifest["splits"]["train"], manifest["splits"]["validation"] = (
            manifest["splits"]["validation"],
            manifest["splits"]["train"],
        )
    elif change == "dropped":
        shards.clear()
    elif change == "vocab_size":
        manifest["tokenizer"]["vocab_size"] = 6
    else:
        manifest[change] += 1
    (copy / "corpus.json").write_text(json.dumps(manifest))
    assert verdict(copy, original) == "detected"
    outcome("detected", damages=1)


@pytest.mark.fault(44)
def test_a_row_that_is_damaged_later_is_named_when_it_is_read(copy, outcome):
    rows = Corpus.open(copy).split("train")
    content = bytearray((copy / "train-00000.npy").read_bytes())
    content[-2 * rows.seq_len * 3] ^= 4  # in the third row from the end
    (copy / "train-00000.npy").write_bytes(content)
    bad = rows.num_rows - 3
    rows.read(np.array([0, bad - 1, bad + 1]))
    with pytest.raises(UserError, match=rf"train-00000.npy is damaged: row {bad} differs from its checksum"):
        rows.read(np.array([0, bad]))
    outcome("detected", damages=1)


@pytest.mark.fault(17)
def test_a_read_that_fails_in_the_pipeline_is_named(copy, outcome):
    rows = Corpus.open(copy).split("train")
    batches = pipeline.train_batches(rows, seed=0, global_batch_size=8, start_step=0, stop_step=10_000)
    next(batches)
    (copy / "train-00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000.npy is damaged: row \d+ differs from its checksum"):
        for _ in range(100):
            next(batches)
    outcome("detected", damages=1)


ENDING = """
import sys
import numpy as np
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.pipeline import train_batches
rows = Corpus.open(sys.argv[1]).split("train")
for i, _ in enumerate(train_batches(rows, seed=0, global_batch_size=256, start_step=0, stop_step=10**9)):
    if i == 20:
        {ending}
"""


@pytest.mark.fault(17)
@pytest.mark.parametrize("ending", ["break", "sys.exit(0)", "raise SystemExit", "1 / 0"])
def test_a_process_that_ends_while_rows_are_read_does_not_hang(toy, outcome, ending):
    line = [sys.executable, "-c", ENDING.format(ending=ending), str(toy.corpus)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == int(ending == "1 / 0")
    assert done.stderr == "" or done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    outcome("detected")


@pytest.mark.fault(42)
@pytest.mark.parametrize("start", [0, 37, 10**6])
def test_any_number_of_hosts_gets_the_same_batches(toy, outcome, start):
    rows = Corpus.open(toy.corpus).split("train")
    steps = -(-rows.num_rows // 16) + 3 if start == 0 else 4  # from the beginning, beyond the first epoch

    def batches(host: int, hosts: int) -> list[dict[str, np.ndarray]]:
        return list(
            pipeline.train_batches(
                rows, seed=5, global_batch_size=16, start_step=start, stop_step=start + steps,
                local_rows=np.arange(16).reshape(hosts, -1)[host],
            )
        )  # fmt: skip

    expected = batches(0, 1)
    assert len(expected) == steps
    for hosts in (2, 4, 8):
        shares = [batches(host, hosts) for host in range(hosts)]
        for step in range(steps):
            for name, value in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), value)
        outcome("harmless")


@pytest.mark.fault(43)
@pytest.mark.parametrize("parts", [3, 5, 6])
def test_a_batch_that_devices_cannot_share(outcome, parts):
    mesh = make_mesh(MeshConfig(parts, 1, 1), jax.devices()[:parts])
    with pytest.raises(UserError, match=f"train.global_batch_size is 16; expected a multiple of {parts}"):
        check_batch("train.global_batch_size", 16, mesh)
    outcome("detected")


@pytest.mark.fault(45)
def test_ids_outside_of_the_vocabulary(copy, outcome):
    """Well written, checksums and all, by a program with another vocabulary."""
    manifest = json.loads((copy / "corpus.json").read_text())
    vocab_size = Corpus.open(copy).vocab_size
    shard = manifest["splits"]["train"]["shards"][0]
    tokens = np.load(copy / shard["file"])
    tokens[5, 7] = vocab_size
    forge(copy, manifest, shard, tokens)
    rows = Corpus.open(copy).split("train")
    with pytest.raises(UserError, match=rf"contains token id {vocab_size} >= vocabulary size {vocab_size} in row 5"):
        rows.read(np.arange(10))
    outcome("detected")


@pytest.mark.fault(45)
def test_text_that_is_hardly_text(toy, tmp_path, outcome):
    """Bytes that are no UTF-8 and zeros after a good beginning, nothing at all, one line without end, control
    characters: prepared and counted."""
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(toy.text, texts / "good.txt")
    (texts / "bytes.txt").write_bytes(b"The dog barks.\n" * 5_000 + random.Random(0).randbytes(20_000))
    (texts / "empty.txt").write_bytes(b"")
    (texts / "blank.txt").write_bytes(b" \n\t\n\n")
    (texts / "zeros.txt").write_bytes(b"The dog barks.\n" * 5_000 + b"\0" * 10_000)
    (texts / "line.txt").write_text("the dog barks " * 20_000)
    (texts / "word.txt").write_text("x" * 300_000)
    (texts / "marks.txt").write_text("[MASK] [PAD] <0x00> \u202e \ufeff a\u0301 " * 100)
    flags = toy.flags(data__corpus="", data__source=f"text:{texts}/*.txt", tokenizer__vocab_size=800)
    done = toy.run("prepare", *flags, f"--output={tmp_path / 'corpus'}")
    assert done.returncode == 0, done.stderr
    rows, validation = everything(tmp_path / "corpus")
    assert rows.shape[1] == 32
    assert len(rows) + len(validation) > 2_000
    assert rows.max() < 800
    assert "warning: 2 empty files" in done.stdout
    assert re.search(r"warning: [\d,]+ bytes in 1 files could not be decoded and became U\+FFFD", done.stdout)
    outcome("recovered", 7)


@pytest.mark.fault(45)
@pytest.mark.parametrize("name", ["cut.txt.gz", "cut.txt.zst", "empty.txt", "no_such_folder"])
def test_text_that_cannot_be_read_leaves_nothing(toy, tmp_path, outcome, name):
    whole = toy.text.read_bytes()
    if name == "cut.txt.gz":
        (tmp_path / name).write_bytes(gzip.compress(whole)[:-100])
    elif name == "cut.txt.zst":
        (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(whole)[:-100])
    elif name == "empty.txt":
        (tmp_path / name).write_bytes(b"")
    flags = toy.flags(data__corpus="", data__source=f"text:{tmp_path / name}")
    done = toy.run("prepare", *flags, f"--output={tmp_path / 'corpus'}")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert name in done.stderr, done.stderr
    assert not [p for p in tmp_path.iterdir() if p.name != name]
    outcome("detected", damages=int(name.startswith("cut")))


def forge(folder: Path, manifest: dict, shard: dict, tokens: np.ndarray) -> None:
    """Replaces a shard, and every checksum that would tell."""
    import hashlib
    import zlib

    np.save(folder / shard["file"], tokens)
    np.save(folder / shard["crc32"]["file"], np.array([zlib.crc32(row.tobytes()) for row in tokens], np.uint32))
    for entry in (shard, shard["crc32"]):
        content = (folder / entry["file"]).read_bytes()
        entry["size"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "sha256"})


CANARY = "cos\nsystem\n(S'touch canary'\ntR."


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    "name",
    [
        "../corpus.json",
        "/etc/passwd",
        "..",
        "",
        "a/b.npy",
        "$(touch canary)",
        "x;touch canary",
        "a\nb",
        ".hidden",
        "\0",
    ],
)
def test_names_that_lead_elsewhere(copy, original, outcome, monkeypatch, name):
    monkeypatch.chdir(copy)
    manifest = json.loads((copy / "corpus.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = name
    write_manifest(copy, {key: value for key, value in manifest.items() if key != "sha256"})
    with pytest.raises(UserError, match=r"corpus.json is damaged \(ValueError: file is .*plain name"):
        Corpus.open(copy)
    assert not (copy / "canary").exists()
    outcome("detected")


@pytest.mark.fault(49)
@pytest.mark.parametrize("attack", ["huge", "deep", "list", "pickle", "pipe", "folder"])
def test_a_hostile_corpus_json(copy, outcome, monkeypatch, attack):
    monkeypatch.chdir(copy)
    file = copy / "corpus.json"
    if attack == "huge":
        os.truncate(file, 1 << 30)
    elif attack in ("deep", "list", "pickle"):
        file.write_text({"deep": "[" * 1_000_000, "list": "[]", "pickle": CANARY}[attack])
    else:
        file.unlink()
        os.mkfifo(file) if attack == "pipe" else file.mkdir()
    with pytest.raises(UserError, match=str(copy)):
        Corpus.open(copy)
    assert not (copy / "canary").exists()
    outcome("detected")


@pytest.mark.fault(49)
@pytest.mark.parametrize("what", ["objects", "a long header", "a link"])
def test_a_hostile_shard(copy, tmp_path, outcome, monkeypatch, what):
    monkeypatch.chdir(copy)
    file = copy / "train-00000.npy"
    size = file.stat().st_size
    if what == "objects":

        class Payload:
            def __reduce__(self):
                return os.system, ("touch canary",)

        np.save(file, np.array([Payload()], object), allow_pickle=True)
        file.write_bytes(file.read_bytes().ljust(size, b"\0")[:size])
    elif what == "a long header":
        file.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f".ljust(size, b" "))
    else:
        shutil.move(file, tmp_path / "elsewhere.npy")
        file.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(UserError, match=r"train-00000.npy"):
        everything(copy)
    assert not (copy / "canary").exists()
    outcome("detected")


# An object store


@pytest.mark.fault(32)
@pytest.mark.parametrize("mood", [(503, "SlowDown"), 0.5], ids=["fails", "cuts"])
@pytest.mark.parametrize("when", ["when opened", "when read"])
def test_an_object_store_in_a_mood(toy, monkeypatch, outcome, mood, when):
    monkeypatch.setattr(buckets, "_PATIENCE", 0.0)
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    with serving("s3") as server:
        folder = server.put_folder(toy.corpus, "corpus")
        server.set_fault(mood if when == "when opened" else None)
        with pytest.raises((UserError, Unreachable)) as e:
            rows = Corpus.open(folder).split("train")
            server.set_fault(mood)
            rows.read(np.arange(4))
        said = str(e.value)
        assert folder in said
        assert "\n" not in said
        server.mend()
        assert len(Corpus.open(folder).split("train").read(np.arange(4))) == 4
    outcome("detected")
