"""Commands on models of the Hugging Face Hub, `hf:ORG/NAME`, from a hub that answers as the real one does."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from flax_mlm.data.tokenizer import load_tokenizer
from tests.helpers.fake_hub import TOKEN
from tests.helpers.fake_model_hub import FakeModelHub, files_of
from tests.helpers.hf_folders import written
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    return written(tmp_path_factory.mktemp("models") / "name", "bert", load_tokenizer(toy.corpus))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    with FakeModelHub() as hub:
        hub.put("org/name", files_of(folder))
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        for name, value in hub.env(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield hub


def test_a_model_of_the_hub_is_a_checkpoint(toy, folder, hub):
    text = "the [MASK] barks"
    done = toy.run("fill_mask", "--checkpoint=hf:org/name", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == toy.run("fill_mask", f"--checkpoint={folder}", text).stdout
    code = "import flax_mlm; print(flax_mlm.load('hf:org/name@main').embed(['the dog']).shape)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout == "(1, 32)\n", loaded.stderr
    done = toy.run("fill_mask", "--checkpoint=hf:org/none", text)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --checkpoint is 'hf:org/none'; http://127.0.0.1:")
    assert done.stderr.count("\n") == 1
    done = toy.run("fill_mask", "--checkpoint=org/name", text)
    assert done.returncode == 2
    assert done.stderr.endswith("if it names a model of the Hub, give hf:org/name\n")


def test_compare_takes_one(toy, folder, hub, tmp_path):
    done = toy.run(
        "compare", f"--checkpoints=a={folder},hf:org/name", "--tasks=cloze", f"--output={tmp_path / 'compared'}"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| cloze")]
    assert rows, done.stdout
    assert all(row[3].split("±")[0].strip() in row[4] for row in rows), "both columns are of the same weights"


def test_a_run_records_the_commit_and_says_when_it_is_another(toy, folder, hub, tmp_path):
    first, run = hub.refs["org/name"]["main"], tmp_path / "run"
    source = {"data__corpus": "", "data__source": f"text:{toy.text}"}
    flags = [flag for flag in toy.flags(**source) if ".model." not in flag and "tokenizer" not in flag]
    flags += ["--config.init_from=hf:org/name", f"--workdir={run}"]
    done = toy.run("train", *flags, "--config.train.steps=2")
    assert done.returncode == 0, done.stderr
    assert f"hf:org/name@{first}" in done.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["init_from"] == config["tokenizer"]["path"] == f"hf:org/name@{first}"
    assert f"hf:org/name@{first}" in (run / "checkpoints" / "2" / "meta" / "metadata").read_text()

    second = hub.put("org/name", {**files_of(folder), "README.md": b"the same weights"})
    done = toy.run("train", *flags, "--config.train.steps=2")
    assert done.returncode == 0, done.stderr
    note = f"note: the run began from hf:org/name@{first}, and init_from is hf:org/name@{second}: the same weights"
    assert note in done.stdout

    other = written(tmp_path / "other", "bert", load_tokenizer(toy.corpus), seed=1)
    third = hub.put("org/name", files_of(other))
    done = toy.run("train", *flags, "--config.train.steps=2")
    assert done.returncode == 2
    assert f"(hf:org/name@{first}), and init_from has" in done.stderr
    assert f"(hf:org/name@{third}); give the same weights, init_from=hf:org/name@{first}, or" in done.stderr
    assert done.stderr.count("\n") == 1

    # What it was exported as says where it began.
    done = toy.run("export", f"--checkpoint={run}", f"--output={tmp_path / 'exported'}")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "base_model: org/name" in card
    assert f"- Started from: hf:org/name@{first}." in card


def test_a_tokenizer_of_the_hub(toy, folder, hub, tmp_path):
    flags = toy.flags(data__corpus="", data__source=f"text:{toy.text}", tokenizer__path="hf:org/name")
    done = toy.run("prepare", *flags, f"--output={tmp_path / 'corpus'}")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "corpus").fingerprint == load_tokenizer(folder).fingerprint
    assert f"hf:org/name@{hub.refs['org/name']['main']}" in done.stdout
    assert not any("safetensors" in request for request in hub.requests)


def test_export_pushes_in_one_commit(toy, folder, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export = ("export", f"--checkpoint={folder}")
    done = toy.run(*export, "--push_to=hf:team/mine", "--private")
    assert done.returncode == 0, done.stderr
    commit = hub.refs["team/mine"]["main"]
    assert done.stdout.endswith(f"pushed to hf:team/mine@{commit}\n")
    assert hub.closed["team/mine"] == "private"
    assert len(hub.pushed["team/mine"]) == 1
    assert b"\n# mine\n" in hub.commits["team/mine"][commit]["README.md"]
    assert TOKEN not in done.stdout + done.stderr
    done = toy.run(*export, "--push_to=hf:someone/else", f"--output={tmp_path / 'kept'}")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "kept") == hub.commits["someone/else"][hub.refs["someone/else"]["main"]]
    done = toy.run("fill_mask", "--checkpoint=hf:team/mine", "the [MASK] barks")
    assert done.stdout == toy.run("fill_mask", f"--checkpoint={folder}", "the [MASK] barks").stdout

    done = toy.run(*export, "--push_to=hf:org/name", f"--output={tmp_path / 'none'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --push_to is 'hf:org/name', where the token may read but not write; set HF_T")
    assert not (tmp_path / "none").exists()
    done = toy.run(*export, "--private", f"--output={tmp_path / 'none'}")
    assert done.returncode == 2
    assert done.stderr == "error: --private is for --push_to, which is empty; give --push_to=hf:ORG/NAME\n"
    shutil.rmtree(tmp_path / "kept")
