"""Evaluation: the same numbers every time and everywhere, and the numbers that NumPy finds."""

import collections
import json
import math
import shutil
from itertools import pairwise

import jax
import numpy as np
import pytest

from flax_mlm.config.load import build, from_dict
from flax_mlm.configs import base
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.mixture import Mixture
from flax_mlm.distributed.batches import shard_batch
from flax_mlm.distributed.mesh import make_mesh
from flax_mlm.evaluation import mlm
from flax_mlm.inference.forward import build_forward
from flax_mlm.inference.load import LoadedModel
from flax_mlm.objectives.rows import Vocabulary
from tests.helpers.models import load_on_8_devices

EXACT = ("rows", "predicted_tokens", "unigram_entropy", "majority_accuracy")


@pytest.fixture(scope="module")
def corpus(toy) -> Mixture:
    return Mixture({"toy": Corpus.open(toy.corpus)})


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    return load_on_8_devices(trained_run)


@pytest.fixture(scope="module")
def result(model, corpus) -> dict[str, float]:
    with jax.set_mesh(model.mesh):
        return mlm.run(model, corpus)


def with_eval(model: LoadedModel, **changes) -> LoadedModel:
    c = from_dict(model.config.to_dict())
    c.eval.update(changes)
    return model._replace(config=build(c))


def held_out_tokens(corpus: Mixture, model: LoadedModel) -> np.ndarray:
    rows = corpus.split("validation")
    return rows.read(np.arange(rows.num_rows))


