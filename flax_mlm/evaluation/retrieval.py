"""Vectors for search, from the encoder as it is or after contrastive fine-tuning.

The test set is pairs of sentences with similarity scores (STS: Spearman's correlation with the cosine), or a folder in
BEIR's format (arXiv:2104.08663): corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. Numbers are those of BEIR's evaluator,
trec_eval: a query is no result of its own search, and documents that are judged but absent count as not found.
"""

import contextlib
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels as task_labels
from flax_mlm.evaluation import metrics, report
from flax_mlm.finetuning import contrastive, loop, saving
from flax_mlm.inference import embeddings
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params
from flax_mlm.storage import files

_QUERY = ("query", "anchor", "question", "sentence1", "premise", "sentence", "text")
_NAMED = ("positive", "pos")  # other columns are so unless a label says that some pairs do not belong together
_POSITIVE = (*_NAMED, "answer", "document", "passage", "context")
_SECOND = ("sentence2", "hypothesis")
_NEGATIVE = re.compile(r"neg(atives?)?(_\d+)?")
_LABEL = re.compile(r".*(label|score|similar|relevan|duplicate|grade).*", re.IGNORECASE)
_TOP_K = 100  # documents retrieved for each query

Embed = Callable[[list[str]], np.ndarray]  # texts -> vectors of length 1 (N, D)


class Benchmark(NamedTuple):
    """A collection of documents, queries, and relevance judgements."""

    documents: dict[str, str]  # id -> title and text
    queries: dict[str, str]  # id -> text
    relevance: dict[str, dict[str, int]]  # query id -> document id -> grade; above 0 is relevant


def read_pairs(source: str, split: str) -> contrastive.Pairs:
    """Reads training pairs.

    Args:
      source: a table or .jsonl with columns such as `query`, `positive`, `negative` (in .jsonl also a list; also
        `negative_1`, `negative_2` ...); a file with one text a line; or a BEIR folder.
      split: NAME of the folder's qrels/NAME.tsv.

    Raises:
      UserError: it cannot be read or has fewer than two pairs; a line lacks a column, or has a label, which may mean
        that its texts do not belong together.
    """
    if Path(source).expanduser().is_dir():
        benchmark = read_benchmark(source, split)
        relevant = [(q, d) for q, d in _relevant(benchmark.relevance) if d in benchmark.documents]
        queries, positives = [benchmark.queries[q] for q, _ in relevant], [benchmark.documents[d] for _, d in relevant]
        return contrastive.Pairs(queries, positives, [[] for _ in relevant])
    pairs = contrastive.Pairs([], [], [])
    for location, record in tables.records(source):
        query, positive = (_first(record, *names) for names in (_QUERY, _POSITIVE + _SECOND))
        column = next((name for name in _POSITIVE + _SECOND if record.get(name)), "")
        if column not in ("", *_NAMED) and (label := next(filter(_LABEL.fullmatch, record), "")):
            what = f"{location} has columns {column} and {label}, so that some pairs may not belong together"
            raise UserError(f"{what}; keep those that do, in columns query and positive")
        positive = query if len(record) == 1 else positive
        found = [value for name, value in record.items() if value and _NEGATIVE.fullmatch(name)]
        negatives = [text for value in found for text in (value if isinstance(value, list) else [value])]
        if not all(isinstance(text, str) and text.strip() for text in (query, positive, *negatives)):
            what = f"{location} has columns {', '.join(map(str, record))}"
            raise UserError(f"{what}; expected texts in columns query and positive, and in negative if any")
        pairs.queries.append(str(query))
        pairs.positives.append(str(positive))
        pairs.negatives.append(negatives)
    if len(pairs.queries) < 2:
        raise UserError(f"{source} has {len(pairs.queries)} pairs; expected at least 2")
    return pairs


def _first(record: dict[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name)), None)


