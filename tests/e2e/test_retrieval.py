"""Vectors for search: the loss is InfoNCE over the whole batch, the numbers are those of their definitions, what is
learned can be kept, embedded and searched."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from flax_mlm.config.load import build
from flax_mlm.data import tables
from flax_mlm.data.tables import Labelled
from flax_mlm.distributed.batches import shard_rows
from flax_mlm.errors import UserError
from flax_mlm.evaluation import report, retrieval
from flax_mlm.finetuning import contrastive
from flax_mlm.inference import embeddings
from flax_mlm.inference.config import read_config
from flax_mlm.inference.forward import build_forward
from flax_mlm.inference.load import LoadedModel, load_model
from tests.helpers.search import search_of_integers

SOON = {"epochs": 2, "seeds": 1, "learning_rates": "3e-3", "batch_size": 16, "max_length": 24, "pooling": "mean"}


@pytest.fixture(scope="module")
def model(trained_run) -> LoadedModel:
    """On 8 devices, 4 × 2."""
    return restored(trained_run, data=4, fsdp=2)


def restored(run, data: int, fsdp: int) -> LoadedModel:
    c = read_config(str(run))
    c.mesh.data, c.mesh.fsdp = data, fsdp
    c.finetune.update(SOON)
    return load_model(str(run), build(c))


def with_finetune(model: LoadedModel, **changes) -> LoadedModel:
    finetuned = dataclasses.replace(model.config.finetune, **changes)
    return model._replace(config=dataclasses.replace(model.config, finetune=finetuned))


def quiet(*_):
    return None


def pairs_of(toy, count: int, seed: int, negatives: int = 0) -> contrastive.Pairs:
    """A question after an animal, and what it does."""
    rng = random.Random(seed)
    pairs = contrastive.Pairs([], [], [])
    for _ in range(count):
        animal, *others = rng.sample(list(toy.animals), 1 + negatives)
        when = rng.choice(["today", "at night", "all day"])
        pairs.queries.append(f"The {animal} {when}.")
        pairs.positives.append(f"The {animal} {toy.animals[animal]}.")
        pairs.negatives.append([f"The {other} {toy.animals[other]}." for other in others])
    return pairs


GROUPS = [["The dog.", "The dog barks.", "The cat."], ["The cat.", "The cat sleeps.", "The cow."],
          ["The cow.", "The cow eats.", None], ["The dog.", "The dog runs.", None]] * 4  # fmt: skip


@pytest.mark.parametrize("dimensions", ["", "8,16"])
def test_the_loss_is_that_of_its_formula_on_any_mesh(trained_run, model, dimensions):
    """Against NumPy on the vectors; the query's own text and all its positives are not wrong answers."""
    found = []
    for one in (with_finetune(model, matryoshka_dims=dimensions), restored(trained_run, 8, 1)):
        one = with_finetune(one, matryoshka_dims=dimensions)
        unique = sorted({text for group in GROUPS for text in group if text})
        texts = embeddings.tokenize(one, unique)
        ids_BG = np.array([[unique.index(t) if t else -1 for t in g] for g in GROUPS], np.int32)
        tokens_RL = embeddings.pad(one, [texts[i] for i in np.maximum(ids_BG, 0).ravel()])
        with jax.set_mesh(one.mesh):
            batch = shard_rows([tokens_RL.reshape(*ids_BG.shape, -1), ids_BG], one.mesh)
            loss = jax.jit(contrastive.make_loss(one))
            found.append(float(loss(one.params, *batch, jax.random.key(0))))
    encoder = embeddings.make_encoder(one)
    vectors_UD = np.stack(embeddings.run_batches(one, encoder, one.params, texts, quiet)).astype(np.float64)
    expected = []
    for width in one.config.finetune.sizes(32):
        cut = vectors_UD[:, :width] / np.linalg.norm(vectors_UD[:, :width], axis=1, keepdims=True)
        for query, positive, _ in ids_BG:
            own = cut[query] @ cut[positive] / 0.05
            right = {-1, query, positive} | {p for q, p, _ in ids_BG if q == query}
            wrong = [t for group in ids_BG for t in group[1:] if t not in right]
            expected.append(math.log(math.exp(own) + sum(math.exp(cut[query] @ cut[t] / 0.05) for t in wrong)) - own)
    assert found == pytest.approx([np.mean(expected)] * 2, rel=1e-4)


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_what_belongs_together_is_learned(model, toy, hard_negatives):
    model = with_finetune(model, hard_negatives=hard_negatives)
    train, dev = pairs_of(toy, 200, 1, negatives=hard_negatives), pairs_of(toy, 30, 2)
    benchmark = retrieval.Benchmark(
        {animal: f"The {animal} {does}." for animal, does in toy.animals.items()},
        {f"q-{animal}": f"The {animal} every morning." for animal in toy.animals},
        {f"q-{animal}": {animal: 1} for animal in toy.animals},
    )
    before, _ = retrieval.run(model, benchmark)
    after, params = retrieval.run(model, benchmark, train, dev)
    assert after["median"] == after["score"] >= before["score"]
    assert after["score"] > 0.9
    assert after["examples"] == {"test": 6, "train": 200, "dev": 30}
    assert before["examples"] == {"test": 6}
    assert after["dev_scores"]["0.003"] > 0.9
    assert set(params) == {"encoder"}
    again, _ = retrieval.run(model, benchmark, train, dev)
    assert again == after, "the same seed, the same result"


