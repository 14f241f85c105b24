"""Likelihoods of texts, minimal pairs, clozes: what a plain loop over single questions finds."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.distributed.mesh import num_batch_shards
from flax_mlm.errors import UserError
from flax_mlm.evaluation import cloze, minimal_pairs
from flax_mlm.inference import likelihood
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model
from flax_mlm.inference.mask_filler import MaskFiller
from tests.helpers.models import load_on_8_devices

TEXTS = ["The dog barks in the garden today.", "Fish.", "The cat sleeps near the river. The cow eats all day."] * 3


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    return load_on_8_devices(trained_run)


@pytest.fixture(scope="module")
def causal(causal_run) -> LoadedModel:
    return load_model(str(causal_run), build(read_config(str(causal_run))))


def log_probability(model: LoadedModel, tokens: list[int], place: int, label: int) -> float:
    """Of one piece at one place of one row, asked alone."""
    rows = np.full((num_batch_shards(model.mesh), 32), model.tokenizer.pad_id, np.int32)
    rows[0, : len(tokens)] = tokens
    with jax.set_mesh(model.mesh):
        places = np.full((len(rows), 1), place, np.int32)
        rows, places = shard_rows([rows, places], model.mesh)
        return float(model.forward.log_probs(model.params, rows, places, None, model.vocab)[0, 0, label])


@pytest.mark.parametrize("variant", ["original", "within_word_l2r"])
def test_pseudo_log_likelihood_is_that_of_a_plain_loop(model, variant):
    t = model.tokenizer
    found = likelihood.log_likelihood(model, TEXTS, variant)
    for text, total in zip(TEXTS[:3], found, strict=False):
        ids = t.encode([text])[0].tolist()
        tokens, expected = [t.cls_id, *ids, t.sep_id], 0.0
        for i in range(1, len(tokens) - 1):
            hidden = list(tokens)
            hidden[i] = t.mask_id
            for j in range(i + 1, len(tokens) - 1):
                if variant == "original" or t.starts_word[tokens[j]]:
                    break
                hidden[j] = t.mask_id
            expected += log_probability(model, hidden, i, tokens[i])
        assert abs(total - expected) < 1e-4 * len(ids)
    np.testing.assert_allclose(found[:3], found[3:6], rtol=1e-6)
    assert (found < 0).all()


def test_the_likelihood_of_a_causal_model_is_the_sum_over_its_tokens(causal):
    t = causal.tokenizer
    found = likelihood.log_likelihood(causal, TEXTS[:3])
    for text, total in zip(TEXTS[:3], found, strict=True):
        tokens = [t.cls_id, *t.encode([text])[0].tolist(), t.sep_id]
        expected = sum(log_probability(causal, tokens, i, tokens[i + 1]) for i in range(len(tokens) - 2))
        assert abs(total - expected) < 1e-3


@pytest.mark.parametrize(
    ("texts", "message"), [(["a", ""], "text 2, '', has 0 tokens"), (["dog " * 600], "expected 1 to")]
)
def test_texts_without_a_likelihood(model, texts, message):
    with pytest.raises(UserError, match=message):
        likelihood.log_likelihood(model, texts)


def test_minimal_pairs(model, toy, trained_run, tmp_path):
    """The toy text says what each animal does."""
    good = [f"The {animal} {does} today." for animal, does in toy.animals.items()]
    does = list(toy.animals.values())
    bad = [f"The {animal} {does[i - 1]} today." for i, animal in enumerate(toy.animals)]
    lines = [{"sentence_good": g, "sentence_bad": b, "UID": "does"} for g, b in zip(good, bad, strict=True)]
    lines += [{"sentence_good": g, "sentence_bad": g, "UID": "same"} for g in good]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pairs = minimal_pairs.read(str(tmp_path))
    result = minimal_pairs.run(model, pairs, "original", lambda: False)
    assert result["paradigms"]["does"]["accuracy"] >= 5 / 6
    assert result["paradigms"]["same"]["accuracy"] == 0.5
    assert result["pairs"] == 12
    assert result["accuracy"] == pytest.approx((result["paradigms"]["does"]["accuracy"] + 0.5) / 2)
    arguments = ["--task=minimal_pairs", "--variant=original", f"--data={tmp_path}", f"--json={tmp_path / 'r.json'}"]
    done = toy.run("evaluate", f"--checkpoint={trained_run}", *arguments)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1].startswith("all "), done
    assert json.loads((tmp_path / "r.json").read_text())["paradigms"] == result["paradigms"]


def test_clozes(model, toy, trained_run, tmp_path):
    (tmp_path / "clozes").write_text(
        "The [MASK] barks in the garden.\tdog\n\nThe [MASK] sings on the hill.\tcow|bird\n"
    )
    clozes = cloze.read(str(tmp_path / "clozes"))
    result = cloze.run(model, clozes)
    assert result["top1"] == 1.0
    assert result["clozes"] == 2
    assert result["mean_reciprocal_rank"] == 1.0
    assert [a["answer"] for a in result["answers"]] == ["dog", "bird"]
    word, probability = MaskFiller(model).top_words(clozes[0][0], 1)[0][0]
    assert word == "dog"
    assert probability == pytest.approx(result["answers"][0]["probability"])
    done = toy.run("evaluate", f"--checkpoint={trained_run}", "--task=cloze", f"--data={tmp_path / 'clozes'}")
    assert done.returncode == 0, done
    assert "dog: rank 1, probability" in done.stdout, done
    assert cloze.read("") == list(cloze.BUILT_IN)
    assert all(text.count("[MASK]") == 1 for text, _ in cloze.BUILT_IN)


@pytest.mark.parametrize("task", ["cloze", "minimal_pairs"])
def test_the_watch_sees_every_batch(trained_run, tmp_path, task):
    """A long file is no stall: what would end the command is told of each cloze, and of each batch of pairs."""
    lines = {
        "cloze": ["The [MASK] barks in the garden.\tdog"] * 5,
        "minimal_pairs": [json.dumps({"sentence_good": "The dog barks.", "sentence_bad": "Barks the dog."})] * 5,
    }
    (tmp_path / "data.jsonl").write_text("\n".join(lines[task]))
    script = (
        "from flax_mlm import evaluate\n"
        "from flax_mlm.cli import app\n"
        "from flax_mlm.distributed import processes\n"
        "from flax_mlm.inference import likelihood\n"
        "likelihood._BATCH_TOKENS = 32\n"
        "processes.ProcessGroup.progress = lambda self, doing, step=0: print(doing)\n"
        "app.run(evaluate.main, from_checkpoint=True)"
    )
    line = [sys.executable, "-c", script, f"--checkpoint={trained_run}", f"--data={tmp_path / 'data.jsonl'}"]
    done = subprocess.run([*line, f"--task={task}"], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert done.stdout.count("evaluating\n") >= 5, done


def test_lines_end_at_newlines_alone(tmp_path):
    (tmp_path / "data.jsonl").write_bytes('{"sentence_good": "a\u2028b", "sentence_bad": "c\x85d"}\r\n'.encode())
    assert minimal_pairs.read(str(tmp_path / "data.jsonl")) == {"data": [("a\u2028b", "c\x85d")]}
    (tmp_path / "clozes").write_bytes("A\u2028[MASK].\tdog\r\n\x0cThe [MASK].\tcat".encode())
    assert cloze.read(str(tmp_path / "clozes")) == [("A\u2028[MASK].", ("dog",)), ("\x0cThe [MASK].", ("cat",))]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("minimal_pairs", None, "expected a .jsonl file or a folder of .jsonl files"),
        ("minimal_pairs", b"", "has no examples"),
        ("minimal_pairs", b'{"sentence_good": "a"}', "data.jsonl:1 is not a pair"),
        ("minimal_pairs", b'\n{"sentence_good": "a", "sentence_bad": 3}', "data.jsonl:2 is not a pair"),
        ("minimal_pairs", b'{"sentence_good": "a", "sentence_bad": " "}', "data.jsonl:1 is not a pair"),
        ("minimal_pairs", b"[]", "data.jsonl:1 is a list of 0; expected a JSON object"),
        ("minimal_pairs", b"\xff\xfe", "is not UTF-8"),
        ("cloze", None, "data.jsonl cannot be read: No such file"),
        ("cloze", b"", "has no clozes"),
        ("cloze", b"The dog barks.\tdog", "data.jsonl:1 is not a text with one"),
        ("cloze", b"The [MASK] barks.", "data.jsonl:1 is not a text with one"),
        ("cloze", b"The [MASK] [MASK] barks.\tdog", "data.jsonl:1 is not a text with one"),
        ("cloze", b"\xff", "is not UTF-8"),
    ],
)
def test_files_that_will_not_do(tmp_path, task, content, message):
    if content is not None:
        (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        (minimal_pairs if task == "minimal_pairs" else cloze).read(str(tmp_path / "data.jsonl"))