def read_benchmark(folder: str, *splits: str) -> Benchmark:
    """Reads a BEIR folder, by the rules of BEIR's own evaluator.

    Args:
      splits: NAMEs of qrels/NAME.tsv or .txt, of which the first that exists is read. Its lines are those of BEIR
        (query, document, grade) or of TREC (query, iteration, document, grade), with or without a header.

    Raises:
      UserError: a file is missing, or a line is invalid; the message names it.
    """
    path = Path(folder).expanduser()
    documents, queries = _texts(path / "corpus.jsonl"), _texts(path / "queries.jsonl")
    candidates = [path / "qrels" / f"{split}{suffix}" for split in splits for suffix in (".tsv", ".txt")]
    qrels = next(filter(Path.exists, candidates), candidates[0])
    notes = [] if qrels.stem == splits[0] else [f"{candidates[0]} does not exist; {qrels} is used"]
    relevance: dict[str, dict[str, int]] = {}
    for number, line in enumerate(files.read_text(qrels).split("\n"), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and fields[0] not in queries and not re.match(r"[-+.]*\d", fields[-1])):
            continue  # a blank line, or the header
        if len(fields) not in (3, 4):
            raise UserError(f"{qrels}:{number} has {len(fields)} columns; expected a query, a document and a grade")
        query, document, grade = fields[0], fields[-2], _grade(f"{qrels}:{number}", fields[-1])
        if relevance.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UserError(f"{qrels}:{number} grades '{document}' for '{query}' again, otherwise; keep one of the two")
    unknown = [query for query in relevance if query not in queries]
    known = {query: grades for query, grades in relevance.items() if query in queries}
    relevant = _relevant(known)
    absent = [name for _, name in relevant if name not in documents]
    if len(relevant) == len(absent):
        seen = next((f", not '{query}' and '{name}'" for query, name in _relevant(relevance)), "")
        what = f"{qrels} has no relevant documents for queries.jsonl in corpus.jsonl"
        raise UserError(f"{what}; expected their ids{seen}")
    for names, kind, what in (
        (unknown, "queries that queries.jsonl lacks", "they are left out"),
        (absent, "relevant documents that corpus.jsonl lacks", "they count as not found"),
        (
            [query for query, name in relevant if query == name],
            "queries as relevant to themselves",
            "as in BEIR, none is its own result",
        ),
    ):
        notes += [f"{kind} in {qrels}: {len(names)}, the first is '{names[0]}'; {what}"] if names else []
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return Benchmark(documents, queries, known)