def test_search_numbers_by_their_definitions():
    """Against nDCG, recall and reciprocal rank computed here from the ranking, with ties and absent documents."""
    benchmark, vectors = search_of_integers(0)
    found = retrieval._search(benchmark, quiet, lambda texts: np.stack([vectors[t] for t in texts]))
    ndcg, recall, reciprocal = [], {10: [], 100: []}, []
    for query, grades in benchmark.relevance.items():
        order = sorted(sorted(benchmark.documents, reverse=True), key=lambda d: -vectors[d] @ vectors[query])
        order.remove(query)
        dcg = sum(max(grades.get(d, 0), 0) / math.log2(rank + 2) for rank, d in enumerate(order[:10]))
        best = sum(max(g, 0) / math.log2(r + 2) for r, g in enumerate(sorted(grades.values(), reverse=True)[:10]))
        ndcg.append(dcg / best)
        relevant = {d for d, g in grades.items() if g > 0}
        for k, values in recall.items():
            values.append(len(relevant & set(order[:k])) / len(relevant))
        reciprocal.append(max([1 / (r + 1) for r, d in enumerate(order[:10]) if d in relevant], default=0))
    assert found["each"] == pytest.approx(ndcg)
    assert found["score"] == pytest.approx(np.mean(ndcg))
    assert found["recall@10"] == pytest.approx(np.mean(recall[10]))
    assert found["recall@100"] == pytest.approx(np.mean(recall[100]))
    assert found["mrr@10"] == pytest.approx(np.mean(reciprocal))


def test_equal_vectors_find_what_the_order_of_ids_finds():
    documents = {f"d{i}": "same" for i in range(300)}
    benchmark = retrieval.Benchmark(documents, {"q": "same"}, {"q": {"d0": 1}})
    found = retrieval._search(benchmark, quiet, lambda texts: np.ones((len(texts), 1)))
    assert (found["score"], found["recall@100"]) == (0.0, 0.0)


def test_a_query_takes_no_place_among_the_hundred_results():
    documents = {f"d{i:03}": f"{100 - i}" for i in range(101)}
    benchmark = retrieval.Benchmark(documents, {"d000": "1"}, {"d000": {"d100": 1}})
    found = retrieval._search(benchmark, quiet, lambda texts: np.array([[float(text)] for text in texts]))
    assert found["recall@100"] == 1.0


def test_a_query_without_relevant_documents_finds_nothing():
    benchmark = retrieval.Benchmark({"d": "x"}, {"q": "x", "r": "x"}, {"q": {"d": 1}, "r": {"d": 0}})
    found = retrieval._search(benchmark, quiet, lambda texts: np.ones((len(texts), 1)))
    assert found["each"] == [1.0, 0.0]


def test_similarity(model):
    texts = ["The dog barks.", "The dog barks in the garden.", "The cat sleeps near the river."]
    part = Labelled([texts[0]] * 3, texts, ["5.0", "3.0", "1.0"])
    result, _ = retrieval.run(model, part)
    cosines = np.array(result["predictions"])
    assert cosines[0] == pytest.approx(1.0, abs=1e-5)
    assert (np.abs(cosines) <= 1.00001).all()
    assert result["score"] == pytest.approx(scipy.stats.spearmanr(cosines, [5, 3, 1])[0])


