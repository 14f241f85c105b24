"""`flax_mlm.load`: a run, one of its steps, and an exported folder give the numbers of the commands."""

import json
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_mlm
from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.errors import UserError
from tests.helpers.paths import ROOT

TEXT = "The dog [MASK] in the garden today."
PLAIN = "The dog barks in the garden today."


@pytest.fixture(scope="module")
def model(trained_run):
    return flax_mlm.load(trained_run)


@pytest.fixture(scope="module")
def exported(toy, bert_run) -> tuple[Path, Path]:
    """The workdir of a small BERT, and the same model as a Hugging Face folder."""
    folder = toy.folder / "bert_exported"
    done = toy.run("export", f"--checkpoint={bert_run}", f"--output={folder}")
    assert done.returncode == 0, done.stderr
    return bert_run, folder


def test_fill_mask_returns_what_a_pipeline_of_transformers_does(model):
    answers = model.fill_mask(TEXT, top_k=3)
    assert len(answers) == 3
    assert [set(answer) for answer in answers] == [{"score", "token", "token_str", "sequence"}] * 3
    assert answers[0]["token_str"] == "barks"
    assert answers[0]["sequence"] == PLAIN
    assert answers[0]["token"] == model.tokenizer.encode([PLAIN])[0][2]
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert 0.5 < scores[0] <= 1.0
    assert type(scores[0]) is float
    json.dumps(answers)


def test_fill_mask_of_several_masks_and_texts(model):
    two = model.fill_mask("The [MASK] barks in the [MASK] today.", top_k=2)
    assert [len(answers) for answers in two] == [2, 2]
    assert two[0][0]["token_str"] == "dog"
    assert two[0][0]["sequence"] == "The dog barks in the [MASK] today."
    assert two[1][0]["token_str"] == "garden"
    assert model.fill_mask([TEXT, TEXT], top_k=2) == [model.fill_mask(TEXT, top_k=2)] * 2


def test_special_tokens_are_no_filling_however_many_are_asked_for(model):
    answers = model.fill_mask(TEXT, top_k=10**6)
    assert len(answers) == (~model.tokenizer.is_special).sum()


def test_texts_come_from_any_iterable(model):
    np.testing.assert_array_equal(model.embed(text for text in (PLAIN, TEXT)), model.embed([PLAIN, TEXT]))


@pytest.mark.parametrize("method", ["embed", "log_likelihood", "logits", "fill_mask"])
@pytest.mark.parametrize(("texts", "message"), [
    (["fine", "half \ud83d"], "text 2 has a lone surrogate"),
    ([PLAIN, None], "texts is list; expected a list of strings"),
    ([], "texts is empty"),
    (3, "texts is int"),
])  # fmt: skip
def test_texts_that_are_none_are_refused(model, method, texts, message):
    with pytest.raises(UserError, match=message):
        getattr(model, method)(texts)


def test_fill_mask_has_the_probabilities_of_the_command(toy, trained_run, model):
    done = toy.run("fill_mask", f"--checkpoint={trained_run}", "--top_k=1", TEXT)
    assert done.returncode == 0, done.stderr
    probability, word = done.stdout.split()
    (answer,) = model.fill_mask(TEXT, top_k=1)
    assert word == answer["token_str"]
    assert float(probability) == pytest.approx(answer["score"], abs=1e-3)


def test_logits_are_those_of_every_token(model):
    texts = [PLAIN, TEXT, "The cat."]
    logits = model.logits(texts)
    tokens = [model.tokenizer.encode_with_mask(text) for text in texts]
    assert [x.shape for x in logits] == [(len(ids) + 2, model.tokenizer.vocab_size) for ids in tokens]
    assert {x.dtype for x in logits} == {np.dtype(np.float32)}
    position = 1 + tokens[1].index(model.tokenizer.mask_id)
    probabilities = np.asarray(jax.nn.softmax(logits[1][position]))
    for answer in model.fill_mask(TEXT):
        assert probabilities[answer["token"]] == pytest.approx(answer["score"], rel=1e-4)


def test_log_likelihood_prefers_what_is_true(model):
    true, false = model.log_likelihood([PLAIN, "The dog sings under the house today."])
    assert false < true < 0
    (alone,) = model.log_likelihood([PLAIN])
    assert alone == pytest.approx(true, rel=1e-5)


