"""Fine-tuning for labels and tags: it learns what can be learned, its numbers are scikit-learn's and seqeval's, and bad
files are named."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from sklearn.dummy import DummyClassifier

from flax_mlm.config.load import build, from_dict
from flax_mlm.data import conll, tables
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.errors import UserError
from flax_mlm.evaluation import classification, metrics, report, tagging
from flax_mlm.finetuning.loop import epoch_indices
from flax_mlm.inference import embeddings
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model

SOON = {"epochs": 4, "seeds": 2, "learning_rates": "3e-3,1e-2", "batch_size": 16, "dropout_rate": 0.0, "max_length": 24}


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    """On 8 devices, 4 × 2."""
    c = read_config(str(trained_run))
    c.mesh.data, c.mesh.fsdp = 4, 2
    c.finetune.update(SOON)
    return load_model(str(trained_run), build(c))


def sentences(toy, count: int, seed: int) -> list[tuple[str, str]]:
    """(text, animal)"""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        animal = rng.choice(["dog", "cat", "bird"])
        found.append((f"The {animal} {toy.animals[animal]} {rng.choice(['today', 'at night', 'all day'])}.", animal))
    return found


def as_labelled(rows: list[tuple[str, str]]) -> tables.Labelled:
    return tables.Labelled([text for text, _ in rows], None, [label for _, label in rows])


def quiet(*_):
    return None


@pytest.mark.parametrize("method", ["full", "probe"])
def test_labels_are_learned(model, toy, method):
    finetuned = dataclasses.replace(model.config.finetune, method=method, pooling="mean")
    model = model._replace(config=dataclasses.replace(model.config, finetune=finetuned))
    parts = [as_labelled(sentences(toy, n, seed)) for n, seed in ((120, 1), (40, 2), (40, 3))]
    result = classification.run(model, *parts, "accuracy", quiet, quiet)
    assert result["median"] == 1.0
    assert result["stderr"] == 0.0
    assert result["examples"] == {"train": 120, "dev": 40, "test": 40}
    assert result["predictions"] == result["labels"] == parts[2].labels
    assert len(result["scores"]) == (2 if method == "full" else 1)
    assert "median of" in report.table(result)[0]
    if method == "full":
        again = classification.run(model, *parts, "accuracy", quiet, quiet)
        assert again == result, "the same seed, the same result"


@pytest.mark.parametrize(
    ("metric", "rare", "strategy"),
    [
        ("accuracy", "b", {"strategy": "most_frequent"}),
        ("matthews", "b", {"strategy": "most_frequent"}),
        ("f1", "b", {"strategy": "constant", "constant": "b"}),
        ("f1", "a", {"strategy": "constant", "constant": "b"}),
        ("f1", "bc", {"strategy": "most_frequent"}),
    ],
)
def test_baselines_are_those_of_scikit_learn(metric, rare, strategy):
    common = "ab".replace(rare[0], "")
    train, test = ["b", "a", *common * 3, *rare], ["b", "a", common, *rare]
    classes = sorted({*train})
    labels = {"train": np.array([classes.index(x) for x in train]), "test": np.array([classes.index(x) for x in test])}
    dummy = DummyClassifier(**strategy).fit(np.zeros((len(train), 1)), train)
    found = [classes.index(x) for x in dummy.predict(np.zeros((len(test), 1)))]
    expected = metrics.evaluate(metric, labels["test"], np.array(found), len(classes))
    assert classification.baseline(metric, labels, classes)[0] == expected


def test_numbers_have_a_baseline_without_correlation():
    labels = {"train": np.float32([1, 2, 6]), "test": np.float32([1, 2])}
    assert classification.baseline("pearson", labels, []) == (0.0, "always 3")


def test_words_have_the_tag_that_is_commonest_in_training():
    train = conll.Tagged([["Paris", "is"], ["Paris"], ["Paris"]], [["B-LOC", "O"], ["B-PER"], ["B-LOC"]])
    assert tagging.commonest_tags(train, [["is", "Paris", "new"]]) == [["O", "B-LOC", "O"]]


@pytest.mark.parametrize(("median", "is_said"), [(0.5, True), (0.51, True), (0.53, False)])
def test_a_result_no_better_than_the_baseline_is_said(median, is_said):
    entries = {"metric": "accuracy", "median": median, "stderr": 0.02, "baseline": 0.5, "baseline_label": "'a'"}
    others = {"examples": {"test": 9}, "spread": [0, 1], "dev_scores": {}, "chosen_on_test": False}
    said = "WARNING: not better than the baseline by more than the standard error"
    assert any(line.startswith(said) for line in report.table(entries | others)) == is_said


@pytest.mark.parametrize(
    ("size", "rates"), [(128, [1e-4, 3e-4, 1e-3]), (511, [1e-4, 3e-4, 1e-3]), (768, [2e-5, 5e-5, 1e-4])]
)
def test_small_encoders_get_higher_rates(model, size, rates):
    assert dataclasses.replace(model.config.finetune, learning_rates="").rates(size) == rates


def test_numbers_and_pairs_are_learned(model, toy):
    """How alike are two sentences? 1 for the same animal, else 0."""
    rng = random.Random(0)

    def pairs(count: int, seed: int) -> tables.Labelled:
        a, b = sentences(toy, count, seed), sentences(toy, count, seed + 100)
        b = [x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True)]
        return tables.Labelled(
            [t for t, _ in a], [t for t, _ in b], [str(float(x == y)) for (_, x), (_, y) in zip(a, b, strict=True)]
        )

    result = classification.run(model, pairs(200, 1), None, None, "spearman", quiet, quiet)
    assert result["examples"] == {"train": 180, "dev": 20, "test": 20}
    assert set(result["dev_scores"]) == {"0.003", "0.01"}
    assert -1 <= result["median"] <= 1
    found, gold = np.array(result["predictions"]), np.array(result["labels"])
    best = result["scores"].index(min(result["scores"], key=lambda s: abs(s - scipy.stats.spearmanr(gold, found)[0])))
    assert result["scores"][best] == pytest.approx(scipy.stats.spearmanr(gold, found)[0])


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=50))
def test_metrics_are_those_of_scikit_learn(rows):
    gold, found = np.array(rows).T
    assert metrics.evaluate("accuracy", gold, found) == sklearn.metrics.accuracy_score(gold, found)
    assert metrics.evaluate("matthews", gold, found) == sklearn.metrics.matthews_corrcoef(gold, found)
    expected = sklearn.metrics.f1_score(gold, found, zero_division=0.0)
    assert metrics.evaluate("f1", gold, found, 2) == expected


def test_what_is_rare_is_learned_and_not_held_out():
    labels = [[str(i % 2)] for i in range(40)]
    for rare in range(40):  # wherever it is
        some = [*labels[:rare], ["rare"], *labels[rare + 1 :]]
        train, dev = report.hold_out(40, some)
        assert sorted(train + dev) == list(range(40))
        assert rare in train
        assert len(dev) in (3, 4)
    with pytest.raises(UserError, match="too few to split off a development set; set --dev"):
        report.hold_out(2, [["a"], ["b"]])


def test_batches_hold_every_example_once(model):
    epoch = list(epoch_indices([i % 7 + 1 for i in range(100)], 16, np.random.default_rng(0)))
    assert all(len(batch) == 16 for batch in epoch)
    assert len({i for batch in epoch for i in batch}) == 96
    assert [sorted(set(b)) for b in epoch_indices([1, 1, 1], 16, np.random.default_rng(0))] == [[0, 1, 2]]


def test_long_pairs_are_cut_at_their_longer_part(model):
    rows = embeddings.tokenize(model, ["dog " * 50, "dog", "dog " * 50], ["cat", "cat " * 50, "cat " * 49])
    t = model.tokenizer
    types_BL = np.asarray(embeddings.token_types(model, jnp.array(embeddings.pad(model, rows))))
    for tokens, types_L in zip(rows, types_BL, strict=True):
        types = types_L[:24].tolist()
        assert len(tokens) == 24
        assert types_L[24:].sum() == 0
        assert tokens[0] == t.cls_id
        assert tokens.count(t.sep_id) == 2
        assert types == [0] * (tokens.index(t.sep_id) + 1) + [1] * (23 - tokens.index(t.sep_id))
    assert t.decode(rows[0]).endswith("cat")
    assert t.decode(rows[1]).startswith("dog")
    assert abs(types_BL[2].sum() - 12) <= 1, "of two long ones each has a half"


def test_labels_that_will_not_do(model):
    some = as_labelled([("the dog", "a"), ("the cat", "b")] * 8)
    with pytest.raises(
        UserError, match="--test: example 1 has label 'c', which is not in the training set; it has a, b"
    ):
        classification.run(model, some, some, as_labelled([("x", "c")]), "accuracy", quiet, quiet)
    with pytest.raises(UserError, match="--train: example 1 has label 'a', not a number"):
        classification.run(model, some, some, None, "pearson", quiet, quiet)
    with pytest.raises(UserError, match="--train: all labels are 'a'"):
        classification.run(model, as_labelled([("x", "a")] * 9), some, None, "accuracy", quiet, quiet)
    with pytest.raises(UserError, match="--train has 2 examples, too few to split off"):
        classification.run(model, as_labelled([("x", "a"), ("y", "b")]), None, None, "accuracy", quiet, quiet)
    for rates in (",", "fast", "0.1,2"):
        c = from_dict(model.config.to_dict())
        c.finetune.learning_rates = rates
        with pytest.raises(UserError, match=r"finetune.learning_rates is"):
            build(c)


@pytest.mark.parametrize(
    ("pairs", "message"), [(None, "one text a line; expected two"), (["x"] * 2, "two texts a line")]
)
def test_all_parts_have_pairs_or_none(model, pairs, message):
    test = tables.Labelled(["a", "b"], pairs, ["1", "2"])
    train = test._replace(pairs=None if pairs else ["x"] * 2)
    with pytest.raises(UserError, match=f"--test has {message}"):
        classification.run(model, train, train, test)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling(model, pooling):
    """The state of the first or the last token, or the mean, of each text alone."""
    config = dataclasses.replace(model.config, finetune=dataclasses.replace(model.config.finetune, pooling=pooling))
    model = model._replace(config=config)
    texts = embeddings.tokenize(model, ["The dog barks.", "The cat sleeps near the river all day."] * 4)
    found = embeddings.run_batches(model, embeddings.make_encoder(model), model.params, texts, quiet)
    with jax.set_mesh(model.mesh):
        tokens = shard_rows(embeddings.pad(model, texts), model.mesh)
        states_BLD = np.asarray(jax.jit(lambda tokens: embeddings.hidden_states(model, model.params, tokens))(tokens))
    for states_LD, vector, row in zip(states_BLD, found, texts, strict=True):
        n = len(row)
        expected = {"cls": states_LD[0], "last": states_LD[n - 1], "mean": states_LD[:n].mean(0)}[pooling]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_causal_model_is_not_asked_at_its_first_token(model):
    causal = dataclasses.replace(model.config, objective=dataclasses.replace(model.config.objective, name="clm"))
    model = model._replace(config=causal)
    texts = embeddings.tokenize(model, ["The dog barks."] * 8)
    with pytest.raises(UserError, match=r"finetune.pooling is cls, but the first token of a causal model"):
        embeddings.run_batches(model, embeddings.make_encoder(model), model.params, texts, quiet)


# Tags


def write_conll(file, rows: list[tuple[list[str], list[str]]]) -> str:
    file.write_text("\n\n".join("\n".join(f"{w} {t}" for w, t in zip(*row, strict=True)) for row in rows) + "\n")
    return str(file)


def tagged(toy, count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    rows = []
    for text, animal in sentences(toy, count, seed):
        words = text.split()
        rows.append((words, ["B-" + animal.upper() if w == animal else "O" for w in words]))
    return rows


@given(st.lists(st.lists(st.tuples(*[st.sampled_from(["O", "B-A", "I-A", "B-B"])] * 2), min_size=1), min_size=1))
def test_entity_f1_from_counts_is_seqevals(rows):
    gold, found = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    assert metrics.entity_f1(metrics.entity_counts(gold, found)) == pytest.approx(
        f1_score(gold, found, zero_division=0)
    )


def test_tags_are_learned(model, toy, tmp_path):
    names = ("train", "dev", "test")
    parts = [
        conll.read(write_conll(tmp_path / n, tagged(toy, 120 if n == "train" else 30, i))) for i, n in enumerate(names)
    ]
    result = tagging.run(model, *parts, quiet, quiet)
    assert result["median"] == 1.0
    assert result["predictions"] == parts[2].tags
    assert set(result["kinds"]) >= {"DOG", "CAT", "BIRD"}


def test_long_sentences_are_split_and_joined(model):
    words = ["dog", "cat", "The"] * 40
    part = conll.Tagged([words, ["dog"]], [["B-A", "O", "O"] * 40, ["B-A"]])
    rows = tagging.split_sentences(model, part, ["O", "B-A"])
    assert len(rows.tokens) > 3
    assert all(len(tokens) <= 24 for tokens in rows.tokens)
    assert all(tokens[0] == model.tokenizer.cls_id and tokens[-1] == model.tokenizer.sep_id for tokens in rows.tokens)
    assert rows.sentences == sorted(rows.sentences)
    firsts = [[label for label in labels if label >= 0] for labels in rows.labels]
    assert [x for some in firsts[:-1] for x in some] == [1, 0, 0] * 40
    assert firsts[-1] == [1]


def test_tags_that_training_lacks_count_as_wrong(model, capsys):
    part = conll.Tagged([["dog", "cat"]] * 20, [["B-A", "O"]] * 20)
    other = conll.Tagged([["dog", "cat"], ["cat"]], [["B-A", "I-A"], ["B-C"]])
    result = tagging.run(model, part, part, other, print, quiet)
    assert result["labels"] == [["B-A", "I-A"], ["B-C"]]
    assert result["median"] == f1_score(result["labels"], result["predictions"], zero_division=0) == 0
    said = "note: --test has tags that the training set lacks, and that count as wrong: I-A 1, B-C 1"
    assert said in capsys.readouterr().out.splitlines()


def test_a_part_without_entities(model):
    part = conll.Tagged([["dog", "cat"]] * 20, [["B-A", "O"]] * 20)
    with pytest.raises(UserError, match="--test has no entities, all tags are O; entity F1 needs some"):
        tagging.run(model, part, part, conll.Tagged([["dog"]], [["O"]]), quiet, quiet)


def test_a_probe_has_no_tags(model):
    finetuned = dataclasses.replace(model.config.finetune, method="probe")
    model = model._replace(config=dataclasses.replace(model.config, finetune=finetuned))
    part = conll.Tagged([["dog", "cat"]] * 20, [["B-A", "O"]] * 20)
    with pytest.raises(UserError, match="method is probe; only --task=classification takes it; use full"):
        tagging.run(model, part, part, None, quiet, quiet)


# The command


def test_the_commands(toy, trained_run, tmp_path):
    rows = sentences(toy, 60, 1)
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *map("\t".join, rows)]))
    settings = [f"--config.finetune.{k}={v}" for k, v in {**SOON, "learning_rates": "1e-2", "seeds": 1}.items()]
    common = [f"--checkpoint={trained_run}", *settings, f"--json={tmp_path / 'r.json'}"]
    done = toy.run("evaluate", *common, "--task=classification", f"--train={tmp_path / 'train.tsv'}")
    assert done.returncode == 0, done
    assert done.stdout.startswith("train  54 texts: "), done
    assert "learning rate 0.01: " in done.stdout
    assert "baseline without a model  " in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["metric"] == "accuracy"
    write_conll(tmp_path / "tags", tagged(toy, 60, 1))
    done = toy.run("evaluate", *common, "--task=tagging", f"--train={tmp_path / 'tags'}")
    assert done.returncode == 0, done
    assert json.loads((tmp_path / "r.json").read_text())["metric"] == "f1", done
    done = toy.run("evaluate", *common, "--task=tagging")
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: --train is missing"), done