def test_a_probe_trains_no_vectors(model, toy):
    model, pairs = with_finetune(model, method="probe"), pairs_of(toy, 20, 1)
    benchmark = retrieval.Benchmark({"d": "The dog."}, {"q": "dog?"}, {"q": {"d": 1}})
    with pytest.raises(UserError, match="method is probe; only --task=classification takes it; use full"):
        retrieval.run(model, benchmark, pairs, pairs)


def test_texts_alone_are_told_apart_by_dropout_and_judged_by_the_loss(model, toy):
    whens = ("today", "at night", "every morning", "all day", "now", "then", "here", "there", "again", "in the garden")
    lines = [f"The {animal} {does} {when}." for animal, does in toy.animals.items() for when in whens]
    train = contrastive.Pairs(lines, lines, [[] for _ in lines])
    test = Labelled([lines[0]] * 3, lines[:3], ["5.0", "3.0", "1.0"])
    with pytest.raises(UserError, match="which need dropout as the only difference"):
        retrieval.run(model, test, train)
    dropout = dataclasses.replace(model.config.model, dropout_rate=0.1)
    dropped = model._replace(config=dataclasses.replace(model.config, model=dropout))
    dropped = dropped._replace(forward=build_forward(dropped.config, model.tokenizer.vocab_size, model.mesh))
    dropped = with_finetune(dropped, learning_rates="1e-9,1e-3", epochs=3)
    scores = retrieval.run(dropped, test, train)[0]["dev_scores"]
    assert scores["1e-09"] < scores["0.001"] < 0, "what was learned is seen, and by a loss"


def test_a_query_is_on_one_side_with_all_its_positives():
    queries = [f"q{i // 3}" for i in range(60)]
    train, dev = report.hold_out_queries(queries)
    assert sorted(train + dev) == list(range(60))
    assert len(dev) == 6
    assert not {queries[i] for i in train} & {queries[i] for i in dev}


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_vectors_that_are_all_the_same_rank_nothing(value):
    pairs = contrastive.Pairs(["a", "b", "c"], ["A", "B", "C"], [["X"], [], []])
    assert contrastive.ranks(lambda texts: np.full((len(texts), 4), value), pairs).tolist() == [4, 4, 4]


def test_normal_of_nothing():
    zeros = embeddings.normalize(np.zeros((1, 4), np.float32))
    assert (zeros == 0).all()
    assert np.isfinite(jax.grad(lambda x: embeddings.normalize(x).sum())(jnp.zeros((1, 4)))).all()


# Files


