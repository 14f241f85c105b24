"""A model that computes NaN or infinity is named as such, by whatever would compare, rank or write its numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_mlm import compare
from flax_mlm.data.conll import Tagged
from flax_mlm.data.tables import Labelled
from flax_mlm.errors import UserError
from flax_mlm.evaluation import classification, cloze, minimal_pairs, mlm, retrieval, tagging
from flax_mlm.finetuning import loop
from flax_mlm.inference import parity
from flax_mlm.inference.api import Model
from flax_mlm.inference.forward import NotFinite, check_finite
from flax_mlm.inference.load import LoadedModel
from flax_mlm.inference.mask_filler import MaskFiller
from flax_mlm.storage import files
from tests.helpers.hf_folders import written
from tests.helpers.models import load_on_8_devices

MASKED = "The [MASK] barks."
LABELLED = Labelled(["The dog.", "The cat."] * 8, None, ["a", "b"] * 8)
NUMBERED = Labelled(["The dog."] * 3, ["The cat.", "The cow.", "The dog."], ["1", "2", "3"])
TAGGED = Tagged([["The", "dog"]] * 16, [["O", "B-X"]] * 16)
BENCHMARK = retrieval.Benchmark({"d": "The dog.", "e": "The cat."}, {"q": "dog?"}, {"q": {"d": 1}})


@pytest.fixture(scope="module")
def sound(trained_run) -> LoadedModel:
    return with_finetune(
        load_on_8_devices(trained_run), learning_rates="1e-3", seeds=1, epochs=1, batch_size=16, dropout_rate=0.0
    )


def with_finetune(model: LoadedModel, **changes) -> LoadedModel:
    finetune = dataclasses.replace(model.config.finetune, **changes)
    return model._replace(config=dataclasses.replace(model.config, finetune=finetune))


@pytest.fixture(scope="module", params=[np.nan, np.inf])
def broken(request, sound) -> LoadedModel:
    """With one weight of the last norm that is no number, so that every state has one."""
    params = jax.device_get(sound.params)
    norm = params["encoder"]["final_norm"]
    norm["scale"] = norm["scale"].copy()
    norm["scale"][3] = request.param
    return sound._replace(params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, sound.params)))


USES = {
    "fill_mask": lambda m: Model(m).fill_mask(MASKED),
    "all masks together": lambda m: MaskFiller(m).top_fillings(MASKED, 2),
    "targets": lambda m: MaskFiller(m).rank_words(MASKED, ["dog", "cat"]),
    "cloze": lambda m: cloze.run(m, [(MASKED, ("dog",))]),
    "likelihood": lambda m: Model(m).log_likelihood(["The dog."]),
    "minimal pairs": lambda m: minimal_pairs.run(m, {"all": [("The dog barks.", "Barks dog the.")]}),
    "logits": lambda m: Model(m).logits(["The dog."]),
    "embed": lambda m: Model(m).embed(["The dog."]),
    "similarity": lambda m: retrieval.run(m, NUMBERED),
    "search": lambda m: retrieval.run(m, BENCHMARK),
    "probe": lambda m: classification.run(with_finetune(m, method="probe"), LABELLED, LABELLED),
    "labels": lambda m: classification.run(m, LABELLED, LABELLED),
    "tags": lambda m: tagging.run(m, TAGGED, TAGGED),
    "held-out loss": lambda m: mlm.evaluate(m, lambda: False, ""),
}


@pytest.mark.parametrize("use", USES)
def test_numbers_that_are_not_finite_are_refused(broken, use):
    with pytest.raises(NotFinite, match="the model computes NaN or infinity; expected finite numbers"):
        USES[use](broken)


def test_compare_names_the_checkpoint_that_computes_nan(toy, trained_run, sound, tmp_path):
    folder = written(tmp_path / "bert", "bert", sound.tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"][5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    (tmp_path / "c.tsv").write_text(f"{MASKED}\tdog\n")
    line = [f"--checkpoints=good={trained_run},bad={folder}", f"--tasks=cloze --data={tmp_path / 'c.tsv'}"]
    done = toy.run("compare", *line, f"--output={tmp_path / 'out'}", "--config.data.seq_len=32")
    expected = (2, f"error: cloze of bad: {folder}: 1 values of head/decoder_bias are NaN or infinite")
    assert (done.returncode, done.stderr.splitlines()[-1].partition(";")[0]) == expected, done


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_stored_result_with_such_a_number_is_evaluated_again(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "digest", lambda _: "key")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "c-a-key.json").write_text(f'{{"task": "cloze", "answers": [{{"probability": {number}}}]}}')
    with pytest.raises(UserError, match="c of a: --checkpoint: no checkpoint in '/nowhere'"):
        compare.result_of("c", [], "a", "/nowhere", "sha", tmp_path)


@pytest.mark.parametrize("differences", [(np.nan, 0.0), (0.0, np.nan), (np.inf, 0.0)])
def test_a_difference_that_is_no_number_is_within_no_limit(differences):
    assert not parity.Difference(1, [], False, *differences).is_within(1.0)


def test_such_a_number_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"r\.json cannot be written: .*float"):
        files.write_json(tmp_path / "r.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_equal_probabilities_know_no_answer(sound):
    result = cloze.run(sound._replace(params=jax.tree.map(jnp.zeros_like, sound.params)), [(MASKED, ("dog",))])
    assert result["answers"][0]["rank"] == (~sound.tokenizer.is_special).sum()


def climbing(model: LoadedModel) -> loop.Problem:
    """A weight that grows by the learning rate in every step, and is no number in the end."""

    def dev_score(params) -> float:
        with np.errstate(invalid="ignore"):
            score = np.log(0.05 - np.asarray(params["bias"]))
        check_finite(score)
        return -float(score)

    def batch(indices, _):
        return (np.zeros((len(indices), 4), np.float32),)

    return loop.Problem(
        lambda key: {"bias": jnp.float32(0.0)},
        lambda params, x, key: x.mean() - params["bias"],
        [1] * 16,
        batch,
        dev_score,
    )


def test_a_learning_rate_that_diverges_leaves_the_choice_to_the_others(sound):
    model, lines = with_finetune(sound, learning_rates="0.9,0.01", weight_decay=0.0, warmup_fraction=0.0), []
    found = loop.search(model, climbing(model), lambda params: float(params["bias"]), lines.append, lambda: None)
    assert (found.best, lines[0]) == ("0.01", "learning rate 0.9: diverged")
    assert json.dumps(found.dev_scores, allow_nan=False)


def test_the_best_epoch_before_a_divergence_is_kept(sound):
    model = with_finetune(sound, learning_rates="0.04", epochs=9, weight_decay=0.0, warmup_fraction=0.0)
    (x,) = loop.search(model, climbing(model), lambda params: float(params["bias"]), print, lambda: None).outcomes
    assert 0 < x < 0.05


def test_a_later_seed_that_diverges_is_named(sound):
    model = with_finetune(sound, learning_rates="0.01", seeds=2)
    calls = []

    def dev_score(params) -> float:
        calls.append(params)
        check_finite(np.float32(np.nan if len(calls) > model.config.finetune.epochs else 0.5))
        return 0.5 + len(calls)

    problem = climbing(model)._replace(dev_score=dev_score)
    with pytest.raises(UserError, match="seed 1 with the best learning rate, "):
        loop.search(model, problem, lambda params: None, print, lambda: None)


def test_learning_rates_are_told_apart_and_used_to_the_last_digit(sound):
    model = with_finetune(sound, learning_rates="0.0010000001,0.001", epochs=1)
    found = loop.search(model, climbing(model), lambda params: None, print, lambda: None)
    assert [*found.dev_scores] == ["0.0010000001", "0.001"]


def test_a_search_in_which_everything_diverges_fails(sound):
    model = with_finetune(sound, learning_rates="0.9,0.5", weight_decay=0.0, warmup_fraction=0.0)
    with pytest.raises(NotFinite):
        loop.search(model, climbing(model), lambda params: float(params["bias"]), print, lambda: None)
