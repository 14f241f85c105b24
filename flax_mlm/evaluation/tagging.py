"""Fine-tuning for tags of words that make up names or chunks, measured by entity F1 as seqeval counts it.

A word is tagged by its first token (BERT, arXiv:1810.04805 §5.3). Sentences longer than `finetune.max_length` are split
between words, and their tags joined again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.conll import Tagged
from flax_mlm.data.tables import take
from flax_mlm.errors import UserError
from flax_mlm.evaluation import dev_split, metrics, report
from flax_mlm.finetuning.batches import Batch, epoch_indices, num_batches
from flax_mlm.finetuning.heads import make_head
from flax_mlm.finetuning.loop import Log, Problem, search
from flax_mlm.inference import embeddings
from flax_mlm.inference.embeddings import OnBatch, Params, TokenizedTexts
from flax_mlm.inference.model import LoadedModel

_NONE = -1  # label of tokens that do not begin a word


def run(
    model: LoadedModel,
    train: Tagged,
    dev: Tagged | None = None,
    test: Tagged | None = None,
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
      as `classification.run`, with entity F1 as the metric, and `kinds`: precision, recall and F1 of each kind of
      entity, of the median run.
    """
    from seqeval.metrics import classification_report, f1_score

    if dev is None:
        train, dev = (take(train, i) for i in dev_split.hold_out(len(train.words), train.tags))
    parts = {"train": train, "dev": dev, "test": test or dev}
    tags = sorted({tag for sentence in train.tags for tag in sentence} | {"O"})
    rows = {name: split_sentences(model, part, tags, name) for name, part in parts.items()}
    head = make_head(model, len(tags), per_token=True)

    def predict(params: Params, name: str) -> list[list[str]]:
        outputs = embeddings.run_batches(model, head.outputs, params, rows[name].texts, on_batch)
        return _join(rows[name], outputs, tags, len(parts[name].words))

    problem = Problem(
        head.init,
        head.loss,
        _make_epoch(model, rows["train"]),
        steps_per_epoch=num_batches(len(rows["train"].labels), model.config.finetune.batch_size),
        dev_score=lambda params: float(f1_score(parts["dev"].tags, predict(params, "dev"), zero_division=0)),
    )
    searched = search(model, problem, lambda params: predict(params, "test"), log, on_batch)
    labels = parts["test"].tags
    scores = [float(f1_score(labels, predictions, zero_division=0)) for predictions in searched.outcomes]
    median = searched.outcomes[report.median_run(scores)]
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

    texts: TokenizedTexts
    labels: list[list[int]]  # index of the word's tag at the first token of a word, else -1
    sentences: list[int]  # index of each row's sentence


def split_sentences(model: LoadedModel, part: Tagged, tags: list[str], name: str) -> Rows:
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
    rows = Rows(TokenizedTexts([], []), [], [])
    tokens: list[int] = []
    labels: list[int] = []

    def end_row(sentence: int) -> None:
        rows.texts.tokens.append([t.cls_id, *tokens, t.sep_id])
        rows.texts.token_types.append([0] * (len(tokens) + 2))
        rows.labels.append([_NONE, *labels, _NONE])
        rows.sentences.append(sentence)
        tokens.clear()
        labels.clear()

    for sentence, (words, word_tags) in enumerate(zip(part.words, part.tags, strict=True)):
        for tag, encoded in zip(word_tags, t.encode_words(words), strict=True):
            word = encoded.tolist()[:max_tokens] or [t.unk_id]
            if len(tokens) + len(word) > max_tokens:
                end_row(sentence)
            tokens += word
            labels += [ids[tag], *[_NONE] * (len(word) - 1)]
        end_row(sentence)
    return rows


def _join(rows: Rows, outputs: list[np.ndarray], tags: list[str], num_sentences: int) -> list[list[str]]:
    """Joins the predicted tags of rows to those of sentences."""
    sentences: list[list[str]] = [[] for _ in range(num_sentences)]
    for sentence, labels, output_LC in zip(rows.sentences, rows.labels, outputs, strict=True):
        firsts = [i for i, label in enumerate(labels) if label != _NONE]
        sentences[sentence] += [tags[k] for k in output_LC[firsts].argmax(-1)]
    return sentences


def _make_epoch(model: LoadedModel, rows: Rows) -> Callable[[np.random.Generator], Iterator[Batch]]:
    def epoch(rng: np.random.Generator) -> Iterator[Batch]:
        lengths = [len(tokens) for tokens in rows.texts.tokens]
        for indices in epoch_indices(lengths, model.config.finetune.batch_size, rng):
            tokens_BL, types_BL = embeddings.pad(model, take(rows.texts, indices))
            labels_BL = np.full_like(tokens_BL, _NONE)
            for b, i in enumerate(indices):
                labels_BL[b, : len(rows.labels[i])] = rows.labels[i]
            yield tokens_BL, types_BL, labels_BL

    return epoch