def beir(folder, documents: dict, queries: dict, qrels: str) -> str:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "About", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for split in ("train", "dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return str(folder)


def test_a_folder_of_beir(tmp_path):
    folder = beir(
        tmp_path / "b", {"d1": "a dog", "d2": "a cat"}, {"q1": "dog?", "q2": "cow?"}, "q1\td1\t2\nq2\td2\t0\n"
    )
    found = retrieval.read_benchmark(folder, "test")
    assert found.documents == {"d1": "About a dog", "d2": "About a cat"}
    assert found.relevance == {"q1": {"d1": 2}, "q2": {"d2": 0}}
    for split in ("train", "dev"):
        assert retrieval.read_pairs(folder, split) == contrastive.Pairs(["About dog?"], ["About a dog"], [[]])
    (tmp_path / "b" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    assert retrieval.read_pairs(folder, "dev").queries == ["About cow?"], "not what it is trained on"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", "query\tpositive\tnegative\na\tb\tc\nd\te\tf\n", (["a", "d"], ["b", "e"], [["c"], ["f"]])),
        ("a.jsonl", '{"anchor": "a", "positive": "b", "negatives": ["c", "d"]}\n{"anchor": "e", "positive": "f"}',
         (["a", "e"], ["b", "f"], [["c", "d"], []])),
        ("a.csv", "query,positive,negative_1,negative_2,label\na,b,c,d,1\ne,f,g,,1\n",
         (["a", "e"], ["b", "f"], [["c", "d"], ["g"]])),
        ("a.txt", "one\n\ntwo\n", (["one", "two"], ["one", "two"], [[], []])),
    ],
)  # fmt: skip
def test_files_of_pairs(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert retrieval.read_pairs(str(tmp_path / name), "train") == contrastive.Pairs(*expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "positive\tx\na\tb\n",
            "a.tsv:2 has columns positive, x; expected texts in columns query",
        ),
        ("a.tsv", "query\tother\na\tb\nc\td\n", "a.tsv:2 has columns query, other; expected texts"),
        (
            "a.tsv",
            "sentence1\tsentence2\tscore\na\tb\t0\n",
            "has columns sentence2 and score, so that some pairs may not",
        ),
        ("a.jsonl", '{"question": "a", "answer": "b", "label": 0}', "has columns answer and label, so that some pairs"),
        (
            "a.csv",
            "premise,hypothesis,gold_label\na,b,neutral\n",
            "has columns hypothesis and gold_label, so that some",
        ),
        ("a.csv", "query,document,relevance\na,b,0\n", "has columns document and relevance, so that some pairs may"),
        ("a.jsonl", '{"query": "a", "positive": "b", "negative": ["c", null]}', "positive, and in negative if any"),
        ("a.tsv", "query\tpositive\na\tb\n", "a.tsv has 1 pairs; expected at least 2"),
        ("a.jsonl", '{"query": "a", "negatives": [1]}\n', "a.jsonl:1 has columns query, negatives; expected texts"),
        ("a.txt", "", "has no examples"),
    ],
)
def test_files_of_pairs_that_will_not_do(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        retrieval.read_pairs(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("", "has no relevant documents"),
        ("q1\td1\t0\n", "has no relevant documents"),
        ("q1\td9\t1\n", "has no relevant documents"),
        ("q9\td1\t1\n", "has no relevant documents .* expected their ids, not 'q9' and 'd1'"),
        ("q1\td1\tyes\n", "test.tsv:2: the grade is 'yes'; expected a whole number such as 0 or 1"),
        ("q1\td1\t0.5\n", "test.tsv:2: the grade is '0.5'"),
        ("q1\td1\tnan\n", "test.tsv:2: the grade is 'nan'"),
        ("q1\td1\tinf\n", "test.tsv:2: the grade is 'inf'"),
        ("q1\td1\t\n", "test.tsv:2: the grade is ''"),
        ("q1\td1\n", "test.tsv:2 has 2 columns; expected a query, a document and a grade"),
        ("q1\td1\t1\nq1\td1\t2\n", "test.tsv:3 grades 'd1' for 'q1' again, otherwise; keep one of the two"),
    ],
)
def test_folders_that_will_not_do(tmp_path, qrels, message):
    folder = beir(tmp_path / "b", {"d1": "a dog"}, {"q1": "dog?"}, qrels)
    with pytest.raises(UserError, match=message):
        retrieval.read_benchmark(folder, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d1", "text": "b"}', "_id is 'd1', as in an earlier line; expected ids that differ"),
        ('{"_id": null, "text": "b"}', "_id is null; expected text or a number"),
        ('{"text": "b"}', "_id is null; expected text or a number"),
        ('{"_id": true, "text": "b"}', "_id is true; expected text or a number"),
        ('{"_id": "d2", "text": null}', "text is null; expected text or a number"),
        ('{"_id": "d2", "title": ["a"], "text": "b"}', r'title is \["a"\]; expected text or a number'),
        ('{"_id": "d2", "title": NaN, "text": "b"}', "title is NaN; expected text or a number"),
        ('{"_id": Infinity, "text": "b"}', "_id is Infinity; expected text or a number"),
    ],
)
@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_documents_and_queries_that_will_not_do(tmp_path, name, line, message):
    folder = beir(tmp_path / "b", {"d1": "a dog"}, {"d1": "dog?"}, "d1\td1\t1\n")
    with (tmp_path / "b" / f"{name}.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=rf"{name}\.jsonl:2: {message}"):
        retrieval.read_benchmark(folder, "test")


def test_ids_titles_and_texts_may_be_numbers(tmp_path):
    folder = beir(tmp_path / "b", {}, {}, "1\t7\t1\n")
    (tmp_path / "b" / "corpus.jsonl").write_text('{"_id": 7, "title": 1984, "text": "Orwell"}\n{"_id": 8, "text": 9.5}')
    (tmp_path / "b" / "queries.jsonl").write_text('{"_id": 1, "title": null, "text": 2020}')
    expected = retrieval.Benchmark({"7": "1984 Orwell", "8": "9.5"}, {"1": "2020"}, {"1": {"7": 1}})
    assert retrieval.read_benchmark(folder, "test") == expected


@pytest.mark.parametrize(
    "qrels",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n",
        "query-id\tcorpus-id\tscore\r\nq1\td1\t1.0\r\nq1\td2\t0.0\r\n\r\n",
        "q1\td1\t1\nq1\td2\t0\n",
        "q1\t0\td1\t1\nq1\t0\td2\t0\n",
        "q1 0 d1 1\nq1 Q0  d2 0",
        "query\tdocument\trelevance_0_to_3\nq1\td1\t1\nq1\td2\t0\n",
        "q1\td1\t1\nq1\td1\t1\nq1\td2\t0\n",
    ],
    ids=["beir", "floats", "no header", "trec with tabs", "trec", "other header", "twice"],
)
@pytest.mark.parametrize("file", ["test.tsv", "test.txt", "dev.tsv"])
def test_ways_to_write_judgements(tmp_path, qrels, file):
    folder = beir(tmp_path / "b", {"d1": "a dog", "d2": "a cat"}, {"q1": "dog?"}, "")
    for split in ("test", "dev"):
        (tmp_path / "b" / "qrels" / f"{split}.tsv").unlink()
    (tmp_path / "b" / "qrels" / file).write_bytes(qrels.encode())
    assert retrieval.read_benchmark(folder, "test", "dev").relevance == {"q1": {"d1": 1, "d2": 0}}


