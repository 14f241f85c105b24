"""Tasks of `evaluate`: the flags that each one takes, how it runs, and its headline metric.

Tasks are imported only when they run, since they import JAX.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.distributed.processes import ProcessGroup
from flax_mlm.errors import UserError
from flax_mlm.evaluation import headline

Answer = tuple[dict[str, Any], list[str]]  # result, and its table as lines of text


class Task(NamedTuple):
    """One value of `--task`."""

    help: str
    flags: tuple[str, ...]  # keyword arguments of `run`
    run: Callable[..., Answer]  # (model, process group, **flags) -> answer
    headline: Callable[[dict[str, Any]], headline.HeadlineMetric]  # result -> what `compare` compares


def on_batch(group: ProcessGroup) -> Callable[[], None]:
    """Builds the function that reports progress before every batch."""
    return functools.partial(group.progress, "evaluating")


def _mlm(model: Any, group: ProcessGroup, mask_rates: str) -> Answer:
    from flax_mlm.data.open import open_corpus
    from flax_mlm.distributed.mesh import check_batch
    from flax_mlm.evaluation import mlm, rtd

    config, rates = model.config, _parse_rates(mask_rates)
    check_batch("eval.batch_size", config.eval.batch_size, model.mesh)
    with group.untimed("opening the corpus"):
        corpus = open_corpus(config)
    if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise UserError(f"data.corpus is {corpus}, which was made with another tokenizer than the checkpoint")
    if model.meta and model.meta["corpus"] != corpus.fingerprint and not config.train.phases:
        print("note: not the corpus this model was validated on; its rows may have been trained on", file=sys.stderr)
    model = mlm.with_eval(model, corpus.seq_len, config.eval.mask_rate)
    common = {"corpus": corpus.fingerprint, "hidden": [*config.objective.masking_signature, config.eval.mask_rate]}
    if config.objective.name == "rtd":
        rows = rtd.measure(model, corpus, on_batch(group))
        each_row = {name: getattr(rows, name).tolist() for name in ("loss", "tokens", "replaced")}
        result: dict[str, Any] = {**rtd.summary(rows, corpus), **common, "each_row": each_row}
        return result, rtd.table(result)
    measurement = mlm.measure(model, corpus, on_batch(group))
    count_R, loss_R, *_ = measurement.row_R4.T
    result = {
        **mlm.summary(measurement, corpus),
        **common,
        "by": mlm.breakdown(measurement, model.tokenizer.starts_word),
        "each_row": {"loss": loss_R.tolist(), "predicted_tokens": count_R.tolist()},
    }
    if config.objective.name == "mlm" and rates:
        models = {f"{rate:g}": mlm.with_eval(model, corpus.seq_len, rate) for rate in rates}
        result["rates"] = {rate: mlm.run(other, corpus, on_batch(group)) for rate, other in models.items()}
    return result, mlm.table(result, config.objective.name)


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",") if rate.strip()]
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError
    except ValueError:
        raise UserError(f"--mask_rates is '{text}'; expected fractions such as 0.15,0.3") from None
    return rates


def _cloze(model: Any, group: ProcessGroup, data: str) -> Answer:
    from flax_mlm.evaluation import cloze

    result = cloze.run(model, cloze.read(data), on_batch(group))
    return result, cloze.table(result)


def _minimal_pairs(model: Any, group: ProcessGroup, data: str, variant: str) -> Answer:
    from flax_mlm.evaluation import minimal_pairs

    _require("data", data, "a .jsonl file of pairs, or a folder of such files")
    result = minimal_pairs.run(model, minimal_pairs.read(data), variant, on_batch(group))
    return result, minimal_pairs.table(result)


def _classification(
    model: Any, group: ProcessGroup, train: str, dev: str, test: str, metric: str, **columns: str
) -> Answer:
    from flax_mlm.data import tables
    from flax_mlm.evaluation import classification, report

    _require("train", train, "a file of labelled examples to fine-tune on")
    dev_set, test_set = (tables.read(source, **columns) if source else None for source in (dev, test))
    train_set = tables.read(train, **columns)
    result = classification.run(model, train_set, dev_set, test_set, metric, print, on_batch(group))
    return result, report.table(result)


def _tagging(model: Any, group: ProcessGroup, train: str, dev: str, test: str) -> Answer:
    from flax_mlm.data import conll
    from flax_mlm.evaluation import report, tagging

    _require("train", train, "a file of tagged sentences to fine-tune on")
    dev_set, test_set = (conll.read(source) if source else None for source in (dev, test))
    result = tagging.run(model, conll.read(train), dev_set, test_set, print, on_batch(group))
    return result, report.table(result)


def _retrieval(model: Any, group: ProcessGroup, train: str, dev: str, test: str, save: str, **columns: str) -> Answer:
    from flax_mlm.data import tables
    from flax_mlm.evaluation import retrieval
    from flax_mlm.finetuning.save import save_encoder
    from flax_mlm.storage import files

    _require("test", test, "a BEIR folder, or a file of pairs of sentences with scores")
    folder = Path(save).expanduser()
    if save:
        if folder.exists():
            raise UserError(f"--save is '{save}', which exists; name a new folder")
        _require("train", train, "pairs to fine-tune on; without --train there is nothing new for --save")
        files.check_writable("--save", folder, makes_folders=True)
    pairs, dev_pairs = (
        retrieval.read_pairs(source, name) if source else None for source, name in ((train, "train"), (dev, "dev"))
    )
    is_benchmark = Path(test).expanduser().is_dir()
    examples = retrieval.read_benchmark(test, "test") if is_benchmark else tables.read(test, **columns)
    result, params = retrieval.run(model, examples, pairs, dev_pairs, print, on_batch(group))
    if save:
        save_encoder(folder, model, params["encoder"], result["examples"]["train"])
    return result, retrieval.table(result)


def _require(flag: str, value: str, expected: str) -> None:
    if not value:
        raise UserError(f"--{flag} is missing; expected {expected}")


_SPLITS = ("train", "dev", "test")
_COLUMNS = ("text", "pair", "label")

TASKS = {
    "mlm": Task(
        "loss and accuracy on held-out rows, with the model's own objective", ("mask_rates",), _mlm, headline.mlm
    ),
    "cloze": Task("rank of the words that belong in a [MASK]", ("data",), _cloze, headline.cloze),
    "minimal_pairs": Task(
        "whether the good sentence of a pair is likelier than the bad one",
        ("data", "variant"),
        _minimal_pairs,
        headline.minimal_pairs,
    ),
    "classification": Task(
        "fine-tuning for the label or number of a text or pair",
        (*_SPLITS, *_COLUMNS, "metric"),
        _classification,
        headline.classification,
    ),
    "tagging": Task("fine-tuning for tags of words", _SPLITS, _tagging, headline.tagging),
    "retrieval": Task(
        "vectors for search, as they are or fine-tuned", (*_SPLITS, *_COLUMNS, "save"), _retrieval, headline.retrieval
    ),
}


def headline_metric(result: dict[str, Any]) -> headline.HeadlineMetric:
    """Returns the headline metric of a result that `evaluate --json` wrote."""
    return TASKS[result["task"]].headline(result)
