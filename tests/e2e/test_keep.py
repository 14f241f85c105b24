"""What was fine-tuned is kept with its head, and gives the same number when it is loaded again."""

import dataclasses
import random

import numpy as np
import pytest

from flax_mlm.config.load import build
from flax_mlm.data import conll
from flax_mlm.data.tables import Labelled
from flax_mlm.errors import UserError
from flax_mlm.evaluation import classification, registry, tagging
from flax_mlm.inference import classify, embeddings
from flax_mlm.inference.config import read_config
from flax_mlm.inference.load import LoadedModel, load_model

SOON = {"epochs": 3, "seeds": 2, "learning_rates": "3e-3", "batch_size": 16, "max_length": 24}


def quiet(*_):
    return None


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    c = read_config(str(trained_run))
    c.finetune.update(SOON)
    return load_model(str(trained_run), build(c))


def loaded(folder) -> LoadedModel:
    return load_model(str(folder), build(read_config(str(folder))))


def with_finetune(model: LoadedModel, **fields) -> LoadedModel:
    finetune = dataclasses.replace(model.config.finetune, **fields)
    return model._replace(config=dataclasses.replace(model.config, finetune=finetune))


def sentence(toy, rng: random.Random, animal: str) -> str:
    return f"The {animal} {toy.animals[animal]} {rng.choice(['today', 'at night', 'all day'])}."


def write_table(file, toy, seed: int, kind: str, count: int = 60) -> str:
    """A table of texts, with a label, a number, or labels a text, or of pairs of texts."""
    rng, lines = random.Random(seed), []
    for i in range(count):
        a, b = rng.sample(["dog", "cat", "bird"], 2)
        text, other = sentence(toy, rng, a), sentence(toy, rng, b)
        row = {"single": [text, a], "regression": [text, str(len(a) + i % 2)], "pairs": [text, other, a]}
        row["multi"] = [f"{text} {other}", f"{a}, {b}" if i % 9 else ""]
        lines.append("\t".join(row[kind]))
    header = {"pairs": "sentence1\tsentence2\tlabel"}.get(kind, "sentence\tlabel")
    file.write_text("\n".join([header, *lines]) + "\n")
    return str(file)


def flags(**given) -> dict[str, str]:
    names = ("train", "dev", "test", "text", "pair", "label", "label_separator", "metric", "save")
    return {**dict.fromkeys(names, ""), **{name: str(value) for name, value in given.items()}}


@pytest.mark.parametrize(
    ("kind", "metric", "head"),
    [
        ("single", "", "auto"),
        ("single", "matthews", "linear"),
        ("pairs", "f1", "auto"),
        ("regression", "pearson", "auto"),
        ("multi", "f1_micro", "auto"),
    ],
)
def test_a_kept_classifier_gives_the_same_number(model, toy, tmp_path, kind, metric, head):
    train, test = (write_table(tmp_path / f"{i}.tsv", toy, i, kind) for i in (1, 2))
    tuned = with_finetune(model, head=head)
    given = flags(train=train, dev=train, test=test, metric=metric, save=tmp_path / "kept")
    before, lines = registry.evaluate("classification", tuned, quiet, **given)
    assert any(line.startswith("saved seed") for line in lines)
    again = loaded(tmp_path / "kept")
    assert again.task_head is not None
    assert list(again.task_head.labels) == before["classes"]
    assert again.task_head.pairs == (kind == "pairs")
    after, _ = registry.evaluate("classification", again, quiet, **flags(test=test))
    assert after["metric"] == before["metric"]
    assert after["median"] == before["saved"]["score"] == before["scores"][before["saved"]["seed"]]
    assert after["labels"] == before["labels"]
    assert registry.headline_metric(after).value == pytest.approx(after["median"])


def test_kept_labels_are_learned(model, toy, tmp_path):
    train, test = (write_table(tmp_path / f"{i}.tsv", toy, i, "multi", 160) for i in (1, 2))
    given = flags(train=train, dev=train, test=test, metric="f1_macro", save=tmp_path / "kept")
    result, _ = registry.evaluate("classification", with_finetune(model, epochs=6), quiet, **given)
    assert result["median"] > 0.9
    assert result["median"] > result["baseline"]