@pytest.mark.parametrize(
    ("qrels", "note"),
    [
        (
            "q1\td9\t1\n",
            "relevant documents that corpus.jsonl lacks in {qrels}: 1, the first is 'd9'; they count as not found",
        ),
        ("q9\td1\t1\n", "queries that queries.jsonl lacks in {qrels}: 1, the first is 'q9'; they are left out"),
        (
            "s\ts\t1\n",
            "queries as relevant to themselves in {qrels}: 1, the first is 's'; as in BEIR, none is its own result",
        ),
    ],
)
def test_what_the_folder_lacks_is_said(tmp_path, capsys, qrels, note):
    folder = beir(tmp_path / "b", {"d1": "a dog", "s": "a cat"}, {"q1": "dog?", "s": "a cat"}, f"q1\td1\t1\n{qrels}")
    retrieval.read_benchmark(folder, "test")
    assert capsys.readouterr().err == f"note: {note.format(qrels=f'{folder}/qrels/test.tsv')}\n"


def test_documents_that_the_folder_lacks_are_not_trained_on(tmp_path):
    folder = beir(tmp_path / "b", {"d1": "a dog"}, {"q1": "dog?"}, "q1\td1\t1\nq1\td9\t1\nq9\td1\t1\n")
    assert retrieval.read_pairs(folder, "train").positives == ["About a dog"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\r\n\r\n\x0ctwo\u2028\x85three\n \n\n", ["one", "", "\x0ctwo\u2028\x85three", " ", ""]),
        ("a.txt", "\none", ["", "one"]),
        ("a.txt", "\n", [""]),
        ("a.csv", 'text\none\n\n""\ntwo\u2028three\n\n', ["one", None, "", "two\u2028three", None]),
        ("a.tsv", "text\tn\none\t1\n\n\t2\n", ["one", None, ""]),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "\u2028"}\n', ["one", None, "\u2028"]),
    ],
)
def test_blank_lines_are_kept_where_lines_are_counted(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content.encode())
    found = tables.records(str(tmp_path / name), blank_lines=True)
    assert [record.get("text") for _, record in found] == texts


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_file_of_no_lines_has_no_examples(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="has no examples"):
        tables.records(str(tmp_path / name), blank_lines=True)


# The commands