def test_log_likelihood_of_a_causal_model_is_exact(causal_run):
    model = flax_mlm.load(causal_run)
    (logits,) = model.logits([PLAIN])
    tokens = model.tokenizer.encode([PLAIN])[0]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens)), tokens].sum()
    assert model.log_likelihood([PLAIN])[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="fill_mask needs a model trained with mlm"):
        model.fill_mask(TEXT)


def test_embeddings_are_those_of_the_command(toy, trained_run, model, tmp_path):
    texts = [PLAIN, "The cat sleeps near the river at night.", "The cow."]
    vectors = model.embed(texts)
    assert vectors.shape == (3, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    output = tmp_path / "vectors.npy"
    done = toy.run("embed", f"--checkpoint={trained_run}", f"--input={tmp_path / 'texts.txt'}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(vectors, np.load(output), atol=1e-4)


def test_a_step_of_a_run_is_loaded(trained_run, model):
    first, last = saved_steps(trained_run)
    earlier, newest = (flax_mlm.load(f"{trained_run}@{step}").logits([PLAIN])[0] for step in (first, last))
    np.testing.assert_array_equal(newest, model.logits([PLAIN])[0])
    assert np.abs(earlier - newest).max() > 0.01


def test_an_exported_folder_gives_the_numbers_of_the_run(exported):
    ours, folder = (flax_mlm.load(str(path)) for path in exported)
    np.testing.assert_allclose(ours.logits([PLAIN])[0], folder.logits([PLAIN])[0], atol=1e-4)
    np.testing.assert_allclose(ours.embed([PLAIN]), folder.embed([PLAIN]), atol=1e-4)
    np.testing.assert_allclose(ours.log_likelihood([PLAIN]), folder.log_likelihood([PLAIN]), rtol=1e-4)
    tokens = [[answer["token"] for answer in m.fill_mask(TEXT, top_k=3)] for m in (ours, folder)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.fill_mask("The dog barks."), r"has no \[MASK\]"),
        (lambda m: m.fill_mask([]), "texts is empty; expected at least one text"),
        (lambda m: m.fill_mask(TEXT, top_k=0), "top_k is 0; expected at least 1"),
        (lambda m: m.fill_mask("dog " * 50 + "[MASK]"), "tokens; this model was trained on at most 32"),
        (lambda m: m.embed(PLAIN), "texts is str; expected a list of strings"),
        (lambda m: m.embed([]), "texts is empty"),
        (lambda m: m.logits([PLAIN, "dog " * 600]), r"text 2 has \d+ tokens; expected at most 512"),
        (lambda m: m.log_likelihood([""]), "has 0 tokens; expected 1 to"),
        (lambda m: m.log_likelihood([3]), "texts is list; expected a list of strings"),
    ],
)
def test_a_mistake_is_one_line(model, call, message):
    with pytest.raises(UserError, match=message) as e:
        call(model)
    assert "\n" not in str(e.value)


def test_a_path_without_a_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in") as e:
        flax_mlm.load(tmp_path / "nothing")
    assert "\n" not in str(e.value)


def test_nothing_is_left_behind(trained_run):
    signals = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):
        flax_mlm.load(trained_run).fill_mask(TEXT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == signals
    assert jax.sharding.get_abstract_mesh().empty
    assert float(jax.numpy.ones(3).sum()) == 3.0


def test_the_package_is_light_and_sets_the_environment_before_jax_starts():
    code = """
import os, sys
import flax_mlm
assert "jax" not in sys.modules and "numpy" not in sys.modules
flax_mlm.load
import jax
assert "ynn" in os.environ["XLA_FLAGS"] or not jax.__version__.startswith("0.10")
"""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        flax_mlm.__getattr__("lode")


def test_a_backend_that_runs_without_the_flag_is_reported():
    code = "import jax; jax.devices(); import flax_mlm; flax_mlm.load"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "JAX has started without --xla_cpu" in done.stderr or platform.machine() != "x86_64"


def test_the_example_of_the_readme_runs(trained_run, capsys):
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import flax_mlm\n.*?)```", readme, re.DOTALL)
    variables: dict = {}
    exec(example.replace("runs/quickstart", str(trained_run)), variables)
    assert variables["vectors"].shape == (2, 32)
    assert capsys.readouterr().out
