"""Fine-tuning for tags of words that make up names or chunks, measured by entity F1 as seqeval counts it.

A word is tagged by its first token (BERT, arXiv:1810.04805 §5.3). Sentences longer than `finetune.max_length` are split
between words, and their tags joined again.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data import conll, tables
from flax_mlm.data.conll import Tagged
from flax_mlm.errors import UserError
from flax_mlm.evaluation import labels as task_labels
from flax_mlm.evaluation import metrics, report
from flax_mlm.finetuning import saving
from flax_mlm.finetuning.heads import NO_LABEL, choose_kind, fine_tune_head
from flax_mlm.finetuning.loop import SearchResult
from flax_mlm.inference import classify, task_head
from flax_mlm.inference.load import LoadedModel, Log, OnBatch, Params
from flax_mlm.inference.task_head import TaskHead

Keep = Callable[[Params, int, TaskHead], None]  # fine-tuned parameters, number of training examples, head


def run(
    model: LoadedModel,
    train: Tagged,
    dev: Tagged | None = None,
    test: Tagged | None = None,
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Fine-tunes with each learning rate, then with every seed, and evaluates on `test`, or on `dev` without it.

    Args:
      dev: chooses learning rate and epoch; None: a tenth of `train`.
      log: receives the counts of the entities, the tags that `train` lacks, and one line a learning rate.
      on_batch: called before every batch.
      keep: called with what the seed that is best on the development set has learned.

    Raises:
      UserError: a part has no entities, or `finetune.method` is probe.

    Returns:
      as `classification.run`, with entity F1 as the metric; `kinds` with precision, recall and F1 of each kind of
      entity, of the median run; and the baseline of giving each word the tag that it has most often in training.
    """
    if dev is None:
        train, dev = (tables.take(train, i) for i in report.hold_out(len(train.words), train.tags))
    parts = {"train": train, "dev": dev, "test": test or dev}
    tags = sorted({tag for sentence in train.tags for tag in sentence} | {"O"})
    for line in _describe({name: parts[name] for name in parts if name != "test" or test}, tags):
        log(line)
    rows = {name: split_sentences(model, part, tags) for name, part in parts.items()}
    tokens = {name: some.tokens for name, some in rows.items()}

    def predict(part: str, outputs: list[np.ndarray]) -> list[list[str]]:
        return _join(rows[part], outputs, tags)

    def score(part: str, predictions: list[list[str]]) -> float:
        return _f1(parts[part].tags, predictions)

    head = TaskHead("tagging", "token_classification", tuple(tags), choose_kind(model, "tagging"), False, "f1")
    seen = np.array([label for row in rows["train"].labels for label in row if label != NO_LABEL])
    weights_C = task_labels.class_weights(model.config.finetune.class_weights, seen, tags)
    arguments = tokens, rows["train"].labels, predict, score, log, on_batch, weights_C
    searched = fine_tune_head(model, head, *arguments)
    if keep:
        keep(searched.params, len(train.words), head)
    scores = [score("test", predictions) for predictions in searched.outcomes]
    labels, median = parts["test"].tags, searched.outcomes[report.median_run(scores)]
    return {
        "metric": "f1",
        **report.summary(scores, searched, {name: len(part.words) for name, part in parts.items()}, test is None),
        "baseline": score("test", commonest_tags(train, parts["test"].words)),
        "baseline_label": "each word's commonest tag",
        **_judged(labels, median),
        **({"saved": report.saved(searched, scores)} if keep else {}),
    }


def judge(
    model: LoadedModel, test: Tagged, log: Log = lambda line: None, on_batch: OnBatch = lambda: None
) -> dict[str, Any]:
    """Evaluates a model that was fine-tuned before, without training; returns as `run` does, without the baseline.

    Raises:
      UserError: the model has no head for tags, or `test` has no entities.
    """
    head = task_head.require(model.task_head, "tagging")
    tags = [*head.labels]
    for line in _describe({"test": test}, tags):
        log(line)
    rows = split_sentences(model, test, tags)
    predictions = _join(rows, classify.run_head(model, head, rows.tokens, on_batch), tags)
    scores = [_f1(test.tags, predictions)]
    summary = report.summary(scores, SearchResult("", {}, [predictions]), {"test": len(test.words)}, False)
    return {"metric": "f1", **summary, **_judged(test.tags, predictions)}


