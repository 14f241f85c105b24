"""Vectors for search: as the encoder gives them, or after contrastive fine-tuning.

Measured on pairs of sentences with scores of how alike they are (STS: Spearman's correlation with the cosine), or on a
folder in BEIR's format (arXiv:2104.08663): corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data import tables as labelled
from flax_mlm.errors import UserError
from flax_mlm.evaluation import classification, report
from flax_mlm.finetuning import contrastive
from flax_mlm.finetuning import loop as finetune
from flax_mlm.finetuning.contrastive import Pairs
from flax_mlm.finetuning.loop import Log, Params, Poll
from flax_mlm.inference.load import LoadedModel

_QUERY = ("query", "anchor", "question", "sentence1", "premise", "sentence", "text")
_POSITIVE = ("positive", "pos", "answer", "document", "passage", "context")
_SECOND = ("sentence2", "hypothesis")  # of pairs of which some may not belong together
_NEGATIVE = ("negative", "negatives", "neg")
_KEPT = 100  # documents found for each query


class Benchmark(NamedTuple):
    """A collection of documents, queries, and which documents answer which query."""

    documents: dict[str, str]  # id -> title and text
    queries: dict[str, str]
    relevance: dict[str, dict[str, int]]  # query -> document -> grade; above 0 is relevant


def read_pairs(source: str, split: str) -> Pairs:
    """Pairs to learn from: a table or .jsonl with columns such as `query`, `positive`, `negative` (in .jsonl also a
    list); lines of one text each; or a BEIR folder, of which qrels/SPLIT.tsv is used.

    Raises:
      UserError: it cannot be read, holds nothing, or a line lacks a column; or it has labels, so that some pairs may be
        of texts that do not belong together.
    """
    if Path(source).expanduser().is_dir():
        benchmark = read_benchmark(source, split)
        relevant = [(q, d) for q, grades in benchmark.relevance.items() for d, grade in grades.items() if grade > 0]
        queries, positives = [benchmark.queries[q] for q, _ in relevant], [benchmark.documents[d] for _, d in relevant]
        return Pairs(queries, positives, [[] for _ in relevant])
    pairs = Pairs([], [], [])
    for where, record in labelled.records(source):
        query = next((record[name] for name in _QUERY if record.get(name)), None)
        second = next((name for name in _SECOND if record.get(name)), "")
        if second and (label := next((name for name in labelled.LABEL if name in record), "")):
            raise UserError(
                f"{where} has {second} and {label}: which pairs belong together? Keep those, as query and positive"
            )
        alone = query if len(record) == 1 else None  # it is its own positive
        positive = next((record[name] for name in (*_POSITIVE, *_SECOND) if record.get(name)), alone)
        negatives: Any = next((record[name] for name in _NEGATIVE if record.get(name)), [])
        negatives = negatives if isinstance(negatives, list) else [negatives]
        if not all(isinstance(text, str) and text.strip() for text in (query, positive, *negatives)):
            has = ", ".join(map(str, record))
            raise UserError(f"{where} has no text for query or positive; it takes these columns, and has {has}")
        pairs.queries.append(str(query))
        pairs.positives.append(str(positive))
        pairs.negatives.append(negatives)
    if len(pairs.queries) < 2:
        raise UserError(f"{source} holds {len(pairs.queries)} pairs; it takes two at least")
    return pairs


def read_benchmark(folder: str, split: str) -> Benchmark:
    """Reads a BEIR folder.

    Raises:
      UserError: a file is missing, or a line is none; the message names it.
    """
    path = Path(folder).expanduser()

    def texts(name: str) -> dict[str, str]:
        found = {}
        for where, record in labelled.records(str(path / name)):
            if not isinstance(record.get("_id"), str) or not isinstance(record.get("text"), str):
                raise UserError(f"{where} has no _id and text")
            found[record["_id"]] = " ".join(filter(str.strip, (record.get("title") or "", record["text"])))
        return found

    documents, queries = texts("corpus.jsonl"), texts("queries.jsonl")
    relevance: dict[str, dict[str, int]] = {}
    for where, record in labelled.records(str(path / "qrels" / f"{split}.tsv")):
        query, document, grade = (str(record.get(name)) for name in ("query-id", "corpus-id", "score"))
        if query not in queries or document not in documents or not grade.lstrip("-").isdigit():
            raise UserError(f"{where} is not a query-id, corpus-id and score of this folder")
        relevance.setdefault(query, {})[document] = int(grade)
    relevance = {query: grades for query, grades in relevance.items() if max(grades.values()) > 0}
    if not relevance:
        raise UserError(f"{path / 'qrels' / f'{split}.tsv'} holds no relevant documents")
    return Benchmark(documents, queries, relevance)


def run(
    trained: LoadedModel,
    train: Pairs | None,
    dev: Pairs | None,
    test: Benchmark | labelled.Labelled,
    log: Log,
    poll: Poll,
) -> tuple[dict[str, Any], Params]:
    """Evaluates the encoder's vectors, after fine-tuning on `train` where it is given.

    Args:
      dev: pairs to choose learning rate and epoch by; None: a tenth of `train`.
      test: a benchmark, or pairs of sentences with scores.

    Raises:
      UserError: `test` has no pairs or no scores, `train` too few pairs, or `finetune.method` is probe.

    Returns:
      As `classification.run`, with ndcg@10 or spearman as the metric; for a benchmark with recall@10, recall@100 and
      mrr@10 too, and `each`, the metric of each of `queries`; for sentences with predictions (cosines) and labels.
      And the parameters of the median run.
    """
    if isinstance(test, labelled.Labelled):
        _check_scored(test)
    function = finetune.make_vectors(trained)
    if train is None:
        found = finetune.Searched("", {}, [trained.params])
    else:
        if dev is None:
            train, dev = map(train.take, _parts(train.queries))
        if any(train.negatives) and not trained.config.finetune.hard_negatives:
            log("--train has negatives, which finetune.hard_negatives = 0 leaves out")
        fit = contrastive.make_fit(trained, train, dev, function, poll)

        def once(rate: float, seed: int) -> tuple[float, Params]:
            best = fit(rate, seed)
            return best.score, best.params

        found = finetune.search(trained.config.finetune, once, log)

    def evaluated(params: Params) -> dict[str, Any]:
        def embed(texts: list[str]) -> np.ndarray:
            return contrastive.vectors_of(trained, function, params, texts, poll)

        return _similarity(embed, test) if isinstance(test, labelled.Labelled) else _search(embed, test, poll)

    results = [evaluated(params) for params in found.outcomes]
    scores = [result["score"] for result in results]
    middle = report.median_run(scores)
    examples = {"test": len(test.texts if isinstance(test, labelled.Labelled) else test.relevance)}
    if train and dev:
        examples |= {"train": len(train.queries), "dev": len(dev.queries)}
    return {**results[middle], **report.summary(scores, found, examples)}, found.outcomes[middle]


def _parts(queries: list[str]) -> tuple[list[int], list[int]]:
    """`report.tenth` of queries, each with all its positives on one side."""
    unique = list(dict.fromkeys(queries))
    held_out = {unique[i] for i in report.tenth(len(unique))[1]}
    train, dev = ([i for i, query in enumerate(queries) if (query in held_out) == side] for side in (False, True))
    return train, dev


def _check_scored(test: labelled.Labelled) -> np.ndarray:
    """The scores of pairs of texts. Raises UserError: they are no pairs, or have none."""
    if test.pairs is None:
        raise UserError("--test has one text a line; it takes two and a score, see --text, --pair and --label")
    return classification.numbers(test, "test")


def _similarity(embed: Any, test: labelled.Labelled) -> dict[str, Any]:
    gold = _check_scored(test)
    cosines = (embed(test.texts) * embed(test.pairs)).sum(1)
    score = classification.evaluate("spearman", gold, cosines)
    return {
        "metric": "spearman",
        "score": score,
        "stderr": classification.stderr("spearman", gold, cosines),
        "pearson": classification.evaluate("pearson", gold, cosines),
        "predictions": cosines.tolist(),
        "labels": gold.tolist(),
    }


def _search(embed: Any, test: Benchmark, poll: Poll) -> dict[str, Any]:
    import sklearn.metrics

    names = list(test.documents)
    number = {name: i for i, name in enumerate(names)}
    documents_ND = embed([test.documents[name] for name in names])
    queries_MD = embed([test.queries[query] for query in test.relevance])
    ndcg, recall_10, recall_100, reciprocal = [], [], [], []
    for grades, (best, scores_N) in zip(test.relevance.values(), _best(queries_MD, documents_ND), strict=True):
        poll()
        relevant = {name for name, grade in grades.items() if grade > 0}
        found = [names[i] for i in best]
        # Of all documents only those count that are found or have a grade: the others neither gain nor are ideal.
        counted = [*best, *({number[name] for name in grades} - set(best))]
        gains = [[max(grades.get(names[i], 0), 0) for i in counted] + [0]]  # it takes two at least
        scores = [[scores_N[i] for i in counted] + [-2.0]]
        ndcg.append(float(sklearn.metrics.ndcg_score(gains, scores, k=10, ignore_ties=True)))
        recall_10.append(len(relevant & set(found[:10])) / len(relevant))
        recall_100.append(len(relevant & set(found)) / len(relevant))
        reciprocal.append(next((1 / rank for rank, name in enumerate(found[:10], 1) if name in relevant), 0.0))
    return {
        "metric": "ndcg@10",
        "score": statistics.fmean(ndcg),
        "stderr": float(np.std(ndcg) / len(ndcg) ** 0.5),
        "recall@10": statistics.fmean(recall_10),
        "recall@100": statistics.fmean(recall_100),
        "mrr@10": statistics.fmean(reciprocal),
        "each": ndcg,
        "queries": list(test.relevance),
    }


def _best(queries_MD: np.ndarray, documents_ND: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """For each query the numbers of the likeliest documents, best first, and the scores of all."""
    kept = min(_KEPT, len(documents_ND))
    for begin in range(0, len(queries_MD), 64):
        for scores_N in queries_MD[begin : begin + 64] @ documents_ND.T:
            some = np.argpartition(-scores_N, kept - 1)[:kept]
            yield some[np.argsort(-scores_N[some], kind="stable")].tolist(), scores_N


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for a person."""
    others = [name for name in ("pearson", "recall@10", "recall@100", "mrr@10") if name in result]
    return [*report.table(result), *(f"{name}  {result[name]:.4f}" for name in others)]