def flat(result: dict) -> dict:
    """What `mlm.run` returns, of what the command writes."""
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def test_the_command_from_the_checkpoint_alone_twice(toy, trained_run, result, tmp_path):
    """Moved elsewhere, without the run's other files; on one device where the run's result was taken on one too."""
    moved = tmp_path / "moved" / "300"
    shutil.copytree(trained_run / "checkpoints" / "300", moved)
    outputs = []
    for name in ("a.json", "b.json"):
        done = toy.run("evaluate", f"--checkpoint={moved}", f"--json={tmp_path / name}", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append((done.stdout, (tmp_path / name).read_text()))
    assert outputs[0] == outputs[1]
    found = flat(json.loads(outputs[0][1]))
    assert found == json.loads((trained_run / "result.json").read_text())
    assert f"{found['loss']:.4f} ± {found['loss_stderr']:.4f}" in outputs[0][0]
    # 8 devices say the same as one.
    assert found == pytest.approx(result, rel=1e-5)
    assert all(found[name] == result[name] for name in EXACT)


def test_the_command_on_eight_devices(toy, trained_run, result, tmp_path):
    done = toy.run("evaluate", f"--checkpoint={trained_run}@300", f"--json={tmp_path / 'x'}", devices=8)
    assert done.returncode == 0, done.stderr
    assert flat(json.loads((tmp_path / "x").read_text())) == pytest.approx(result, rel=1e-5)
    older = toy.run("evaluate", f"--checkpoint={trained_run}@200")
    assert older.returncode == 0
    assert older.stdout != done.stdout


@pytest.mark.parametrize(
    ("file", "message"), [("no/r.json", "'no/r.json' cannot be written: No such file"), (".", "'.' is a folder")]
)
def test_a_file_for_the_result_that_will_not_do_is_refused_at_the_start(toy, trained_run, tmp_path, file, message):
    done = toy.run("evaluate", f"--checkpoint={trained_run}", "--task=tagging", f"--json={file}", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert done.stderr.startswith(f"error: --json: {message}")
    assert not list(tmp_path.iterdir())


def test_every_row_is_counted_once(model, corpus, result):
    tokens_RL = held_out_tokens(corpus, model)
    maskable_R = (~model.tokenizer.is_special[tokens_RL]).sum(1)
    rate = model.config.eval.mask_rate
    expected_R = np.maximum((round(rate * 100_000) * maskable_R + 50_000) // 100_000, np.minimum(maskable_R, 1))
    assert result["rows"] == len(tokens_RL) == corpus.corpora["toy"].counts["validation"]["rows"]
    assert result["predicted_tokens"] == expected_R.sum()


def test_the_baselines_are_those_of_the_text(model, corpus, result):
    tokens_RL = held_out_tokens(corpus, model)
    tokens = tokens_RL[~model.tokenizer.is_special[tokens_RL]].tolist()
    counts = {t: tokens.count(t) for t in set(tokens)}
    assert len(tokens) == corpus.corpora["toy"].counts["validation"]["tokens"]
    entropy = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    assert result["unigram_entropy"] == pytest.approx(entropy, rel=1e-9)
    assert result["majority_accuracy"] == pytest.approx(max(counts.values()) / len(tokens), rel=1e-9)


def sums_of_each_row(model: LoadedModel, corpus: Mixture) -> np.ndarray:
    """(loss, correct, predicted) of every held-out row, asked 8 rows at a time, apart from `eval_batches`."""
    tokens_RL, found = held_out_tokens(corpus, model), []
    for start in range(0, len(tokens_RL), 8):
        number = np.minimum(np.arange(start, start + 8), len(tokens_RL) - 1)
        row_ids = np.stack([np.zeros(8), number], 1).astype(np.uint32)
        batch = shard_batch({"tokens": tokens_RL[number], "row_ids": row_ids}, model.mesh)
        with jax.set_mesh(model.mesh):
            answers, _ = jax.device_get(model.forward.evaluate(model.params, batch, model.vocab))
            scored = answers.scored
            found.append(np.stack([x.sum(1) for x in (scored.loss_BK, scored.correct_BK, answers.weights_BK)], 1))
    return np.concatenate(found)[: len(tokens_RL)].astype(np.float64)


def test_loss_accuracy_and_their_standard_errors(model, corpus, result):
    loss_R, correct_R, count_R = sums_of_each_row(model, corpus).T
    total, rows = count_R.sum(), len(count_R)
    for name, sum_R in (("loss", loss_R), ("accuracy", correct_R)):
        mean = sum_R.sum() / total
        assert result[name] == pytest.approx(mean, rel=1e-6)
        # Of a ratio of two sums: residuals of each row about the ratio, over the mean count, by the number of rows.
        residual_R = sum_R - mean * count_R
        expected = np.sqrt((residual_R**2).mean() / rows) / count_R.mean()
        assert result[f"{name}_stderr"] == pytest.approx(expected, rel=1e-5)
        # The bootstrap over rows agrees, roughly.
        pick = np.random.default_rng(0).integers(0, rows, (2000, rows))
        bootstrap = (sum_R[pick].sum(1) / count_R[pick].sum(1)).std()
        assert result[f"{name}_stderr"] == pytest.approx(bootstrap, rel=0.2)
    held_out = corpus.corpora["toy"].counts["validation"]
    bits = result["loss"] / math.log(2) * held_out["tokens"] / held_out["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_the_batch_size_does_not_matter_and_max_rows_does(model, corpus, result):
    with jax.set_mesh(model.mesh):
        other = mlm.run(with_eval(model, batch_size=56), corpus)
        fewer = mlm.run(with_eval(model, max_rows=10), corpus)
    assert other == pytest.approx(result, rel=1e-5)
    assert fewer["rows"] == 10
    assert fewer["predicted_tokens"] < result["predicted_tokens"]


def test_the_table_says_what_the_numbers_say(result):
    text = "\n".join(mlm.table(result | {"objective": "mlm"}))
    for name in ("loss", "accuracy", "unigram_entropy", "majority_accuracy"):
        assert f"{result[name]:.4f}" in text
    assert f"over {result['predicted_tokens']:,} predicted tokens in {result['rows']:,} rows" in text
    assert "next-token" in "\n".join(mlm.table(result | {"objective": "clm"}))


def test_breakdowns_add_up_to_the_whole(model, corpus, result):
    with jax.set_mesh(model.mesh):
        measured = mlm.measure(model, corpus, lambda: False)
    by = mlm.breakdown(measured, model.tokenizer.starts_word)
    assert set(by) == {"frequency", "word", "position"}
    for groups in by.values():
        counts = [g["predicted_tokens"] for g in groups.values()]
        assert sum(counts) == result["predicted_tokens"]
        for name in ("loss", "accuracy"):
            assert np.dot(counts, [g[name] for g in groups.values()]) / sum(counts) == pytest.approx(result[name])
    # The frequent ones are known best; and each group's numbers are those of its own tokens.
    tokens_RL = held_out_tokens(corpus, model)
    frequent = np.argsort(-np.bincount(tokens_RL[~model.tokenizer.is_special[tokens_RL]]))[:100]
    of_frequent_4 = measured.token_V4[frequent].sum(0)
    assert by["frequency"]["rank 1 to 100"]["predicted_tokens"] == of_frequent_4[0]
    assert by["frequency"]["rank 1 to 100"]["loss"] == pytest.approx(of_frequent_4[1] / of_frequent_4[0])
    starts = measured.token_V4[np.flatnonzero(model.tokenizer.starts_word)].sum(0)
    assert by["word"]["starts a word"]["accuracy"] == pytest.approx(starts[3] / starts[0])
    assert measured.position_L4[0, 0] == 0, "[CLS] is never predicted"


def test_positions_are_those_of_what_is_predicted(model, corpus):
    """With clm every token but [CLS] is predicted once, at its own place."""
    c = from_dict(model.config.to_dict())
    c.objective.name = "clm"
    config = build(c)
    with jax.set_mesh(model.mesh):
        forward = build_forward(config, corpus.vocab_size, model.mesh)
        causal = model._replace(config=config, forward=forward)
        measured = mlm.measure(causal, corpus, lambda: False)
    tokens_RL = held_out_tokens(corpus, model)
    expected: collections.Counter[int] = collections.Counter()
    for row in tokens_RL[tokens_RL.any(1)]:
        starts = [*np.flatnonzero(row == model.tokenizer.cls_id), int((row != model.tokenizer.pad_id).sum())]
        for begin, end in pairwise(starts):
            expected.update(range(1, end - begin))
    assert {i: n for i, n in enumerate(measured.position_L4[:, 0].astype(int)) if n} == expected


def test_mask_rates(toy, trained_run, tmp_path):
    line = f"--checkpoint={trained_run}", "--mask_rates=0.15,0.5", f"--json={tmp_path / 'x'}"
    done = toy.run("evaluate", *line)
    found = json.loads((tmp_path / "x").read_text())
    assert found["rates"]["0.15"] == flat(found), "the same masks at the same rate"
    assert found["rates"]["0.5"]["predicted_tokens"] > 3 * found["predicted_tokens"]
    assert found["rates"]["0.5"]["loss"] > found["loss"]
    assert "by mask rate:\n    15%  loss" in done.stdout
    assert "by position in the word:" in done.stdout
    for rates in ("0", "1.5", "much"):
        done = toy.run("evaluate", f"--checkpoint={trained_run}", f"--mask_rates={rates}")
        assert (done.returncode, done.stderr) == (
            2,
            f"error: --mask_rates is '{rates}'; expected fractions such as 0.15,0.3\n",
        )


def test_rows_of_another_length_are_masked_at_the_same_rate(toy, trained_run, model, tmp_path):
    """As many slots as a longer row needs: not those of the rows that it was trained on."""
    longer = toy.flags(data__corpus="", data__source=f"text:{toy.text}", data__seq_len=128)
    longer.append(f"--config.tokenizer.path={toy.corpus / 'tokenizer.model'}")
    assert toy.run("prepare", *longer, f"--output={tmp_path / 'longer'}").returncode == 0
    line = f"--checkpoint={trained_run}", f"--config.data.corpus={tmp_path / 'longer'}", f"--json={tmp_path / 'x'}"
    done = toy.run("evaluate", *line, "--mask_rates=0.5")
    assert done.returncode == 0, done.stderr
    found, rows = json.loads((tmp_path / "x").read_text()), Corpus.open(tmp_path / "longer").split("validation")
    tokens_RL = rows.read(np.arange(rows.num_rows))
    ordinary = int((~model.tokenizer.is_special[tokens_RL]).sum())
    assert found["predicted_tokens"] == pytest.approx(0.15 * ordinary, rel=0.02)
    assert done.stderr.startswith("note: not the corpus this model was validated on")
    assert found["rates"]["0.5"]["predicted_tokens"] == pytest.approx(0.5 * ordinary, rel=0.02)


def test_options_of_another_task_are_refused(toy, trained_run):
    splits, columns = "--train, --dev, --test", "--text, --pair, --label"
    for task, option, takes in (
        ("classification", "--columns=1,2", f"{splits}, {columns}, --label_separator, --metric, --save"),
        ("mlm", "--train=x", "--mask_rates"),
        ("tagging", "--metric=f1", f"{splits}, --columns, --save"),
    ):
        done = toy.run("evaluate", f"--checkpoint={trained_run}", f"--task={task}", option)
        name = option.partition("=")[0]
        assert (done.returncode, done.stderr) == (2, f"error: {name} is not used by --task={task}; it takes {takes}\n")


def test_an_untrained_model_is_no_better_than_the_vocabulary(toy, corpus):
    """Scores of a new model are nearly uniform: its loss is ln V, well over the unigram entropy."""
    c = base.get_config()
    c.model.update(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=64)
    c.data.seq_len, c.eval.batch_size = 32, 16
    config = build(c)
    mesh, tokenizer = make_mesh(config.mesh), corpus.tokenizer()
    with jax.set_mesh(mesh):
        forward = build_forward(config, corpus.vocab_size, mesh)
        params = forward.init()
        untrained = LoadedModel(config, mesh, forward, params, tokenizer, Vocabulary.from_tokenizer(tokenizer))
        found = mlm.run(untrained, corpus)
    assert found["loss"] == pytest.approx(math.log(corpus.vocab_size), abs=0.2)