def test_fine_tuned_kept_embedded_and_searched(toy, trained_run, tmp_path):
    lines = [json.dumps({"query": q, "positive": p}) for q, p, _ in zip(*pairs_of(toy, 100, 1), strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    qrels = "".join(f"{animal}\t{animal}\t1\n" for animal in toy.animals)
    documents = {animal: f"The {animal} {does}." for animal, does in toy.animals.items()}
    folder = beir(tmp_path / "b", documents, {a: f"The {a} at night." for a in toy.animals}, qrels)
    settings = [f"--config.finetune.{k}={v}" for k, v in SOON.items()]
    line = [f"--checkpoint={trained_run}", "--task=retrieval", f"--test={folder}", f"--json={tmp_path / 'r.json'}"]
    done = toy.run("evaluate", *line, *settings, f"--train={tmp_path / 'pairs.jsonl'}", f"--save={tmp_path / 'kept'}")
    assert done.returncode == 0, done
    assert "ndcg@10" in done.stdout, done
    tuned = json.loads((tmp_path / "r.json").read_text())

    line[0] = f"--checkpoint={tmp_path / 'kept'}"
    done = toy.run("evaluate", *line)
    assert done.returncode == 0, done
    assert json.loads((tmp_path / "r.json").read_text())["score"] == pytest.approx(tuned["score"], abs=1e-6)

    (tmp_path / "texts.txt").write_text("\n".join(documents.values()))
    line = [f"--checkpoint={tmp_path / 'kept'}", f"--input={tmp_path / 'texts.txt'}"]
    done = toy.run("embed", *line, f"--output={tmp_path / 'v.npy'}")
    assert done.returncode == 0, done
    assert "6 vectors of 32" in done.stdout, done
    vectors_ND = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1.0, atol=1e-5)
    kept = load_model(str(tmp_path / "kept"), build(read_config(str(tmp_path / "kept"))))
    kept = with_finetune(kept, batch_size=16)
    expected = embeddings.embed(kept, list(documents.values()))
    np.testing.assert_allclose(vectors_ND, expected, atol=1e-5)

    done = toy.run("embed", *line, f"--output={tmp_path / 'v.parquet'}", "--dimensions=8")
    table = pq.read_table(tmp_path / "v.parquet")
    assert done.returncode == 0
    assert table.column("text").to_pylist() == list(documents.values())
    cut = embeddings.normalize(vectors_ND[:, :8])
    np.testing.assert_allclose(np.stack(table.column("vector").to_pylist()), cut, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("v")) == ["v.npy", "v.parquet"]


def test_numpy_files_have_a_vector_a_line_and_are_written_without_pyarrow(trained_run, tmp_path):
    (tmp_path / "t.txt").write_text("The dog.\n\n\x0c\n")
    script = "import sys; sys.modules['pyarrow'] = None\nfrom flax_mlm import embed\nfrom flax_mlm.cli import app\n"
    script += "app.run(embed.main, from_checkpoint=True)"
    options = [f"--checkpoint={trained_run}", f"--input={tmp_path / 't.txt'}", f"--output={tmp_path / 'v.npy'}"]
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "3 vectors of 32" in done.stdout, done


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("embed", [], "--output is ''; expected a name that ends in .npy or .parquet"),
        ("embed", ["--output=v.npy"], "--input is missing"),
        ("embed", ["--output=v.npy", "--input=none.txt"], "none.txt cannot be read"),
        ("embed", ["--output=v.npy", "--input=t.jsonl"], "t.jsonl:1 has no column text; it has words"),
        ("embed", ["--output=v.npy", "--input=null.jsonl"], "null.jsonl:2: text is null; expected text"),
        ("embed", ["--output=v.npy", "--input=t.jsonl", "--dimensions=33"], "--dimensions is 33; the vectors of this"),
        ("embed", ["--output=no/v.npy", "--input=none.txt"], "--output: 'no/v.npy' cannot be written"),
        ("embed", ["--output=v.parquet", "--input=mixed.jsonl"], "'mixed.jsonl' has columns that Parquet cannot store"),
        ("embed", ["--output=v.parquet", "--input=large.jsonl"], "'large.jsonl' has columns that Parquet cannot store"),
        ("embed", ["--output=v.parquet", "--input=vector.jsonl"], "'vector.jsonl' has a column vector"),
        ("evaluate", ["--task=retrieval"], "--test is missing"),
        (
            "evaluate",
            ["--task=retrieval", "--test=t.txt", "--save=new"],
            "--train is missing; expected data to fine-tune on",
        ),
        ("evaluate", ["--task=retrieval", "--test=t.txt", "--save=.", "--train=t.txt"], "--save is '.', which exists"),
        (
            "evaluate",
            ["--task=retrieval", "--test=t.txt", "--save=t.txt/new", "--train=t.txt"],
            "--save: 't.txt/new' cannot be written: Not a directory",
        ),
        ("evaluate", ["--config.finetune.matryoshka_dims=64"], "expected numbers below model.hidden_size, 32"),
    ],
)
def test_what_the_commands_refuse(toy, trained_run, tmp_path, command, flags, message):
    (tmp_path / "t.jsonl").write_text('{"words": "a"}')
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}')
    (tmp_path / "t.txt").write_text("The dog.\n")
    (tmp_path / "mixed.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": "one"}')
    (tmp_path / "large.jsonl").write_text('{"text": "a", "x": 100000000000000000000}')
    (tmp_path / "vector.jsonl").write_text('{"text": "a", "vector": 1}')
    given = {p.name for p in tmp_path.iterdir()}
    done = toy.run(command, f"--checkpoint={trained_run}", *flags, cwd=tmp_path)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert message in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == given
