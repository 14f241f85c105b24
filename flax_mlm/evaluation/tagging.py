"""Fine-tuning for tags of words that make up names or chunks. Entity F1 as seqeval counts it.

A word is tagged by its first piece (BERT, arXiv:1810.04805 §5.3). Sentences longer than `finetune.max_length` are split
between words, and their tags joined again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.conll import Tagged
from flax_mlm.errors import UserError
from flax_mlm.evaluation import report
from flax_mlm.finetuning import loop as finetune
from flax_mlm.finetuning.loop import Log, Poll
from flax_mlm.inference.load import LoadedModel

_NONE = -1  # the label of pieces that are not the first of a word


def run(
    trained: LoadedModel, train: Tagged, dev: Tagged | None, test: Tagged | None, log: Log, poll: Poll
) -> dict[str, Any]:
    """Fine-tunes with each learning rate, then with every seed, and evaluates on `test`, or else on `dev`.

    Raises:
      UserError: a tag of `dev` or `test` is unknown in `train`, or `finetune.method` is probe.

    Returns:
      as `classification.run`, with entity F1 as the metric, and `kinds`: precision, recall and F1 of each kind of
      entity, of the median run.
    """
    from seqeval.metrics import classification_report, f1_score

    config = trained.config.finetune
    if dev is None:
        train, dev = map(train.take, report.tenth(len(train.words), train.tags))
    parts = {"train": train, "dev": dev, "test": test or dev}
    kinds = sorted({tag for tags in train.tags for tag in tags} | {"O"})
    ids = {tag: i for i, tag in enumerate(kinds)}
    for name, part in parts.items():
        if unknown := sorted({tag for tags in part.tags for tag in tags} - ids.keys()):
            raise UserError(f"--{name}: tag {unknown[0]} is not among those of the training set: {', '.join(kinds)}")
    pieces = {name: split(trained, part, ids) for name, part in parts.items()}
    head = finetune.make_head(trained, len(kinds), per_token=True, regression=False)

    def epoch(rng: np.random.Generator) -> Iterator[finetune.Batch]:
        rows = pieces["train"]
        for numbers in finetune.epoch_batches([len(tokens) for tokens in rows.texts.tokens], config.batch_size, rng):
            tokens_BL, types_BL = finetune.padded(trained, rows.texts.take(numbers))
            labels_BL = np.full_like(tokens_BL, _NONE)
            for b, i in enumerate(numbers):
                labels_BL[b, : len(rows.labels[i])] = rows.labels[i]
            yield tokens_BL, types_BL, labels_BL

    def tags_of(params: finetune.Params, name: str) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in parts[name].words]
        rows = pieces[name]
        outputs = finetune.predict(trained, head.outputs, params, rows.texts, poll)
        for sentence, labels, output_LC in zip(rows.sentences, rows.labels, outputs, strict=True):
            firsts = [i for i, label in enumerate(labels) if label != _NONE]
            found[sentence] += [kinds[k] for k in output_LC[firsts].argmax(-1)]
        return found

    def score(params: finetune.Params) -> float:
        return float(f1_score(parts["dev"].tags, tags_of(params, "dev"), zero_division=0))

    def once(rate: float, seed: int) -> tuple[float, list[list[str]]]:
        steps = finetune.batches_of(len(pieces["train"].sentences), config.batch_size)
        best = finetune.fit(trained, head.trainer, epoch, steps, score, rate, seed, poll)
        return best.score, tags_of(best.params, "test")

    found = finetune.search(config, once, log)
    gold = parts["test"].tags
    scores = [float(f1_score(gold, tags, zero_division=0)) for tags in found.outcomes]
    middle = found.outcomes[report.median_run(scores)]
    counts_N3 = counts(gold, middle)
    return {
        "metric": "f1",
        **report.summary(scores, found, {name: len(part.words) for name, part in parts.items()}, test is None),
        "stderr": report.bootstrap_stderr(lambda i: f1(counts_N3[i]), len(gold), draws=1000),
        "kinds": {
            kind: {key: float(value) for key, value in values.items()}
            for kind, values in classification_report(gold, middle, output_dict=True, zero_division=0).items()
        },
        "predictions": middle,
        "labels": gold,
    }


class Rows(NamedTuple):
    """Sentences as rows of pieces; a long sentence is several."""

    texts: finetune.Texts
    labels: list[list[int]]  # of each piece: of its word at the word's first piece, else -1
    sentences: list[int]  # the number of the sentence that each row is of


def split(trained: LoadedModel, part: Tagged, ids: dict[str, int]) -> Rows:
    """The rows of tagged sentences; a row ends between words."""
    t, config = trained.tokenizer, trained.config
    room = min(config.finetune.max_length, trained.max_length) - 2
    rows = Rows(finetune.Texts([], []), [], [])
    for number, (words, tags) in enumerate(zip(part.words, part.tags, strict=True)):
        tokens: list[int] = []
        labels: list[int] = []
        for tag, encoded in [*zip(tags, t.encode_words(words), strict=True), ("", None)]:
            spelled = [] if encoded is None else encoded.tolist()[:room] or [t.unk_id]
            if not spelled or len(tokens) + len(spelled) > room:
                rows.texts.tokens.append([t.cls_id, *tokens, t.sep_id])
                rows.texts.token_types.append([0] * (len(tokens) + 2))
                rows.labels.append([_NONE, *labels, _NONE])
                rows.sentences.append(number)
                tokens, labels = [], []
            if spelled:
                tokens += spelled
                labels += [ids[tag], *[_NONE] * (len(spelled) - 1)]
    return rows


def counts(gold: list[list[str]], found: list[list[str]]) -> np.ndarray:
    """How many entities of each sentence are right, were found, are true: int64 (N, 3)."""
    from seqeval.metrics.sequence_labeling import get_entities

    pairs = ((set(get_entities(g)), set(get_entities(f))) for g, f in zip(gold, found, strict=True))
    return np.array([(len(g & f), len(f), len(g)) for g, f in pairs], np.int64)


def f1(counts_N3: np.ndarray) -> float:
    """Entity F1 over sentences."""
    right, found, true = counts_N3.sum(0)
    return float(2 * right / max(found + true, 1))