def _f1(labels: list[list[str]], predictions: list[list[str]]) -> float:
    from seqeval.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def _judged(labels: list[list[str]], predictions: list[list[str]]) -> dict[str, Any]:
    """Returns standard error, numbers of each kind of entity, predictions and labels of a result, by name."""
    from seqeval.metrics import classification_report

    counts_N3 = metrics.entity_counts(labels, predictions)
    kinds = classification_report(labels, predictions, output_dict=True, zero_division=0)
    return {
        "stderr": metrics.bootstrap_stderr(lambda i: metrics.entity_f1(counts_N3[i]), len(labels), draws=1000),
        "kinds": {kind: {key: float(value) for key, value in values.items()} for kind, values in kinds.items()},
        "predictions": predictions,
        "labels": labels,
    }


def _describe(parts: dict[str, Tagged], tags: list[str]) -> Iterator[str]:
    """Yields lines with the counts of entities, and of tags that are not among the training set's `tags`.

    Raises:
      UserError: a part has no entities.
    """
    kinds = {name: [tag[2:] for some in part.tags for tag in some if tag[0] == "B"] for name, part in parts.items()}
    if empty := next((name for name, found in kinds.items() if not found), ""):
        raise UserError(f"--{empty} has no entities, all tags are O; entity F1 needs some")
    yield from task_labels.describe(kinds, "entities")
    for name, part in parts.items():
        unknown = Counter(tag for sentence in part.tags for tag in sentence if tag not in tags)
        if unknown:
            listed = task_labels.shortened([f"{tag} {count:,}" for tag, count in unknown.most_common()])
            yield f"note: --{name} has tags that the training set lacks, and that count as wrong: {listed}"


def commonest_tags(train: Tagged, words: list[list[str]]) -> list[list[str]]:
    """Tags each word as it is tagged most often in the training set, or O where it does not occur there."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(sentence, tags, strict=True):
            counts[word][tag] += 1
    commonest = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    return [[commonest.get(word, "O") for word in sentence] for sentence in words]


class Rows(NamedTuple):
    """Tagged sentences as rows of tokens; a long sentence takes several rows."""

    tokens: list[list[int]]
    labels: list[list[int]]  # index of the word's tag at the first token of a word, else NO_LABEL
    sentences: list[int]  # index of each row's sentence


def split_sentences(model: LoadedModel, part: Tagged, tags: list[str]) -> Rows:
    """Tokenizes tagged sentences into rows that end between words.

    Args:
      tags: the tags of the training set; the index of any other tag is their number.
    """
    ids = {tag: i for i, tag in enumerate(tags)}
    t, max_tokens = model.tokenizer, min(model.config.finetune.max_length, model.max_length) - 2
    rows = Rows([], [], [])

    def begin_row(sentence: int) -> None:
        rows.tokens.append([t.cls_id])
        rows.labels.append([NO_LABEL])
        rows.sentences.append(sentence)

    for sentence, (words, word_tags) in enumerate(zip(part.words, part.tags, strict=True)):
        begin_row(sentence)
        for tag, encoded in zip(word_tags, t.encode_words(words), strict=True):
            word = encoded.tolist()[:max_tokens] or [t.unk_id]
            if len(rows.tokens[-1]) + len(word) > max_tokens + 1:
                begin_row(sentence)
            rows.tokens[-1] += word
            rows.labels[-1] += [ids.get(tag, len(tags)), *[NO_LABEL] * (len(word) - 1)]
    for row in rows.tokens:
        row.append(t.sep_id)
    return rows


def _join(rows: Rows, outputs: list[np.ndarray], tags: list[str]) -> list[list[str]]:
    """Joins the predicted tags of rows to those of sentences."""
    sentences: list[list[str]] = [[] for _ in range(rows.sentences[-1] + 1)]
    for sentence, labels, output_LC in zip(rows.sentences, rows.labels, outputs, strict=True):
        firsts = [i for i, label in enumerate(labels) if label != NO_LABEL]
        sentences[sentence] += [tags[k] for k in output_LC[firsts].argmax(-1)]
    return sentences


def evaluate(
    model: LoadedModel, on_batch: OnBatch, train: str, dev: str, test: str, columns: str, save: str
) -> dict[str, Any]:
    """Runs the task on files (see `conll.read`).

    Args:
      save: a new folder for the fine-tuned model; empty: it is not kept.
    """
    folder = saving.new_folder(save, train)
    if not train:
        task_head.require(model.task_head, "tagging")
        report.require("test", test, "tagged sentences; without --train the checkpoint's own head is evaluated")
        return judge(model, conll.read(test, columns), print, on_batch)
    dev_set, test_set = (conll.read(source, columns) if source else None for source in (dev, test))
    keep = functools.partial(saving.save_model, folder, model) if folder else None
    return run(model, conll.read(train, columns), dev_set, test_set, print, on_batch, keep)


table = report.table
