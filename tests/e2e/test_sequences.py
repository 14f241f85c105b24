"""A protein model, from FASTA to a Hugging Face folder."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from flax_mlm.data.tokenizer import load_tokenizer

MOTIFS = ["MKTAYIAKQR", "GSHMLEDPVW", "CCHHNNFFYY", "QISFVKSHFS"]
MODERNBERT = {"model__glu": True, "model__type_vocab_size": 0}  # a class of transformers fits it


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> Path:
    """The workdir of a model that was trained for a few steps on sequences that repeat a motif."""
    folder = tmp_path_factory.mktemp("proteins")
    rng = random.Random(0)
    records = (f">p{i}\n{(rng.choice(MOTIFS) * 4)[rng.randrange(10) : rng.randint(12, 40)]}\n" for i in range(600))
    (folder / "a.fasta").write_text("".join(records))
    changes = {"data__corpus": "", "data__source": f"fasta:{folder}/a.fasta", "tokenizer__model_type": "symbols"}
    flags = toy.flags(**changes, train__steps=120, objective__masking="whole_word", **MODERNBERT)
    done = toy.run("train", f"--workdir={folder / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "tokenizer: 20 symbols, single characters" in done.stdout + done.stderr
    return folder / "run"


def test_the_model_fills_masks(toy, run):
    done = toy.run("fill_mask", f"--checkpoint={run}", "MKTAYIAKQRMKTAYI[MASK]KQR")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[1] == "A", done.stdout


def test_the_model_is_evaluated(toy, run):
    done = toy.run("evaluate", "--task=mlm", f"--checkpoint={run}", f"--json={run.parent / 'mlm.json'}")
    assert done.returncode == 0, done.stderr


def test_the_exported_tokenizer_gives_the_same_ids(toy, run):
    output = run.parent / "hf"
    done = toy.run("export", f"--checkpoint={run}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    tok, library = load_tokenizer(output), tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    assert tok.vocab_size == json.loads((output / "config.json").read_text())["vocab_size"]
    for text in (*MOTIFS, "MKTBXZ", "m*", ""):
        assert library.encode(text).ids == [tok.cls_id, *tok.encode([text])[0].tolist(), tok.sep_id]