def _relevant(relevance: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """Lists the queries with each document that is relevant to them."""
    return [(query, name) for query, grades in relevance.items() for name, grade in grades.items() if grade > 0]


def _texts(file: Path) -> dict[str, str]:
    """Reads id -> title and text of every line. Raises UserError: one is no text or number, or an id comes twice."""
    text_of: dict[str, str] = {}
    for location, record in tables.records(str(file)):
        values = [record.get("_id"), "" if record.get("title") is None else record["title"], record.get("text")]
        for key, value in zip(("_id", "title", "text"), values, strict=True):
            if type(value) not in (str, int, float) or value in (math.inf, -math.inf) or value != value:
                raise UserError(f"{location}: {key} is {json.dumps(value)[:60]}; expected text or a number")
        name, title, text = map(str, values)
        if name in text_of:
            raise UserError(f"{location}: _id is '{name}', as in an earlier line; expected ids that differ")
        text_of[name] = " ".join(filter(str.strip, (title, text)))
    return text_of


def _grade(location: str, text: str) -> int:
    with contextlib.suppress(ValueError, OverflowError):
        if (number := float(text)) == (grade := int(number)):
            return grade
    raise UserError(f"{location}: the grade is '{text.strip()}'; expected a whole number such as 0 or 1")


def run(
    model: LoadedModel,
    test: Benchmark | tables.Labelled,
    train: contrastive.Pairs | None = None,
    dev: contrastive.Pairs | None = None,
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
) -> tuple[dict[str, Any], Params]:
    """Evaluates the encoder's vectors, after fine-tuning on `train` where it is given.

    Args:
      test: a benchmark, or pairs of sentences with scores.
      dev: chooses learning rate and epoch; None: a tenth of `train`.
      log: receives one line a learning rate.
      on_batch: called before every batch.

    Raises:
      UserError: `test` has no pairs or no scores, `train` too few pairs, or `finetune.method` is probe.

    Returns:
      the result, as of `classification.run`, and the parameters of the seed that is best on the development set, whose
      numbers are in `saved`. The metric is spearman (predictions
      are cosines), or for a benchmark ndcg@10 with recall@10, recall@100, mrr@10, and `each`, the metric of each of
      `queries`.
    """
    measure = _similarity(test) if isinstance(test, tables.Labelled) else functools.partial(_search, test, on_batch)
    encoder = embeddings.make_encoder(model)

    def evaluated(params: Params) -> dict[str, Any]:
        return measure(lambda texts: embeddings.embed(model, texts, encoder, params, on_batch))

    if train is not None:
        if dev is None:
            train, dev = (tables.take(train, i) for i in report.hold_out_queries(train.queries))
        if any(train.negatives) and not model.config.finetune.hard_negatives:
            log("note: the negatives of --train are not used; set finetune.hard_negatives to use them")
        problem = contrastive.make_problem(model, train, dev, encoder, on_batch)
        searched = loop.search(model, problem, evaluated, log, on_batch)
    else:
        searched = loop.SearchResult("", {}, [evaluated(model.params)], [0.0], model.params)
    scores = [result["score"] for result in searched.outcomes]
    examples = {"test": len(test.texts if isinstance(test, tables.Labelled) else test.relevance)}
    if train and dev:
        examples |= {"train": len(train.queries), "dev": len(dev.queries)}
    median = searched.outcomes[report.median_run(scores)]
    result = {**median, **report.summary(scores, searched, examples, False)}
    return result | ({"saved": report.saved(searched, scores)} if train else {}), searched.params


def _similarity(test: tables.Labelled) -> Callable[[Embed], dict[str, Any]]:
    """Builds a function that measures vectors by pairs with scores. Raises UserError: single texts, or no scores."""
    if (pairs := test.pairs) is None:
        raise UserError("--test has one text a line; expected two and a score; see --text, --pair and --label")
    labels = task_labels.to_numbers(test, "test")

    def measure(embed: Embed) -> dict[str, Any]:
        cosines = (embed(test.texts) * embed(pairs)).sum(1)
        return {
            "metric": "spearman",
            "score": metrics.evaluate("spearman", labels, cosines),
            "stderr": metrics.stderr("spearman", labels, cosines),
            "pearson": metrics.evaluate("pearson", labels, cosines),
            "predictions": cosines.tolist(),
            "labels": labels.tolist(),
        }

    return measure


def _search(test: Benchmark, on_batch: OnBatch, embed: Embed) -> dict[str, Any]:
    names = sorted(test.documents, reverse=True)  # trec_eval puts the last name first where scores are equal
    documents_ND = embed([test.documents[name] for name in names])
    queries_MD = embed([test.queries[query] for query in test.relevance])
    each: dict[str, list[float]] = {"ndcg@10": [], "recall@10": [], "recall@100": [], "mrr@10": []}
    for (query, grades), top in zip(test.relevance.items(), _retrieve(queries_MD, documents_ND), strict=True):
        on_batch()
        retrieved = [names[i] for i in top if names[i] != query][:_TOP_K]  # in some sets queries are documents
        relevant = {name for name, grade in grades.items() if grade > 0}
        ideal = _dcg(sorted(grades.values(), reverse=True))
        each["ndcg@10"].append(_dcg([grades.get(name, 0) for name in retrieved]) / ideal if relevant else 0.0)
        for k in (10, 100):
            each[f"recall@{k}"].append(len(relevant.intersection(retrieved[:k])) / max(len(relevant), 1))
        ranks = (rank for rank, name in enumerate(retrieved[:10], 1) if name in relevant)
        each["mrr@10"].append(1 / next(ranks, float("inf")))
    means, ndcg = {name: statistics.fmean(values) for name, values in each.items()}, each["ndcg@10"]
    result = {"metric": "ndcg@10", "score": means.pop("ndcg@10"), "stderr": float(np.std(ndcg) / len(ndcg) ** 0.5)}
    return {**result, **means, "each": ndcg, "queries": list(test.relevance)}


def _dcg(grades: list[int]) -> float:
    """Discounted cumulative gain of the first 10 grades; scikit-learn's knows no documents that cannot be retrieved."""
    return sum(max(grade, 0) / math.log2(rank + 1) for rank, grade in enumerate(grades[:10], 1))


def _retrieve(queries_MD: np.ndarray, documents_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Yields for each query the indices of the documents with the highest scores, best first, by index where equal."""
    k = min(_TOP_K + 1, len(documents_ND))  # one of them may be the query itself
    for begin in range(0, len(queries_MD), 64):
        for scores_N in queries_MD[begin : begin + 64] @ documents_ND.T:
            top = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
            yield top[np.argsort(-scores_N[top], kind="stable")][:k]


def evaluate(
    model: LoadedModel, on_batch: OnBatch, train: str, dev: str, test: str, save: str, **columns: str
) -> dict[str, Any]:
    """Runs the task on files (see `read_pairs`, `read_benchmark`).

    Args:
      save: a new folder for the fine-tuned encoder; empty: it is not kept.
      columns: see `tables.read`.
    """
    report.require("test", test, "a BEIR folder, or a file of pairs of sentences with scores")
    folder = saving.new_folder(save, train)
    sources = (train, "train"), (dev, "dev")
    pairs, dev_pairs = (read_pairs(source, name) if source else None for source, name in sources)
    examples = read_benchmark(test, "test", "dev") if Path(test).expanduser().is_dir() else tables.read(test, **columns)
    result, params = run(model, examples, pairs, dev_pairs, print, on_batch)
    if folder:
        saving.save_model(folder, model, params, result["examples"]["train"])
    else:
        result.pop("saved", None)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    others = [name for name in ("pearson", "recall@10", "recall@100", "mrr@10") if name in result]
    return [*report.table(result), *(f"{name}  {result[name]:.4f}" for name in others)]