def test_a_kept_tagger_gives_the_same_number(model, toy, tmp_path):
    rng = random.Random(0)
    sentences = []
    for _ in range(60):
        animal = rng.choice(["dog", "cat", "bird"])
        words = sentence(toy, rng, animal).rstrip(".").split()
        sentences.append("\n".join(f"{word} {'B-ANIMAL' if word == animal else 'O'}" for word in words))
    (tmp_path / "tags.conll").write_text("\n\n".join(sentences) + "\n")
    given = {"train": str(tmp_path / "tags.conll"), "dev": "", "test": str(tmp_path / "tags.conll"), "columns": ""}
    before, _ = registry.evaluate("tagging", model, quiet, **given, save=str(tmp_path / "kept"))
    again = loaded(tmp_path / "kept")
    after, _ = registry.evaluate("tagging", again, quiet, **{**given, "train": ""}, save="")
    assert after["median"] == before["saved"]["score"]
    assert set(again.task_head.labels) == {"O", "B-ANIMAL"}
    with pytest.raises(UserError, match="head for tagging, and none for --task=classification; give --train"):
        registry.evaluate("classification", again, quiet, **flags(test="x.tsv"))


def test_pooling_and_length_are_kept(model, toy, tmp_path):
    train = write_table(tmp_path / "train.tsv", toy, 1, "single")
    tuned = with_finetune(model, pooling="mean", max_length=9, seeds=1)
    registry.evaluate("classification", tuned, quiet, **flags(train=train, test=train, save=tmp_path / "kept"))
    kept = loaded(tmp_path / "kept").config.finetune
    assert (kept.pooling, kept.max_length) == ("mean", 9)


def test_the_seed_that_is_best_on_the_development_set_is_kept(model, toy):
    rng = random.Random(1)
    animals = [rng.choice(["dog", "cat", "bird"]) for _ in range(48)]
    texts = [sentence(toy, rng, animal) for animal in animals]
    noisy = [rng.choice(animals) if i % 2 else animal for i, animal in enumerate(animals)]
    train, dev = Labelled(texts, None, noisy), Labelled(texts, None, animals)
    kept = []
    tuned = with_finetune(model, seeds=3, epochs=1)

    def keep(*what):
        kept.append(what)

    result = classification.run(tuned, train, dev, dev, "accuracy", quiet, quiet, keep)
    ((params, examples, head),) = kept
    assert examples == 48
    assert result["saved"]["seed"] == int(np.argmax(result["scores"]))
    rows = embeddings.tokenize(model, dev.texts)
    tuned = model._replace(params={**model.params, "encoder": params["encoder"]})
    outputs = classify.run_head(tuned, head._replace(params=params["task"]), rows)
    predicted = np.array(head.labels)[np.stack(outputs).argmax(-1)]
    assert (predicted == np.array(animals)).mean() == max(result["scores"])


def test_what_cannot_be_kept_or_used_is_one_line(model, toy, tmp_path):
    train = write_table(tmp_path / "train.tsv", toy, 1, "single")
    (tmp_path / "there").mkdir()
    wrong = [
        (model, flags(test=train), "--train is missing, and the checkpoint has no head; give --train"),
        (model, flags(save="x", test=train), "--train is missing; expected data to fine-tune on"),
        (model, flags(train=train, save=tmp_path / "there"), "which exists; name a new folder"),
        (with_finetune(model, method="probe"), flags(train=train, save=tmp_path / "new"), "method is probe"),
        (
            with_finetune(model, class_weights="fox=2"),
            flags(train=train),
            "has 'fox=2'; expected balanced",
        ),
    ]
    for given, arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            registry.evaluate("classification", given, quiet, **arguments)
    assert not (tmp_path / "new").exists()


def test_a_kept_head_refuses_what_it_was_not_trained_for(model, toy, tmp_path):
    train = write_table(tmp_path / "train.tsv", toy, 1, "single")
    given = flags(train=train, dev=train, save=tmp_path / "kept")
    registry.evaluate("classification", with_finetune(model, seeds=1), quiet, **given)
    again = loaded(tmp_path / "kept")
    pairs = write_table(tmp_path / "pairs.tsv", toy, 1, "pairs")
    (tmp_path / "fox.tsv").write_text("sentence\tlabel\nThe fox.\tfox\nThe dog.\tdog\n")
    for arguments, message in [
        (flags(test=pairs), "--test has two texts a line; expected one, as the head was trained on"),
        (flags(test=train, metric="spearman"), "--metric is spearman, for regression"),
        (flags(test=tmp_path / "fox.tsv"), "fox.tsv:2 has label 'fox', which is not in the training set"),
        (flags(), "--test is missing; expected labelled examples"),
    ]:
        with pytest.raises(UserError, match=message):
            registry.evaluate("classification", again, quiet, **arguments)


def test_tags_may_be_weighted(model, toy):
    part = conll.Tagged([["the", "dog"]] * 20, [["O", "B-A"]] * 20)
    result = tagging.run(with_finetune(model, class_weights="balanced", seeds=1), part, part, None, quiet, quiet)
    assert result["median"] == 1.0
