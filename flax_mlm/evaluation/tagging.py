"""Fine-tuning for tags of words that make up names or chunks, measured by entity F1 as seqeval counts it.

A word is tagged by its first token (BERT, arXiv:1810.04805 §5.3). Sentences longer than `finetune.max_length` are split
between words, and their tags joined again.
"""

from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data import tables
from flax_mlm.errors import UserError
from flax_mlm.evaluation import metrics, report
from flax_mlm.finetuning.heads import NO_LABEL, fine_tune_head
from flax_mlm.inference.load import LoadedModel, Log, OnBatch


def run(
    model: LoadedModel,
    train: tables.Tagged,
    dev: tables.Tagged | None = None,
    test: tables.Tagged | None = None,
    log: Log = lambda line: None,
    on_batch: OnBatch = lambda: None,
) -> dict[str, Any]:
    """Fine-tunes with each learning rate, then with every seed, and evaluates on `test`, or on `dev` without it.

    Args:
      dev: chooses learning rate and epoch; None: a tenth of `train`.
      log: receives one line a learning rate.
      on_batch: called before every batch.

    Raises:
      UserError: a tag of `dev` or `test` is not in `train`, or `finetune.method` is probe.

    Returns:
      as `classification.run`, with entity F1 as the metric, and `kinds` with precision, recall and F1 of each kind of
      entity, of the median run.
    """
    from seqeval.metrics import classification_report, f1_score

    if dev is None:
        train, dev = (tables.take(train, i) for i in report.hold_out(len(train.words), train.tags))
    parts = {"train": train, "dev": dev, "test": test or dev}
    tags = sorted({tag for sentence in train.tags for tag in sentence} | {"O"})
    rows = {name: split_sentences(model, part, tags, name) for name, part in parts.items()}
    tokens = {name: some.tokens for name, some in rows.items()}

    def predict(part: str, outputs: list[np.ndarray]) -> list[list[str]]:
        return _join(rows[part], outputs, tags)

    def score(part: str, predictions: list[list[str]]) -> float:
        return float(f1_score(parts[part].tags, predictions, zero_division=0))

    searched = fine_tune_head(model, tokens, rows["train"].labels, len(tags), predict, score, log, on_batch)
    scores = [score("test", predictions) for predictions in searched.outcomes]
    labels, median = parts["test"].tags, searched.outcomes[report.median_run(scores)]
    counts_N3 = metrics.entity_counts(labels, median)
    kinds = classification_report(labels, median, output_dict=True, zero_division=0)
    return {
        "metric": "f1",
        **report.summary(scores, searched, {name: len(part.words) for name, part in parts.items()}, test is None),
        "stderr": metrics.bootstrap_stderr(lambda i: metrics.entity_f1(counts_N3[i]), len(labels), draws=1000),
        "kinds": {kind: {key: float(value) for key, value in values.items()} for kind, values in kinds.items()},
        "predictions": median,
        "labels": labels,
    }


class Rows(NamedTuple):
    """Tagged sentences as rows of tokens; a long sentence takes several rows."""

    tokens: list[list[int]]
    labels: list[list[int]]  # index of the word's tag at the first token of a word, else -1
    sentences: list[int]  # index of each row's sentence


def split_sentences(model: LoadedModel, part: tables.Tagged, tags: list[str], name: str) -> Rows:
    """Tokenizes tagged sentences into rows that end between words.

    Args:
      tags: the tags of the training set.
      name: flag that the sentences come from, for the error message.

    Raises:
      UserError: a tag is not among `tags`.
    """
    ids = {tag: i for i, tag in enumerate(tags)}
    if unknown := sorted({tag for sentence in part.tags for tag in sentence} - ids.keys()):
        raise UserError(f"--{name}: tag {unknown[0]} is not in the training set, which has {', '.join(tags)}")
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
            rows.labels[-1] += [ids[tag], *[NO_LABEL] * (len(word) - 1)]
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


def evaluate(model: LoadedModel, on_batch: OnBatch, train: str, dev: str, test: str) -> dict[str, Any]:
    """Runs the task on files (see `tables.read_tagged`)."""
    report.require("train", train, "a file of tagged sentences to fine-tune on")
    dev_set, test_set = (tables.read_tagged(source) if source else None for source in (dev, test))
    return run(model, tables.read_tagged(train), dev_set, test_set, print, on_batch)


table = report.table
